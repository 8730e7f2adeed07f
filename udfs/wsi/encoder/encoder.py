"""Tiles to embeddings: an encoder's network on its device, in batches that fit there."""

import os
import platform
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.encoder.batch_size import is_out_of_memory, measured_batch_size
from udfs.wsi.encoder.encoder_spec import EncoderSpec
from udfs.wsi.encoder.network import Network, load_network
from udfs.wsi.encoder.openvino import OpenVinoRuntime
from udfs.wsi.encoder.pytorch import TorchRuntime
from udfs.wsi.encoder.resize import resize
from udfs.wsi.host_cache import key_of

# On a processor the caches of a core are full with few tiles, and of one alone a call costs too much; a GPU wants hundreds.
_SIZES = {"cpu": (2, 32), "cuda": (32, 1024)}

Embeddings = tuple[NDArray[np.float32], ...]
"""float32 [n, dim] for each of the encoder's `outputs`."""
Result = TypeVar("Result")
Tiles = TypeVar("Tiles", NDArray[np.uint8], torch.Tensor)


class Encoder:
    """A loaded encoder on its device."""

    def __init__(
        self,
        spec: EncoderSpec,
        network: Network | None = None,
        *,
        device: torch.device | None = None,
        threads: int = 1,
    ) -> None:
        """Bring an encoder to its device.

        Args:
            spec: which.
            network: as `load_network` gives it; this changes it. None loads it.
            device: where it runs; None as `spec.device` says.
            threads: of OpenVINO. PyTorch has one setting for the whole process, which is the caller's.

        Raises:
            CheckpointError: the weights cannot be read or do not fit the model.
            ValueError: no encoder has this name, or something that the spec asks for is not there.
        """
        self.spec, self.threads = spec, threads
        self.device = device or device_of(spec)
        network = network or load_network(spec)
        self.outputs, self.identity = network.outputs, network.identity
        self.input_px, self.interpolation = network.input_px, network.interpolation
        self.runtime: TorchRuntime | OpenVinoRuntime
        if spec.runtime == "openvino":
            if self.device.type != "cpu":
                raise ValueError(
                    "inference.runtime = openvino runs on processors: set inference.device to cpu, or use torch"
                )
            self.runtime = OpenVinoRuntime(network, spec.precision, threads)
        else:
            self.runtime = TorchRuntime(network, self.device, spec.precision)
        self._most = spec.batch_size or _SIZES[self.device.type][1]

    @property
    def batch_size(self) -> int:
        """Tiles per forward pass; fewer than at first if memory ran out."""
        return min(self._most, self._wanted_batch_size)

    def embed(self, tiles: NDArray[np.uint8]) -> Embeddings:
        """Embed tiles, each brought to ``input_px``.

        Args:
            tiles: uint8 [n, h, w, 3], RGB.

        Returns:
            float32 [n, dim] for each of `outputs`.
        """

        def run(part: NDArray[np.uint8], size: int) -> Embeddings:
            return self.runtime(resize(part, self.input_px, self.interpolation), size)

        done = self.in_batches(tiles, run)
        if not done:
            return tuple(np.zeros((0, dim), np.float32) for _, dim in self.outputs)
        return tuple(np.concatenate(parts) for parts in zip(*done, strict=True))

    def in_batches(self, tiles: Tiles, run: Callable[[Tiles, int], Result]) -> list[Result]:
        """Returns what `run` returns for each batch of tiles and its size. If memory runs out, batches are half as large."""
        done: list[Result] = []
        start = 0
        while start < len(tiles):
            size = self.batch_size
            batch = tiles[start : start + size]
            try:
                done.append(run(batch, size))
                start += size
                continue
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            self._most = size // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return done

    @cached_property
    def _wanted_batch_size(self) -> int:
        if self.spec.batch_size:
            return self.spec.batch_size

        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor()
        sizes = _SIZES[self.device.type]
        key = key_of(self.identity, self.spec.runtime, self.threads, machine, torch.__version__, sizes)
        return measured_batch_size(self.runtime.run_blank, *sizes, key)


def device_of(spec: EncoderSpec) -> torch.device:
    """Where an encoder runs: `auto` takes a GPU if there is one, and the runtime is made for it."""
    if spec.device == "auto":
        return torch.device("cuda" if spec.runtime == "torch" and torch.cuda.is_available() else "cpu")
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("inference.device = cuda, but there is no GPU that PyTorch can use: set it to auto or cpu")
    return torch.device(spec.device)


def _processor() -> str:
    return f"{platform.processor() or platform.machine()} {os.cpu_count()}"
