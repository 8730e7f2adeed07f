"""Patches of pixels for people who train on pixels: read from the slides during training, never stored for long.

`docs/glossary.md` has the terms patch, unit and window.

    from jobs.training.patches.loader import PatchLoader
    from jobs.training.patches.from_tables import patches_of_tables

    spec = patches_of_tables("data/tables", patch_px=256, mpp=0.5)
    loader = PatchLoader(spec, batch_size=32, n_parallel=4)
    for epoch in range(10):
        for batch in loader.epoch(epoch):
            step(batch.pixels, batch.label)  # uint8 [b, 256, 256, 3], int64 [b]

Nothing is imported here, because executors read windows without petastorm, deltalake and torch.
"""
