"""Patches on the fly on one machine: right pixels, each once, in an order that a seed gives, and bad slides by name."""

import gc
import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from openslide import OpenSlide

from jobs.training.patches import loader as loader_module
from jobs.training.patches.batch import PatchBatch
from jobs.training.patches.loader import PatchLoader, UnitWorkers
from jobs.training.patches.meter import MeterReading
from jobs.training.patches.order import EpochOrder, epoch_order, mixing
from jobs.training.patches.patch_units import Unit
from jobs.training.patches.selection import PatchSpec, SlideSource
from tests.feed.patch_slides import IDS, PATCH_PX, pixels_of, spec_of, write_slides
from udfs.wsi import SlideError
from udfs.wsi.reading.slide import Slide
from udfs.wsi.reading.spacing import resample


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("patches"))


@pytest.fixture(scope="module")
def spec(slides: Path) -> PatchSpec:
    return spec_of(slides)


def said(_: str) -> None:
    """Nobody listens."""


def children() -> list[psutil.Process]:
    """Processes that this one started, workers of a DataLoader among them."""
    found: list[psutil.Process] = psutil.Process().children()
    return found


def numbers(batches: Iterable[PatchBatch]) -> list[int]:
    return [int(patch) for batch in batches for patch in batch.patch]


@pytest.mark.parametrize("n_parallel", [1, 2])
def test_every_patch_comes_once_with_its_own_pixels_key_and_label(spec: PatchSpec, n_parallel: int) -> None:
    loader = PatchLoader(spec, 16, n_parallel=n_parallel, unit_patches=5, buffer_patches=30, say=said)
    whole = [pixels_of(number) for number in range(len(IDS))]
    came = []
    for batch in loader.epoch(0):
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.shape == (len(batch), PATCH_PX, PATCH_PX, 3)
        for i, image_id in enumerate(batch.image_id):
            number, x, y = IDS.index(image_id), int(batch.x_px[i]), int(batch.y_px[i])
            np.testing.assert_array_equal(batch.pixels[i], whole[number][y : y + PATCH_PX, x : x + PATCH_PX])
            assert loader.classes[batch.label[i]] == ("LAA" if number % 2 else "CE")
            came.append((image_id, x, y))
    assert len(came) == len(set(came)) == 100
    assert [len(batch) for batch in loader.epoch(1)] == [16] * 6 + [4]
    assert loader.n_steps == 7


def test_the_order_is_the_seeds_and_the_epochs_whatever_the_workers_and_wherever_it_resumes(spec: PatchSpec) -> None:
    def loader(n_parallel: int = 1, seed: int = 3) -> PatchLoader:
        return PatchLoader(spec, 8, n_parallel=n_parallel, unit_patches=4, buffer_patches=24, seed=seed, say=said)

    one, three = loader(), loader(n_parallel=3)
    first = numbers(one.epoch(0))
    assert first == numbers(three.epoch(0)) == numbers(three.epoch(0)) == one.order(0).patches.tolist()
    assert first[5 * 8 :] == numbers(three.epoch(0, first_step=5))
    assert numbers(one.epoch(0, first_step=13)) == []
    second = numbers(one.epoch(1))
    assert first != second != numbers(loader(seed=4).epoch(1))
    assert sorted(second) == sorted(first) == list(range(100))


def test_patches_at_a_spacing_and_at_a_level_are_the_slides_own(slides: Path, pixels: NDArray[np.uint8]) -> None:
    at_level = PatchLoader(
        spec_of(slides, 16, level=1), 100, n_parallel=1, say=said
    )  # 16 px of the level at 1/4: the same grid
    [batch] = at_level.epoch(0)
    with OpenSlide(slides / "s1.tif") as theirs:
        for i, image_id in enumerate(batch.image_id):
            if image_id == "s1":
                corner = int(batch.x_px[i]), int(batch.y_px[i])
                expected = np.asarray(theirs.read_region(corner, 1, (16, 16)).convert("RGB"))
                np.testing.assert_array_equal(batch.pixels[i], expected)
    at_mpp = PatchLoader(spec_of(slides, 32, mpp=1.0), 100, n_parallel=1, say=said)  # 0.5 um/px halved
    [batch] = at_mpp.epoch(0)
    for i, image_id in enumerate(batch.image_id):
        x, y = int(batch.x_px[i]), int(batch.y_px[i])
        region = pixels_of(IDS.index(image_id))[y : y + 64, x : x + 64]
        np.testing.assert_array_equal(batch.pixels[i], resample(region, 32))


def test_a_bad_slide_ends_the_epoch_by_its_name_or_is_skipped_and_counted(
    spec: PatchSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_slides(tmp_path)
    loaders = {
        choice: PatchLoader(spec_of(folder), 10, n_parallel=1, unit_patches=5, on_bad_slide=choice, say=said)
        for choice in ("raise", "skip")
    }
    slide = folder / "s2.tif"
    slide.write_bytes(slide.read_bytes()[: slide.stat().st_size // 2])  # after its header was read
    with pytest.raises(SlideError, match=r"s2: .*s2\.tif"):
        list(loaders["raise"].epoch(0))
    loader = loaders["skip"]
    came = numbers(loader.epoch(0))
    assert loader.skipped["s2"][0] == 25 == loader.readings[0].n_skipped
    assert set(range(100)) - set(came) == set(range(50, 75))
    assert "s2: 5 patches skipped: file_changed" in capsys.readouterr().err

    (folder / "s3.tif").unlink()
    with pytest.raises(SlideError, match=r"file_truncated: s2: .*s2\.tif .* has [\d,]+ bytes"):
        PatchLoader(spec_of(folder), say=said)
    without = PatchLoader(spec_of(folder), n_parallel=1, on_bad_slide="skip", unit_patches=5, say=said)
    assert sorted(numbers(without.epoch(0))) == list(range(50))
    assert {image_id: patches for image_id, (patches, _) in without.skipped.items()} == {"s2": 25, "s3": 25}


def test_a_patch_that_is_lost_or_doubled_on_the_way_raises(spec: PatchSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(change: Callable[[list[Unit]], list[Unit]]) -> None:
        class Broken(UnitWorkers):
            """Loses or doubles some units."""

            def draw(self, units: Sequence[Unit], *arguments: Any) -> Any:
                return super().draw(change(list(units)), *arguments)

        monkeypatch.setattr(loader_module, "UnitWorkers", Broken)
        list(PatchLoader(spec, 10, unit_patches=5, buffer_patches=100, say=said).epoch(0))

    broken(list)
    with pytest.raises(RuntimeError, match=r"patches came, .* of 100: report it"):
        broken(lambda units: [*units[:3], units[2], *units[4:]])
    with pytest.raises(RuntimeError, match=r"patches came, .* of 100: report it"):
        broken(lambda units: units[:-1])

    def fewer(slide: Slide, xy_px: NDArray[np.int64], *arguments: Any) -> Any:
        return read_tiles(slide, xy_px[:4], *arguments)

    read_tiles = Slide.read_tiles
    monkeypatch.setattr(Slide, "read_tiles", fewer)
    with pytest.raises(RuntimeError, match="4 patches came instead of 5"):
        broken(list)
    monkeypatch.undo()

    def doubled(*arguments: Any) -> EpochOrder:
        planned = epoch_order(*arguments)
        patches = planned.patches.copy()
        patches[-1] = patches[0]
        return EpochOrder(planned.units, patches)

    monkeypatch.setattr(loader_module, "epoch_order", doubled)
    with pytest.raises(
        RuntimeError, match="99 patches came, 99 of them distinct, and 0 were skipped, of 100: report it"
    ):
        list(PatchLoader(spec, 10, n_parallel=1, unit_patches=5, say=said).epoch(0))


def test_an_epoch_that_is_left_early_stops_its_workers(spec: PatchSpec) -> None:
    before = set(children())
    loader = PatchLoader(spec, 4, n_parallel=1, unit_patches=2, buffer_patches=20, say=said)
    epoch = loader.epoch(0)
    next(epoch)
    epoch.close()  # type: ignore[attr-defined]
    assert set(children()) == before
    assert numbers(loader.epoch(0)) == loader.order(0).patches.tolist()
    assert len(loader.readings) == 1


def test_processes_are_kept_from_epoch_to_epoch_and_end_with_the_loader(spec: PatchSpec) -> None:
    before = set(children())
    loader = PatchLoader(spec, 10, say=said)
    list(loader.epoch(0))
    readers = set(children()) - before
    assert len(readers) == 2
    list(loader.epoch(1))
    assert set(children()) - before == readers
    for reader in readers:
        with suppress(RuntimeError):  # torch tells the main thread of any worker that dies
            reader.kill()
            reader.wait()
    two = zip(loader.epoch(0), loader.epoch(1), strict=True)  # at once, and with new processes
    assert sorted(numbers(itertools.chain.from_iterable(two))) == sorted([*range(100), *range(100)])
    loader.close()
    del loader, two
    gc.collect()
    assert set(children()) <= before  # one of an earlier test may end meanwhile


def test_a_process_that_dies_ends_the_epoch_with_a_word_on_it(spec: PatchSpec) -> None:
    before = set(children())
    loader = PatchLoader(spec, 4, unit_patches=2, buffer_patches=8, say=said)
    epoch = loader.epoch(0)
    next(epoch)
    ended = threading.Event()

    def hunt() -> None:
        while not ended.wait(0.01):  # one that dies between two units is only started again
            for reader in set(children()) - before:
                with suppress(psutil.NoSuchProcess):
                    reader.kill()

    hunter = threading.Thread(target=hunt, daemon=True)
    hunter.start()
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* at a unit of s\d.*lower n_parallel"):
        list(epoch)
    ended.set()
    hunter.join()
    gc.collect()  # torch waits for its workers when the error, which knows them, is forgotten
    assert set(children()) == before
    assert len(numbers(loader.epoch(1))) == 100


def test_processes_find_what_the_trainer_finds_and_end_with_one_that_is_killed(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "udfs").mkdir()
    (tmp_path / "udfs/__init__.py").write_text("raise ImportError('of somebody else')")
    script = tmp_path / "scripts/trainer.py"
    script.parent.mkdir()
    script.write_text(
        textwrap.dedent(f"""
        import pathlib, time
        from jobs.training.patches.loader import PatchLoader, UnitWorkers
        from tests.feed.patch_slides import spec_of
        for _ in PatchLoader(spec_of(pathlib.Path({str(slides)!r})), 4, n_parallel=1, buffer_patches=8).epoch(0):
            print("go", flush=True)
            time.sleep(60)
        """)
    )
    trainer = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    try:
        assert trainer.stdout and trainer.stdout.readline()
        [reader] = psutil.Process(trainer.pid).children()
        trainer.kill()
        assert not psutil.wait_procs([reader], timeout=10)[1]  # though nobody has asked for the trainer's status yet
    finally:
        trainer.kill()
        trainer.wait()


def test_a_loader_draws_none_of_the_trainers_random_numbers(spec: PatchSpec) -> None:
    before = torch.get_rng_state()
    assert len(numbers(PatchLoader(spec, 10, n_parallel=1, say=said).epoch(0))) == 100
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trainer_may_change_its_batches(spec: PatchSpec) -> None:
    loader = PatchLoader(spec, 10, n_parallel=1, say=said)
    for batch in loader.epoch(0):
        batch.patch.zero_()
        batch.pixels.zero_()
    assert loader.readings[0].n_patches == 100


def test_mixing_is_one_for_a_perfect_shuffle_and_grows_with_the_buffer() -> None:
    units = [np.arange(start, start + 10) for start in range(0, 4000, 10)]
    slide_of = np.arange(4000) // 40

    def mixed(buffer: int) -> float:
        order = epoch_order(units, buffer, seed=1, epoch=0).patches
        assert sorted(order) == list(range(4000))
        return mixing(slide_of[order], 32)

    random = np.random.default_rng(0)
    perfect = np.mean([mixing(random.permutation(slide_of), 32) for _ in range(5)])
    assert perfect == pytest.approx(1, abs=0.01)
    assert mixing(slide_of, 32) < 0.1
    assert mixed(10) < 0.3 < mixed(100) < mixed(1000)
    assert mixed(4000) == pytest.approx(1, abs=0.02)
    # what the README says of 100 slides of 1,000 patches of 256 px
    for unit, by_slide, by_unit in ((16, 0.97, 0.96), (64, 0.87, 0.85)):
        many = [np.arange(a, min(a + unit, b)) for b in range(1000, 100_001, 1000) for a in range(b - 1000, b, unit)]
        order = epoch_order(many, (512 << 20) // (3 * 256**2), seed=0, epoch=0).patches
        unit_of = np.repeat(np.arange(len(many)), [len(one) for one in many])
        assert mixing(order // 1000, 32) == pytest.approx(by_slide, abs=0.01)
        assert mixing(unit_of[order], 32) == pytest.approx(by_unit, abs=0.01)
    # a batch of 32 out of 100 units: 100 * (1 - 0.99 ** 32) = 27.5 of them, of 27.6 slides of 100 and 31 of 400 units
    assert mixing(np.concatenate([[0] * 16, [1] * 16]), 32) == 1


READING = MeterReading(
    epoch=0, n_batch=32, n_parallel=2, n_steps=10, n_patches=320, n_skipped=0, t_step=0.1, t_load=0.01, waited_s=0.3,
    first_batch_s=0.2, seconds=2.0, mixing_slides=0.95, mixing_units=0.9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("n_parallel", "t_step", "holds", "enough"),
    [(2, 0.1, False, 4), (3, 0.1, False, 4), (4, 0.1, True, 4), (1, 1.0, True, 1)],
)
def test_the_meter_says_whether_loading_keeps_up(n_parallel: int, t_step: float, holds: bool, enough: int) -> None:
    reading = MeterReading(**(vars(READING) | {"n_parallel": n_parallel, "t_step": t_step}))
    assert (reading.holds, reading.enough_parallel) == (holds, enough)
    assert reading.t_batch == pytest.approx(0.32 / n_parallel)
    assert ("does not hold" in str(reading)) != holds


@pytest.mark.parametrize(("waited_s", "enough"), [(5.0, 6), (9.9, 6), (10.0, 107), (80.0, 107)])
def test_more_processes_are_advised_to_a_trainer_that_waits_alone(waited_s: float, enough: int) -> None:
    """Of 100 s, most went into filling the buffer: steps of 3 ms then never wait, whatever the formula says."""
    took = {
        "n_parallel": 6,
        "t_step": 0.003,
        "t_load": 0.01,
        "waited_s": waited_s,
        "first_batch_s": 15.0,
        "seconds": 100.0,
    }
    reading = MeterReading(**(vars(READING) | took))
    assert (reading.holds, reading.enough_parallel) == (False, enough)
    assert f"n_parallel {enough} {'is' if enough == 6 else 'would be'} enough" in str(reading)
    idle = MeterReading(**(vars(READING) | took | {"t_step": 1.0, "waited_s": 0.0}))
    assert idle.enough_parallel == 1  # fewer do


def test_the_meter_flips_as_steps_grow_longer_and_is_stored_each_epoch(spec: PatchSpec, tmp_path: Path) -> None:
    lines: list[str] = []
    file = tmp_path / "meter.jsonl"
    loader = PatchLoader(spec, 10, unit_patches=5, meter_file=file, say=lines.append)
    list(loader.epoch(0))
    for _ in loader.epoch(1):
        time.sleep(0.05)
    fast, slow = (json.loads(line) for line in file.read_text().splitlines())
    assert (fast["epoch"], slow["epoch"], fast["n_batch"], fast["n_parallel"]) == (0, 1, 10, 2)
    assert not fast["holds"] and slow["holds"]
    assert slow["t_step"] >= 0.05 > slow["t_batch"] == pytest.approx(10 * slow["t_load"] / 2)
    assert slow["enough_parallel"] == 1 < fast["enough_parallel"]
    assert slow["n_patches"] == 100 and slow["n_steps"] == 10
    assert "does not hold" in lines[0] and "holds" in lines[1]


def test_memory_is_bounded_by_the_buffer_and_units_on_their_way(spec: PatchSpec) -> None:
    loader = PatchLoader(spec, 10, unit_patches=5, buffer_patches=20, n_parallel=2, say=said)
    assert loader.most_bytes == (20 + (2 * 2 + 2 * 2) * 5) * 3 * PATCH_PX**2
    assert len(numbers(loader.epoch(0))) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_px": [0, 0], "y_px": [0, 0]}, "a has the patch at x 0, y 0 twice"),
        ({"x_px": [0]}, r"x_px has shape \(1,\): must be \(2,\)"),
        ({"mpp": 0.5, "level": 1}, "leave one out"),
        ({"mpp": 250.0}, "mpp = 250.0 must be micrometres per pixel, 0.02 to 20"),
        ({"mpp": float("nan")}, "mpp = nan must be micrometres per pixel"),
        ({"slide": [0, 1]}, "there are 1 slides"),
    ],
)
def test_specs_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    good = {"slides": (SlideSource("a", "a.tif"),), "slide": [0, 0], "x_px": [0, 8], "y_px": [0, 0], "patch_px": 8}
    with pytest.raises(ValueError, match=message):
        PatchSpec(**(good | change))  # type: ignore[arg-type]


def test_a_spec_survives_as_a_table_without_secrets(spec: PatchSpec) -> None:
    signed = SlideSource("a", "https://u:SECRETSECRET@host/a.tif?sig=SECRETSECRET", "CE")
    one = PatchSpec((signed,), np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), 8)
    assert "SECRET" not in repr(one) + str(one.to_table().to_pylist())
    back = PatchSpec.from_table(spec.to_table())
    assert back.fingerprint == spec.fingerprint
    assert back.slides[3].label == "LAA"
    unused = PatchSpec((SlideSource("z", "z.tif"), *spec.slides), spec.slide + 1, spec.x_px, spec.y_px, spec.patch_px)
    assert unused.fingerprint == spec.fingerprint != spec_of(Path(), 32).fingerprint
    two = spec.to_table().set_column(1, "uri", [[f"{i}.tif" for i in range(100)]])
    with pytest.raises(ValueError, match="column uri has several values for one image_id"):
        PatchSpec.from_table(two)
