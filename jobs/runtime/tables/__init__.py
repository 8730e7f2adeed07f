"""The Delta tables: their schemas, where they lie, and how rows get into them."""
