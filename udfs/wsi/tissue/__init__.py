"""Which parts of a slide are tissue, one file per method, and the grid of tiles over them."""
