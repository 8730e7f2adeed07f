"""What tests of the features pass share."""

from pathlib import Path

import pytest

from tests.arrow.units import ENCODER, INPUT_PX
from udfs.encode_tiles import FeatureSpec
from udfs.wsi.encoder import EncoderSpec


@pytest.fixture(scope="session")
def spec(encoder_weights: Path) -> FeatureSpec:
    encoder = EncoderSpec("test_efficientnet", str(encoder_weights), INPUT_PX, "area", 4, "cpu")
    return FeatureSpec({ENCODER: encoder}, None, 16)
