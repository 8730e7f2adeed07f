"""Which parts of a slide are tissue, and the grid of tiles over them."""
