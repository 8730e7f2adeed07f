"""What slidelake takes, beside a peer or a limit, in the same run and on the same input. Run it by `make bench`.

One file a benchmark; `__main__` runs them, `measure` holds the clock, `inputs` the slides that they share.
"""
