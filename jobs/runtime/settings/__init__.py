"""The settings of a run: what can be set, how it is read and checked, and what each setting shapes."""
