"""gpu: encoders in their recommended precision, from decoded tiles to vectors on the host, beside the network alone.

`python -m benchmarks.gpu` needs PyTorch, timm, tifffile and the packages of `udfs.wsi`, but no weights, slides or network: it
makes weights and a slide, and removes them. Without a GPU the same code runs small models on the processor.

- `tiles_per_s`: the worker's path. A thread copies decoded tiles of 448 px into batches; they cross the bus as bytes, go through
  StainNet's table, the histogram and the encoder, and vectors and counts come back. `jpeg_tiles_per_s`: the same, and the thread
  decodes the tiles from a JPEG slide with all cores.
- `of_bare`: tiles_per_s beside `bare_tiles_per_s`, the network alone on images that are on the device, at its best batch size.
- `vs_autocast`: the network alone beside the same in `torch.autocast`, as model cards run it, each at its best batch size.
- `cosine_min`: the least cosine to PyTorch's fp32 on the processor.
- `way`: the network alone, its blocks compiled by torch.compile, or captured as a CUDA graph; `vs_bare` beside the bare network.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.agreement import cosines
from benchmarks.machine import on_cores
from benchmarks.measure import Line, in_turns, peak_bytes, seconds, show
from benchmarks.random_weights import network_of, stainnet
from tests.slides.make import write_mosaic
from udfs.wsi import open_slide
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.encoder.batch_size import is_out_of_memory
from udfs.wsi.encoder.network import Network
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.encoder.pytorch import TorchRuntime
from udfs.wsi.inference import Batch, DeviceInference, HostInference
from udfs.wsi.prefetch import prefetch
from udfs.wsi.quality.pixel_metric import PixelMetric
from udfs.wsi.stain.colour_table import StainNormaliser

ON_A_GPU = (
    EncoderSpec("efficientnet_b0", None, precision="bf16"),
    *(EncoderSpec(name, None, precision=PRESETS[name].precision) for name in ("uni", "virchow2", "h-optimus-0")),
)
ON_A_PROCESSOR = (
    EncoderSpec("efficientnet_b0", None, precision="bf16"),
    EncoderSpec("virchow2", None, precision="bf16", kwargs=(("depth", 1),)),
)
_TILE_PX, _BINS, _BATCHES_AHEAD = 448, 16, 3  # as the features pass
_SLIDE_TILES, _PERIOD_PX = 16, 1792  # along an edge of the slide, and the pixels that it repeats
_COMPARED, _ROUNDS = 4, 3
_BARE_SIZES = {"cpu": (1, 2, 4), "cuda": (32, 64, 128, 256, 512, 1024)}
_SECONDS = {"cpu": 0.1, "cuda": 1.5}  # of one measurement, about
_COMPILED_BEFORE_S = 330  # since the start: what is compiled later would take longer than there is

Tiles = NDArray[np.uint8]
Forward = Callable[[torch.Tensor], object]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(specs: Sequence[EncoderSpec] = ()) -> Iterator[Line]:
    """Lines of each encoder; `specs` takes the place of those that suit the machine."""
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    all_cores = on_cores(os.cpu_count() or 1) if on_gpu else nullcontext()
    with all_cores, tempfile.TemporaryDirectory() as folder, _caches_in(Path(folder)):
        if on_gpu:
            torch.set_num_threads(_cores())  # for the reference
        pixels = _tissue(_PERIOD_PX)
        edge = _SLIDE_TILES * _TILE_PX
        slide = write_mosaic(Path(folder) / "slide.tif", pixels, width=edge, height=edge, pyramid=False)
        stain = StainNormaliser(stainnet(), 10**6)
        for spec in specs or (ON_A_GPU if on_gpu else ON_A_PROCESSOR):
            gpu = torch.cuda.get_device_name() if on_gpu else "none"
            head: Line = {"gpu": gpu, "encoder": spec.name, "precision": spec.precision}
            for line in _Measured(spec, device, stain, slide).lines(started):
                yield head | line
            if on_gpu:
                torch.cuda.empty_cache()


class _Measured:
    """An encoder on a device, and what it is measured with."""

    def __init__(self, spec: EncoderSpec, device: torch.device, stain: StainNormaliser, slide: Path) -> None:
        self._spec, self._device, self._stain, self._slide = spec, device, stain, slide
        self._network = network_of(spec)
        with closing(_read(slide)) as tiles:
            self._tiles = list(itertools.islice(tiles, _SLIDE_TILES**2))

    def lines(self, started: float) -> Iterator[Line]:
        """A line of the path, and one of each way to run the network alone."""
        name = self._spec.name
        on_processor = replace(self._spec, precision="fp32", device="cpu", batch_size=_COMPARED)
        reference = Encoder(on_processor, self._network, device=torch.device("cpu"))
        compared = np.stack(self._tiles[:_COMPARED])
        [(_, expected)] = HostInference({name: reference}, self._stain, _BINS)([(0, Batch(compared))])

        self._network.to(self._device)
        autocast_rate = self._best_rate(self._autocast)[1]
        encoder = Encoder(self._spec, self._network, device=self._device)
        assert isinstance(encoder.runtime, TorchRuntime)
        found_s = seconds(lambda: encoder.batch_size)
        device = DeviceInference({name: encoder}, self._stain, _BINS, PixelMetric.defined())
        [(_, found)] = device([(0, Batch(compared))])
        assert found and expected
        pairs = zip(found.embeddings[name], expected.embeddings[name], strict=True)
        least = min(float(cosines(ours, theirs).min()) for ours, theirs in pairs)
        bare_size, _ = self._best_rate(encoder.runtime.forward)
        bare = self._timed(encoder.runtime.forward, bare_size)
        _reset_peak(self._device)
        rates = self._rates(device, bare)
        yield {
            "batch_size": encoder.batch_size,
            "batch_found_s": found_s,
            "tiles_per_s": rates["ours"],
            "bare_batch_size": bare_size,
            "bare_tiles_per_s": rates["bare"],
            "of_bare": rates["ours"] / rates["bare"],
            "jpeg_tiles_per_s": rates["jpeg"],
            "cores": _cores(),
            "vs_autocast": rates["bare"] / autocast_rate,
            "peak_gb": _peak(self._device) / 1e9,
            "cosine_min": f"{least:.5f}",
        }
        for way, build in self._ways(encoder.runtime.forward, bare_size):
            if time.monotonic() - started < _COMPILED_BEFORE_S:
                which: Line = {"way": way, "batch_size": bare_size}
                yield which | self._built(build, rates["bare"], bare_size)

    def _rates(self, device: DeviceInference, bare: Callable[[], float]) -> dict[str, float]:
        """Tiles per second: medians of rounds in turns, so that a busy spell meets all of them."""
        size = device.batch_size
        n = max(3, round(_SECONDS[self._device.type] * bare() / size))

        def ours(tiles: Generator[Tiles]) -> float:
            with closing(prefetch(_batches(tiles, size, n), _BATCHES_AHEAD)) as batches:
                return n * size / seconds(lambda: deque(device(batches), 0))

        ways = {
            "ours": lambda: ours(tile for tile in itertools.cycle(self._tiles)),
            "bare": bare,
            "jpeg": lambda: ours(_read(self._slide)),
        }
        return {way: statistics.median(rates) for way, rates in in_turns(ways, _ROUNDS).items()}

    def _best_rate(self, forward: Forward) -> tuple[int, float]:
        """The batch size at which the network alone is fastest, and its tiles per second."""
        rates = {}
        try:
            for size in _BARE_SIZES[self._device.type]:
                rates[size] = self._timed(forward, size)()
        except RuntimeError as error:
            if not rates or not is_out_of_memory(error):
                raise
        best = max(rates, key=lambda size: rates[size])
        return best, rates[best]

    def _timed(self, forward: Forward, size: int) -> Callable[[], float]:
        """What measures a network alone: tiles per second."""
        edge = self._network.input_px
        images = torch.rand(size, edge, edge, 3, device=self._device) * 255

        def batches(n: int) -> None:
            with torch.inference_mode():
                for _ in range(n):
                    forward(images)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        batches(2)
        n = max(1, round(_SECONDS[self._device.type] / 2 / seconds(partial(batches, 1))))
        return lambda: n * size / seconds(partial(batches, n))

    def _autocast(self, images: torch.Tensor) -> object:
        with torch.autocast(self._device.type, _AUTOCAST.get(self._spec.precision), self._spec.precision != "fp32"):
            return self._network(images)

    def _ways(self, forward: Forward, size: int) -> Iterator[tuple[str, Callable[[], Forward]]]:
        if self._device.type == "cuda":
            yield "graph", lambda: _graph(forward, size, self._network)
        yield "compiled", lambda: _compiled(forward, self._network)

    def _built(self, build: Callable[[], Forward], bare: float, size: int) -> Line:
        try:
            start = time.perf_counter()
            measure = self._timed(build(), size)
            built_s = time.perf_counter() - start
            rate = statistics.median(measure() for _ in range(_ROUNDS))
        except Exception as error:  # PyTorch's compiler has many; the other lines are worth having
            return {"failed": type(error).__name__}
        return {"built_s": built_s, "tiles_per_s": rate, "vs_bare": rate / bare}


def _compiled(forward: Forward, network: Network) -> Forward:
    """Compile the blocks, of which those of a transformer are all alike and are compiled once. Without a GPU only trace them."""
    on_gpu = next(network.parameters()).device.type == "cuda"
    model: Any = network.get_submodule("model")
    for block in getattr(model, "blocks", [model]):
        block.compile(backend="inductor" if on_gpu else "eager")
    return forward


def _graph(forward: Forward, size: int, network: Network) -> Forward:
    """Capture a forward pass as PyTorch's manual says, after three in another stream; the images are always the same."""
    images = torch.zeros(size, network.input_px, network.input_px, 3, device="cuda")
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            forward(images)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(images)
    return lambda _: graph.replay()


def _batches(tiles: Generator[Tiles], size: int, n: int) -> Iterator[tuple[int, Batch]]:
    with closing(tiles):
        for number in range(n):
            batch = np.empty((size, _TILE_PX, _TILE_PX, 3), np.uint8)
            for i in range(size):
                batch[i] = next(tiles)
            yield number, Batch(batch)


def _read(slide: Path) -> Generator[Tiles]:
    """Yield the tiles of a slide over and over."""
    columns = np.arange(_SLIDE_TILES) * _TILE_PX
    xy_px = np.stack(np.meshgrid(columns, columns), axis=-1).reshape(-1, 2)
    while True:
        with open_slide(str(slide), threads=_cores()) as opened:
            for _, tile in opened.read_tiles(xy_px, _TILE_PX):
                yield tile


def _tissue(edge: int) -> Tiles:
    """Return colours like those of tissue, uint8 [edge, edge, 3]: smooth amounts of two stains, and grain."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 2, edge // 32, edge // 32, generator=generator)
    amounts = torch.nn.functional.interpolate(coarse, size=(edge, edge), mode="bicubic")[0]
    density = torch.einsum("shw,sc->hwc", amounts, torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]))
    grain = torch.randn(edge, edge, 1, generator=generator) * 4
    tissue: Tiles = (255 * torch.exp(-density) + grain).clamp(0, 255).byte().numpy()
    return tissue


@contextmanager
def _caches_in(folder: Path) -> Iterator[None]:
    """Let batch sizes, tables and compiled kernels go into a folder, so that they are made anew and removed with it."""
    before = dict(os.environ)
    os.environ.update({"SLIDELAKE_CACHE": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Bytes: of the GPU if there is one, else of the process."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_bytes()


if __name__ == "__main__":
    for line in run():
        print(show("gpu", line), flush=True)
