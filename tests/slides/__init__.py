"""Real-pixel slide makers, shared by `make demo` and the tests.

What lives here: the public sample slide (`sample`), writers of slides of any size and dialect (`make`), makers of one
broken slide each (`damage`), the mask and grid in a few lines of numpy (`oracle`) and the demo cohort (`demo`).
What does not: tests, and anything that reads a slide with the project's own reader. These modules write with tifffile
and imagecodecs only, so that the reader is held against files that it had no part in.
"""
