"""How the features pass reads work units: by their index, one ahead, and closed whatever happens."""

import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from tests.arrow.units import CORNERS, encode, indexed, unit
from udfs.encode_tiles import FeatureSpec, encode_tiles
from udfs.wsi import open_slide


def test_progress_counts_tiles(spec: FeatureSpec, small_slides: Path) -> None:
    counted: list[int] = []
    batch = pa.RecordBatch.from_pylist([unit(small_slides / "c1.tif", np.array([[0, 0], [448, 0], [896, 0]]))])
    list(encode_tiles(spec, "run", counted.append)([batch]))
    assert sum(counted) == 3


def test_with_an_index_no_header_is_read_and_the_rows_are_the_same(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [small_slides / f"{name}.tif" for name in ("a1", "a2", "b1", "d1")]
    units = [indexed(path, CORNERS) for path in paths]
    expected, ends = encode(spec, *(unit(path, CORNERS) for path in paths))
    monkeypatch.setattr("udfs.wsi.reading.slide.read_index", None)  # to call it would be an error
    rows, ends_by_index = encode(spec, *units)
    assert rows == expected
    for end, by_index in zip(ends, ends_by_index, strict=True):
        assert by_index["work"]["bytes"] < end["work"]["bytes"]


def test_an_index_of_another_version_is_passed_over(spec: FeatureSpec, small_slides: Path) -> None:
    row = indexed(small_slides / "a1.tif", CORNERS)
    row["index"] = zlib.compress(zlib.decompress(row["index"]).replace(b'"format": 1', b'"format": 9'))
    rows, [end] = encode(spec, row)
    assert (len(rows), end["error_code"]) == (len(CORNERS), None)


class Watched:
    """Stands in for `open_slide`; logs when tiles of a slide are asked for and when it is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.open = 0
        self.most_open = 0
        monkeypatch.setattr("udfs.encode_tiles.open_slide", self._open_slide)

    def _open_slide(self, uri: str, *arguments: Any, **options: Any) -> Any:
        slide: Any = open_slide(uri, *arguments, **options)
        name = Path(uri).stem
        read_tiles, close = slide.read_tiles, slide.close
        self.open += 1
        self.most_open = max(self.most_open, self.open)

        def reading(*of: Any) -> Any:
            self.log.append(f"ask {name}")
            return read_tiles(*of)

        def closing() -> None:
            self.open -= 1
            self.log.append(f"close {name}")
            close()

        slide.read_tiles, slide.close = reading, closing
        return slide


def test_the_next_unit_is_asked_for_before_this_one_is_encoded_and_at_most_two_are_open(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [indexed(small_slides / f"{name}.tif", CORNERS) for name in ("a1", "a2", "b1", "d1")]
    watched = Watched(monkeypatch)
    batches = (pa.RecordBatch.from_pylist([row]) for row in units)  # units come in any number of batches
    for batch in encode_tiles(spec, "run")(batches):
        ended = batch["x_px"][0].as_py() is None
        watched.log.append(f"{'end' if ended else 'tiles'} {batch['image_id'][0].as_py()}")
    seen = list(dict.fromkeys(watched.log))
    assert seen[:7] == ["ask a1", "ask a2", "tiles a1", "end a1", "close a1", "ask b1", "tiles a2"]
    assert seen[-3:] == ["tiles d1", "end d1", "close d1"]
    assert (watched.most_open, watched.open) == (2, 0)


def test_whatever_ends_a_task_closes_what_it_opened(
    spec: FeatureSpec, small_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [indexed(small_slides / f"{name}.tif", CORNERS) for name in ("a1", "a2", "b1")]
    batch = pa.RecordBatch.from_pylist(units)
    watched = Watched(monkeypatch)
    stopped = cast(Generator[pa.RecordBatch, None, None], encode_tiles(spec, "run")([batch]))
    next(stopped)
    assert watched.open == 2
    stopped.close()
    assert watched.open == 0

    def exhausted(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("udfs.wsi.inference.color_histograms", exhausted)
    with pytest.raises(MemoryError):  # Spark tries the task again
        list(encode_tiles(spec, "run")([batch]))
    assert watched.open == 0
