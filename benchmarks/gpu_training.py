"""gpu_training: if there is a GPU, a training done twice on it in bf16, which must not make it another model each time."""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import Line
from jobs import train
from jobs.training.model.files import load_card
from tests.training.cohorts import Signal, draw_cohort, write_patients


def run() -> Iterator[Line]:
    """A line; without figures if there is no GPU."""
    yield _trained_twice() if torch.cuda.is_available() else {"gpu": "none here"}


def _trained_twice() -> Line:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_patients(root, draw_cohort(200, Signal(dim=256, tiles=5, strength=8.0, bag=(100, 500))))
        settings = root / "settings.yaml"
        training = {"device": "cuda", "epochs": 5}
        settings.write_text(json.dumps({"patients": "none.csv", "output": {"root": str(root)}, "training": training}))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            first = train.main(["--config", str(settings)])
            [model] = (root / "models").iterdir()
            again = train.main(["--config", str(settings), "--reproduce", model.name])
        card = load_card(str(model))
        losses = [epoch["train_loss"] for epoch in card.history]
    return {
        "gpu": card.device,
        "training": "bf16",
        "status": first,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "identical_again": str(again == 0).lower(),
    }
