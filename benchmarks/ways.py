"""The ways to run an encoder on a processor."""

from udfs.wsi.encoder.encoder_spec import Precision, Runtime

WAYS: tuple[tuple[Runtime, Precision], ...] = (
    ("torch", "fp32"),
    ("torch", "bf16"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
)
