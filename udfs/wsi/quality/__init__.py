"""What is measured on tiles: their colours, and metrics of their quality."""
