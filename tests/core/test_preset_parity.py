"""Each preset, from a settings file and a published layout to vectors, is what the model's card gives: cosine 0.99999 in fp32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from jobs.runtime.run.run import encoder_spec
from jobs.runtime.settings.config import load_config
from tests.core.model_cards import CARDS, depth_of
from tests.slides.make import Pixels
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.encoder.presets import PRESETS

WHOLE = ("retccl", "ctranspath")  # small enough to keep all their layers


@pytest.fixture(scope="module")
def tiles(pixels: Pixels) -> Pixels:
    """Tissue and its border: uint8 [2, 448, 448, 3]."""
    return np.stack([pixels[y : y + 448, x : x + 448] for x, y in ((896, 896), (448, 1344))])


def spec_of(folder: Path, name: str, weights: Path, **encoder: Any) -> EncoderSpec:
    """The encoder of a settings file."""
    kwargs = {} if name in WHOLE else {"depth": depth_of(PRESETS[name].architecture)}
    encoders = {name: {"weights": str(weights), "kwargs": kwargs, **encoder}}
    settings = {"patients": "p.csv", "output": {"root": str(folder / "tables")}, "encoders": encoders}
    settings |= {"inference": {"device": "cpu", "batch_size": 2}}
    (folder / "cohort.yaml").write_text(yaml.safe_dump(settings))
    return encoder_spec(load_config(str(folder / "cohort.yaml")), name)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    result: NDArray[np.float64] = (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return result


def test_every_preset_that_runs_has_a_card() -> None:
    assert CARDS.keys() == {name for name, preset in PRESETS.items() if preset.unavailable is None}


@pytest.mark.parametrize("name", CARDS)
def test_a_preset_gives_what_its_card_gives(tmp_path: Path, tiles: Pixels, name: str) -> None:
    torch.set_num_threads(1)
    card = CARDS[name]
    model = card.model()
    expected = card.vectors(model, tiles)
    encoder = Encoder(spec_of(tmp_path, name, card.save(model, tmp_path)))
    vectors = encoder.embed(tiles)
    assert expected.shape == (len(tiles), PRESETS[name].dim)
    assert vectors[0].shape == expected.shape
    assert cosines(vectors[0], expected).min() >= 0.99999
    assert cosines(expected[:1], expected[1:]).max() < 0.9999  # the tiles matter
    assert len(vectors) == (2 if PRESETS[name].pooling == "map" else 1)
