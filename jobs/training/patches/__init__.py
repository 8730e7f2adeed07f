"""Patches of pixels on the fly, for people who train on pixels: read where the slides are, never stored on the way.

Words: a *patch* is a square that the trainer sees, `patch_px` a side; a *unit* is some neighbouring patches of one slide that
are read together, so that a block of the file is decoded once for all of them; a *window* is a file of patches that Spark's
executors read ahead of the trainer.

    from jobs.training.patches.loader import PatchLoader
    from jobs.training.patches.from_tables import patches_of_tables

    spec = patches_of_tables("data/tables", patch_px=256, mpp=0.5)
    loader = PatchLoader(spec, batch_size=32, n_parallel=4)
    for epoch in range(10):
        for batch in loader.epoch(epoch):
            step(batch.pixels, batch.label)  # uint8 [b, 256, 256, 3], int64 [b]

No table is made again for another `patch_px` or `mpp`: both are settings of the trainer. Nothing is imported here, for executors
read windows without petastorm, deltalake and torch.
"""
