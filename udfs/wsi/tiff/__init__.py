"""TIFF as scanners write it: directories become a `SlideIndex`, compressed blocks become pixels."""
