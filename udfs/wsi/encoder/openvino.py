"""The encoder by OpenVINO: the fastest on Intel's and AMD's processors. An extra."""

import tempfile
import warnings
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.encoder.encoder_spec import Precision
from udfs.wsi.encoder.network import Network
from udfs.wsi.host_cache import cache_folder, key_of, make_once

_HINTS = {"fp32": "f32", "bf16": "bf16"}
_VERSION = 2  # of what is kept: raise it when the conversion changes


class OpenVinoRuntime:
    """A network compiled for the processor."""

    def __init__(self, network: Network, precision: Precision, threads: int) -> None:
        """Convert the network, or take what was converted on this host before.

        Raises:
            ValueError: OpenVINO is not installed, or the processor does not calculate in this precision.
        """
        core = _core()
        if precision != "fp32" and precision.upper() not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError(f"inference.precision = {precision}: this processor has no {precision}: set it to fp32")
        self._core, self._edge, self._n_outputs = core, network.input_px, len(network.outputs)
        self._model = _model_of(core, network)
        self._options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # else the tasks of a host sit on the same cores
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
        }
        self._batch_size = 0  # compiled for one size at a time, which takes a tenth of a second
        self._request: Any = None

    def __call__(self, images: NDArray[np.float32], batch_size: int) -> tuple[NDArray[np.float32], ...]:
        """Images of at most a batch through the network, see `Network.forward`.

        The model is compiled for whole batches, so a shorter one is filled up: so each result is the same in any of them.
        """
        if batch_size != self._batch_size:
            self._model.reshape([batch_size, self._edge, self._edge, 3])
            self._request = self._core.compile_model(self._model, "CPU", self._options).create_infer_request()
            self._batch_size = batch_size
        n = len(images)
        if n < batch_size:
            images = np.concatenate([images, np.zeros((batch_size - n, *images.shape[1:]), np.float32)])
        self._request.infer({0: images}, share_inputs=True)
        return tuple(self._request.get_output_tensor(i).data[:n].copy() for i in range(self._n_outputs))

    def run_blank(self, batch_size: int) -> None:
        """Run a batch of blank images."""
        self(np.zeros((batch_size, self._edge, self._edge, 3), np.float32), batch_size)


def _core() -> Any:
    try:
        import openvino  # noqa: PLC0415  an extra
    except ImportError:
        raise ValueError(
            "inference.runtime = openvino needs OpenVINO where tasks run: pip install 'slidelake[openvino]'"
        ) from None
    return openvino.Core()


def _model_of(core: Any, network: Network) -> Any:
    """The model in OpenVINO's own format, converted once per host; anew if the cache cannot be used.

    Its weights are mapped from the file, so that processes share them until they are compiled.
    """
    converted = [part for part in network.identity if not part.startswith("precision=")]  # of every precision the same
    key = key_of(_VERSION, converted, version("openvino"), version("timm"))
    path: Path | None = None
    try:
        path = cache_folder() / f"openvino-{key}.xml"
        make_once(path, partial(_convert, network))
        return core.read_model(path, _weights_of(path))
    except (OSError, RuntimeError):  # no room, or half of it was cleaned away
        with suppress(OSError):
            if path:
                path.unlink(missing_ok=True)  # the next process makes it anew
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            _convert(network, path)
            return core.read_model(path, _weights_of(path))


def _weights_of(path: Path) -> Path:
    """Return the file of the weights beside that of the layers, under whatever name that is written."""
    return path.with_name(f"{path.name.partition('.')[0]}.bin")


def _convert(network: Network, path: Path) -> None:
    """OpenVINO writes two files. That of the layers is the last to get its name: with it, both are whole."""
    import openvino  # noqa: PLC0415  an extra

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of tracing, which does not mind the model's own checks of sizes
        edge = network.input_px
        example = torch.zeros(1, edge, edge, 3)
        try:
            model = openvino.convert_model(network, example_input=example, input=[-1, edge, edge, 3])
        except Exception as error:  # of many kinds, some of them its own
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"encoder {network.name}: OpenVINO cannot convert it ({reason}): set inference.runtime to torch"
            ) from None
        written = path.with_name(f"{path.name}.xml")  # one name: what a killed process left is overwritten
        openvino.save_model(model, written, compress_to_fp16=False)
    path.write_bytes(_with_precise_layers(written.read_bytes(), edge))
    written.unlink()
    written.with_suffix(".bin").replace(_weights_of(path))


def _with_precise_layers(xml: bytes, input_px: int) -> bytes:
    """Marks the layers at half of the input's resolution and above, so that they stay in fp32 whatever the rest is.

    Rounding costs the most there: with all of EfficientNet-Lite0 in bf16 the cosine to fp32 is 0.9979 in the mean over tiles
    of tissue, its border and glass, and with these few layers in fp32 it is 0.9993, for a seventh of the speed.
    """
    root = ElementTree.fromstring(xml)
    for layer in root.iterfind("layers/layer"):
        shape = [int(size.text or 0) for size in layer.iterfind("output/port/dim")]  # [n, dim, h, w]
        if (
            layer.get("type") not in ("Const", "Parameter", "Result")
            and len(shape) == 4
            and 2 * min(shape[2:]) >= input_px
        ):
            marks = layer.find("rt_info")
            marks = ElementTree.SubElement(layer, "rt_info") if marks is None else marks
            ElementTree.SubElement(marks, "attribute", {"name": "precise", "version": "0"})
    return bytes(ElementTree.tostring(root))
