"""Tiles to embeddings."""

from udfs.wsi.encoder.encoder import Encoder, device_of
from udfs.wsi.encoder.encoder_spec import EncoderSpec

__all__ = ["Encoder", "EncoderSpec", "device_of"]
