"""Tiles to embeddings: a timm model's feature map, averaged and maximised over its positions."""

import hashlib
import os
import platform
from collections.abc import Callable
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.encoder.batch_size import is_out_of_memory, measured_batch_size
from udfs.wsi.encoder.encoder_spec import EncoderSpec
from udfs.wsi.encoder.network import load_network
from udfs.wsi.encoder.openvino import OpenVinoRuntime
from udfs.wsi.encoder.pytorch import TorchRuntime
from udfs.wsi.encoder.resize import resize
from udfs.wsi.store import StorageOptions
from udfs.wsi.weights.checkpoint import fingerprint

# On a processor the caches of a core are full with few tiles, and of one alone a call costs too much; a GPU wants hundreds.
_SIZES = {"cpu": (2, 32), "cuda": (32, 1024)}

Embeddings = tuple[NDArray[np.float32], NDArray[np.float32]]
Result = TypeVar("Result")


class Encoder:
    """A loaded encoder on its device."""

    def __init__(
        self,
        spec: EncoderSpec,
        storage_options: StorageOptions | None = None,
        *,
        device: torch.device | None = None,
        threads: int = 1,
    ) -> None:
        """Load the model.

        Args:
            spec: which.
            storage_options: for its weights.
            device: where it runs; None as `spec.device` says.
            threads: of OpenVINO. PyTorch has one setting for the whole process, which is the caller's.

        Raises:
            CheckpointError: the weights can't be read or do not fit the model.
            ValueError: timm does not know the model, or something that the spec asks for is not there.
        """
        self.spec = spec
        self.device = device or device_of(spec)
        self.threads = threads
        network = load_network(spec, storage_options)
        self.fingerprint = fingerprint(network.model.state_dict())
        self.pooling = network.pooling
        self.is_channels_first = network.is_channels_first
        self.interpolation = "area" if spec.interpolation == "area" else network.own_interpolation
        self.runtime: TorchRuntime | OpenVinoRuntime
        if spec.runtime == "openvino":
            if self.device.type != "cpu":
                raise ValueError(
                    "encoder.runtime = openvino runs on processors: set encoder.device to cpu, or use torch"
                )
            self.runtime = OpenVinoRuntime(network, self.fingerprint, spec.input_px, spec.precision, threads)
        else:
            self.runtime = TorchRuntime(network, spec.input_px, self.device, spec.precision)
        self._most = spec.batch_size or _SIZES[self.device.type][1]

    @cached_property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.runtime(self._blank(1), 1)[0].shape[1]

    @property
    def batch_size(self) -> int:
        """Tiles a forward pass; less than at first where memory ran out."""
        return min(self._most, self._wanted_batch_size)

    def embed(self, tiles: NDArray[np.uint8]) -> Embeddings:
        """Embed tiles.

        Each is brought to ``input_px`` and normalised by the model's own mean and std.

        Args:
            tiles: uint8 [n, h, w, 3], RGB.

        Returns:
            (mean, max) over the positions of the feature map, each float32 [n, dim]; twice the same for a model that yields
            one vector.
        """
        done: list[Embeddings] = []
        start = 0
        while start < len(tiles):
            size = self.batch_size
            images = resize(tiles[start : start + size], self.spec.input_px, self.interpolation)
            result = self.or_smaller(size, partial(self.runtime, images, size))
            if result is not None:
                done.append(result)
                start += len(images)
        if not done:
            return np.zeros((0, self.dim), np.float32), np.zeros((0, self.dim), np.float32)
        return np.concatenate([one for one, _ in done]), np.concatenate([other for _, other in done])

    def or_smaller(self, size: int, run: Callable[[], Result]) -> Result | None:
        """What `run` returns; None where memory ran out with batches of `size`: from now on they are half as large."""
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._most = min(self._most, size // 2)  # a batch that was read before this may still come
        return None

    @cached_property
    def _wanted_batch_size(self) -> int:
        if self.spec.batch_size:
            return self.spec.batch_size

        def run(size: int) -> None:
            self.runtime(self._blank(size), size)

        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor()
        spec = self.spec
        sizes = _SIZES[self.device.type]
        what = (spec.name, spec.input_px, spec.runtime, spec.precision, self.threads, machine, torch.__version__, sizes)
        key = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
        return measured_batch_size(run, *sizes, key)

    def _blank(self, n: int) -> NDArray[np.float32]:
        return np.zeros((n, self.spec.input_px, self.spec.input_px, 3), np.float32)


def device_of(spec: EncoderSpec) -> torch.device:
    """Where an encoder runs: `auto` takes a GPU where there is one, and the runtime is made for it."""
    if spec.device == "auto":
        return torch.device("cuda" if spec.runtime == "torch" and torch.cuda.is_available() else "cpu")
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("encoder.device = cuda, but there is no GPU that PyTorch can use: set it to auto or cpu")
    return torch.device(spec.device)


def _processor() -> str:
    return f"{platform.processor() or platform.machine()} {os.cpu_count()}"
