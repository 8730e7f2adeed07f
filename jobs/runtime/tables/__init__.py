"""The Delta tables: how they are opened, checked, named and written."""
