"""What slidelake takes, beside a peer or a limit, in the same run and on the same input. Run it by `make bench`.

One file a benchmark; `__main__` runs them, `machine` keeps them on one core, `measure` holds the clock, `inputs` the
slides that they share, `peers` the other readers, `remote` a store that answers late.
"""
