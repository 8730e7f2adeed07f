"""Reading slides: which blocks hold the requested tiles, and their pixels."""
