"""TIFF as scanners write it: from directories to a `SlideIndex`, from compressed blocks to pixels."""
