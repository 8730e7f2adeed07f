"""Stain normalisation: StainNet, as a network and as a table of colours, and how it is fitted."""
