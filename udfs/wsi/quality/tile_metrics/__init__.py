"""The metrics of tiles, one file per metric; a new file is a new column of table tiles or features."""
