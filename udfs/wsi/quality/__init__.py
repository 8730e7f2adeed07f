"""What is measured on tiles."""
