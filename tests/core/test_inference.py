"""What becomes of pixels on a device is what becomes of them on a processor, in order, and when memory runs out."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.slides.make import Pixels
from udfs.wsi.encoder import Encoder, EncoderSpec
from udfs.wsi.encoder.network import load_network
from udfs.wsi.encoder.pytorch import TorchRuntime
from udfs.wsi.encoder.resize import resize_tensor
from udfs.wsi.inference import Batch, DeviceInference, Encoded, HostInference, inference
from udfs.wsi.quality.histogram import color_histograms_on
from udfs.wsi.quality.pixel_metric import PixelMetric
from udfs.wsi.stain.colour_table import StainNormaliser, lookup
from udfs.wsi.stain.stain_network import StainNet

BINS = 16


@pytest.fixture(scope="module")
def spec(encoder_weights: Path) -> EncoderSpec:
    return EncoderSpec("test_efficientnet", str(encoder_weights), 96, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def stain(tmp_path_factory: pytest.TempPathFactory) -> StainNormaliser:
    torch.manual_seed(5)
    return StainNormaliser(StainNet().eval(), 0, tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def tiles(pixels: Pixels) -> Pixels:
    return np.stack([pixels[900 + 60 * i : 1348 + 60 * i, 800 : 800 + 448] for i in range(10)])


Batches = list[tuple[int, Batch | None]]


def batches(tiles: Pixels, size: int = 4, encoders: Collection[str] | None = None) -> Batches:
    """With gaps between them, as between units."""
    found: Batches = []
    for start in range(0, len(tiles), size):
        found += [(start, Batch(tiles[start : start + size], encoders)), (-start - 1, None)]
    return found


def ran(runs: HostInference | DeviceInference, given: Batches) -> dict[int, Encoded | None]:
    done = list(runs(iter(given)))
    assert [key for key, _ in done] == [key for key, _ in given]
    return dict(done)


def check_same(found: dict[int, Encoded | None], expected: dict[int, Encoded | None]) -> None:
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        given = found[key]
        if wanted is None or given is None:
            assert given is wanted is None
            continue
        np.testing.assert_array_equal(given.histograms, wanted.histograms)
        assert given.embeddings.keys() == wanted.embeddings.keys()
        for name, vectors in wanted.embeddings.items():
            for ours, theirs in zip(given.embeddings[name], vectors, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("interpolation", ["area", "model"])
@pytest.mark.parametrize("stained", [False, True])
@pytest.mark.parametrize("edge", [96, 112, 100])  # of what the model sees: 448 is whole many of the second alone
def test_a_device_gives_what_the_processor_gives(
    spec: EncoderSpec, stain: StainNormaliser, tiles: Pixels, interpolation: Any, stained: bool, edge: int
) -> None:
    encoder = {"e": Encoder(replace(spec, interpolation=interpolation, input_px=edge))}
    normaliser = stain if stained else None
    expected = ran(HostInference(encoder, normaliser, BINS), batches(tiles))
    check_same(ran(DeviceInference(encoder, normaliser, BINS), batches(tiles)), expected)


class MeanRed:
    """A metric of pixels, without being a subclass of `PixelMetric`: those are columns of this process's tables."""

    column = "mean_red"

    def measure(self, tiles: Pixels) -> Any:
        return tiles[..., 0].mean(axis=(1, 2))


@pytest.mark.parametrize("stained", [False, True])
def test_a_device_measures_the_pixels_that_the_processor_measures(
    spec: EncoderSpec, stain: StainNormaliser, tiles: Pixels, stained: bool
) -> None:
    encoder, normaliser, metrics = (
        {"e": Encoder(spec)},
        stain if stained else None,
        cast(list[PixelMetric], [MeanRed()]),
    )
    expected = (stain.net.normalise(tiles) if stained else tiles)[..., 0].mean(axis=(1, 2))
    for kind in (HostInference, DeviceInference):
        done = ran(kind(encoder, normaliser, BINS, metrics), batches(tiles)).values()
        np.testing.assert_allclose(np.concatenate([each.metrics["mean_red"] for each in done if each]), expected)


def test_a_device_works_on_a_batch_while_the_next_is_read(spec: EncoderSpec, tiles: Pixels) -> None:
    log: list[str] = []

    def reading() -> Iterator[tuple[int, Batch | None]]:
        for i in range(3):
            log.append(f"read {i}")
            yield i, Batch(tiles[i : i + 1])

    for key, _ in DeviceInference({"e": Encoder(spec)}, None, BINS)(reading()):
        log.append(f"done {key}")
    assert log == ["read 0", "read 1", "done 0", "read 2", "done 1", "done 2"]


def test_memory_of_a_device_that_runs_out_halves_batches_and_loses_no_tile(spec: EncoderSpec, tiles: Pixels) -> None:
    encoder = Encoder(replace(spec, batch_size=8))
    given = batches(tiles, 8)
    expected = ran(HostInference({"e": encoder}, None, BINS), given)
    assert isinstance(encoder.runtime, TorchRuntime)
    forward, sizes = encoder.runtime.forward, []

    def small(images: torch.Tensor) -> Any:
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(images)

    encoder.runtime.forward = small  # type: ignore[method-assign]
    check_same(ran(DeviceInference({"e": encoder}, None, BINS), given), expected)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert encoder.batch_size == 2  # the next batches are read in this size


@pytest.mark.parametrize("interpolation", ["area", "bicubic"])
def test_every_step_stays_on_the_gpu_that_the_task_has(spec: EncoderSpec, interpolation: str) -> None:
    """By torch's fake tensors, which know devices and shapes but no numbers: a step that went by way of the processor, or by
    the first GPU where the task has the second, fails.
    """
    network = load_network(spec)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with FakeTensorMode():
        gpu = torch.device("cuda", 1)
        tiles = torch.empty(4, 448, 448, 3, dtype=torch.uint8, device=gpu)
        pixels = lookup(torch.empty(2**24, dtype=torch.int32, device=gpu), tiles)
        images = resize_tensor(pixels, 96, interpolation)
        state = {name: torch.empty(shape, dtype=dtype, device=gpu) for name, (shape, dtype) in kinds.items()}
        average, maximum = torch.func.functional_call(network, state, (images,))
        counts = color_histograms_on(pixels, BINS)
        assert {one.device for one in (pixels, images, average, maximum, counts)} == {gpu}
        assert (pixels.shape, images.shape) == ((4, 448, 448, 3), (4, 96, 96, 3))
        assert (average.shape, maximum.shape, counts.shape) == ((4, 256), (4, 256), (4, BINS**3))


@pytest.mark.parametrize("kind", [HostInference, DeviceInference])
def test_several_encoders_give_what_each_gives_alone(
    spec: EncoderSpec, stain: StainNormaliser, tiles: Pixels, kind: Any
) -> None:
    """Of other sizes of images, of vectors and of batches; and only those that a batch is for."""
    specs = {
        "small": spec,
        "large": replace(spec, input_px=112, batch_size=8),
        "pooled": replace(spec, pooling="pooled"),
    }
    encoders = {name: Encoder(one) for name, one in specs.items()}
    together = ran(kind(encoders, stain, BINS), batches(tiles))
    some = ran(kind(encoders, stain, BINS), batches(tiles, encoders=["large", "pooled"]))
    for name, encoder in encoders.items():
        alone = ran(kind({name: encoder}, stain, BINS), batches(tiles))
        for found in (together, some) if name != "small" else (together,):
            for key, expected in alone.items():
                given = found[key]
                if expected is not None and given is not None:
                    for ours, theirs in zip(given.embeddings[name], expected.embeddings[name], strict=True):
                        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [one is None for one in together.values()] == [one is None for one in some.values()]
    assert {tuple(one.embeddings) for one in some.values() if one} == {("large", "pooled")}


def test_tiles_whose_embeddings_are_no_numbers_are_counted(spec: EncoderSpec, tiles: Pixels) -> None:
    average, maximum = Encoder(spec).embed(tiles[:4])
    counts = np.zeros((4, BINS**3), np.int32)
    assert Encoded({"e": (average, maximum)}, counts).n_not_finite("e") == 0
    average[1, 7], maximum[1, 0], maximum[3, 5] = np.nan, np.inf, -np.inf
    assert Encoded({"e": (average, maximum)}, counts).n_not_finite("e") == 2


def test_openvino_stays_on_the_processor(spec: EncoderSpec) -> None:
    encoder = {"e": Encoder(replace(spec, runtime="openvino"))}
    assert isinstance(inference(encoder, None, BINS), HostInference)
    with pytest.raises(TypeError, match="torch"):
        DeviceInference(encoder, None, BINS)
