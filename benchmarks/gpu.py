"""gpu: where there is one, tiles to vectors and counts on it beside the network alone, and a training done twice on it.

A batch goes from bytes in the host's memory through StainNet, histogram and encoder, as in the features stage; `of_network` is
that beside the network on images that are there already, both at the batch size that was found best. The cosine is that to
PyTorch's fp32 on the processor, the mean over real tiles of the worse of the two aggregates; random weights have none worth it.
"""

import contextlib
import io
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import inputs
from benchmarks.encode import cosines
from benchmarks.measure import Line, median_seconds
from benchmarks.work import BINS, INPUT_PX
from jobs import train
from jobs.training.model.files import load_card
from tests.slides.weights import LITE0
from tests.training.cohorts import Signal, draw_cohort, write_patients
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.encoder.encoder_spec import Precision
from udfs.wsi.encoder.pytorch import TorchRuntime
from udfs.wsi.inference import DeviceInference, HostInference
from udfs.wsi.stain.colour_table import StainNormaliser
from udfs.wsi.stain.stain_network import load_stainnet

_TILES, _BATCHES, _ROUNDS = 64, 8, 3
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


def run() -> Iterator[Line]:
    """A line for each encoder and precision, and one for training; one alone where there is no GPU."""
    if not torch.cuda.is_available():
        yield {"gpu": "none here"}
        return
    tiles = inputs.kept_pixels(inputs.section(), _TILES)
    for name, weights in ((LITE0, inputs.lite0_weights()), ("efficientnet_b0", inputs.b0_weights())):
        spec = EncoderSpec(name, str(weights), INPUT_PX, device="cpu")
        for precision in _PRECISIONS:
            line: Line = {"gpu": torch.cuda.get_device_name(), "encoder": name, "precision": precision}
            yield line | _encoded(replace(spec, precision=precision, device="cuda"), spec, tiles, name == LITE0)
    yield _trained_twice()


def _encoded(spec: EncoderSpec, on_processor: EncoderSpec, tiles: NDArray[np.uint8], is_real: bool) -> Line:
    stain = StainNormaliser(load_stainnet(str(inputs.stainnet())), tiles_ahead=10_000)
    encoder = Encoder(spec)
    device = DeviceInference(encoder, stain, BINS)
    size = device.batch_size
    batch = np.resize(tiles, (size, *tiles.shape[1:]))
    images = torch.rand(size, INPUT_PX, INPUT_PX, 3, device=encoder.device) * 255

    assert isinstance(encoder.runtime, TorchRuntime)
    forward = encoder.runtime.forward

    def network() -> None:
        for _ in range(_BATCHES):
            forward(images)
        torch.cuda.synchronize()

    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: deque(device((i, batch) for i in range(_BATCHES)), 0),
        "network": network,
    }
    rates = {way: _BATCHES * size / spent for way, spent in median_seconds(ways, _ROUNDS).items()}
    line: Line = {
        "batch_size": size,
        "tiles_per_s": rates["ours"],
        "network_tiles_per_s": rates["network"],
        "of_network": rates["ours"] / rates["network"],
    }
    if is_real:
        [(_, found)] = device([(0, tiles)])
        [(_, expected)] = HostInference(Encoder(on_processor), stain, BINS)([(0, tiles)])
        assert found and expected
        pairs = zip(found.embeddings, expected.embeddings, strict=True)
        line["cosine_mean"] = f"{min(float(cosines(ours, theirs).mean()) for ours, theirs in pairs):.5f}"
        line["counts_equal"] = str(np.array_equal(found.histograms, expected.histograms)).lower()
    return line


def _trained_twice() -> Line:
    """In bf16, which must not make it another model each time."""
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
