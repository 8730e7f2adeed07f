"""The leakage gate: what is the same slide under two names is named, whatever its times say; what only looks alike passes."""

from pathlib import Path

import numpy as np
import pytest

from jobs.training.leakage import Compared, LeakageError, SlideFile, refuse_leaks
from udfs.wsi.store import File

SPLITS = [("p1", "train"), ("p2", "test"), ("p3", "train")]
MB = 1 << 20


def slide(image_id: str, patient_id: str, path: Path, data: bytes | None = None) -> SlideFile:
    if data is not None:
        path.write_bytes(data)
    info = File(str(path)).info
    return SlideFile(image_id, patient_id, str(path), info.size_bytes, info.version)


def noise(seed: int, size: int = 3 * MB) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def test_slides_that_differ_pass_and_only_those_of_equal_size_are_opened(tmp_path: Path) -> None:
    slides = [
        slide("a", "p1", tmp_path / "a", noise(1)),
        slide("b", "p2", tmp_path / "b", noise(2)),
        slide("c", "p3", tmp_path / "c", noise(1, MB)),
        slide("d", "nobody", tmp_path / "d", noise(1)),  # of no split
    ]
    assert refuse_leaks(SPLITS, slides) == Compared(images=3, opened=2, unreadable=0)


def test_a_patient_in_two_splits_is_named() -> None:
    with pytest.raises(LeakageError, match=r"1 patients are in two splits: p1 \(test and train\)"):
        refuse_leaks([*SPLITS, ("p1", "test"), ("p2", "test")], [])


@pytest.mark.parametrize("size", [1, 100_000, 3 * MB])
def test_a_copy_is_named_whatever_its_name_and_time(tmp_path: Path, size: int) -> None:
    slides = [
        slide("a", "p1", tmp_path / "a", noise(1, size)),
        slide("b", "p2", tmp_path / "b", noise(1, size)),
        slide("c", "p3", tmp_path / "c", noise(1, size)),
    ]
    assert len({file.file_version for file in slides}) == 3
    with pytest.raises(LeakageError) as caught:
        refuse_leaks(SPLITS, slides)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(
        "1 slides are in two splits under two names: a (patient p1, train) is b (patient p2, test) is c "
    )
    assert f"by content ({size:,} bytes)" in line and "give both rows one patient_id" in line
    refuse_leaks(SPLITS, [slides[0], slides[2]])  # both in train


def test_one_uri_under_two_names_is_named(tmp_path: Path) -> None:
    slides = [slide("a", "p1", tmp_path / "a", noise(1)), slide("b", "p2", tmp_path / "a")]
    with pytest.raises(LeakageError, match=r"a \(patient p1, train\) is b \(patient p2, test\) by its URI .*/a"):
        refuse_leaks(SPLITS, slides)


def test_files_that_a_query_tells_apart_are_two_though_the_table_has_no_query() -> None:
    same = "https://store/api/file"
    slides = [SlideFile("a", "p1", same, 700, "700-x1"), SlideFile("b", "p2", same, 900, "900-x2")]
    refuse_leaks(SPLITS, slides)


@pytest.mark.parametrize("where", [0, MB, MB + 100_000, 2 * MB - 1, 3 * MB - 1])
def test_a_single_byte_tells_slides_apart_wherever_it_is(tmp_path: Path, where: int) -> None:
    """Also between the blocks that are looked at first, as in uncompressed slides that are white for the most part."""
    other = bytearray(noise(1))
    other[where] ^= 1
    slides = [slide("a", "p1", tmp_path / "a", noise(1)), slide("b", "p2", tmp_path / "b", bytes(other))]
    assert refuse_leaks(SPLITS, slides).opened == 2


def test_equal_etags_say_the_same_file_and_equal_times_do_not(tmp_path: Path) -> None:
    def both(version: str) -> list[SlideFile]:
        return [SlideFile(name, patient, f"s3://b/{name}", 7, f"7-{version}") for name, patient in SPLITS_OF.items()]

    for version in ("9b2cf535f27731c974343645a3985328", "9b2cf535f27731c974343645a3985328-12", "0x8DC0FFEE"):
        with pytest.raises(LeakageError, match="by size and etag 7-"):
            refuse_leaks(SPLITS, both(version))
    for version in ("1764117012.25", "2026-11-26 00:50:12+00:00", "Thu, 26 Nov 2026 00:50:12 GMT"):
        local = [
            SlideFile(s.image_id, s.patient_id, str(tmp_path / "gone" / s.image_id), 7, s.file_version)
            for s in both(version)
        ]
        assert refuse_leaks(SPLITS, local) == Compared(images=2, opened=0, unreadable=2)


SPLITS_OF = {"a": "p1", "b": "p2"}
