"""The run's own work for some seconds, for the job doctor: the models, and how fast a task finds tissue and encodes tiles."""

import resource
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pandas as pd
import pyarrow as pa

from udfs.encode_tiles import FeatureSpec, encode_tiles, models_of_this_worker
from udfs.find_tissue import TissueSpec, find_tissue
from udfs.plan_units import plan_units
from udfs.schemas import UNITS

_UNIT_TILES = 64  # few, so that a sample ends when its time is over
_MANY_TILES = 10**6  # a run has many ahead: the sample makes StainNet's table, as the run will


@dataclass(frozen=True)
class Loaded:
    """The models of a worker."""

    host: str
    device: str
    fingerprint: tuple[str, str | None]  # as of `udfs.encode_tiles.Models`


def load(spec: FeatureSpec) -> Loaded:
    """Load the models, to be used by later tasks of this worker; raises what they raise where weights can't be had."""
    models = models_of_this_worker(spec)
    return Loaded(socket.gethostname(), str(models.encoder.device), models.fingerprint)


@dataclass(frozen=True)
class SeenSlide:
    """A slide whose tissue was looked for."""

    seconds: float
    n_bytes: int  # read of it for that
    n_tiles: int
    size_bytes: int  # of its file
    error: str = ""
    too_small: str = ""  # why no tile fits on it


@dataclass
class Sample:
    """What one task did."""

    slides: list[SeenSlide] = field(default_factory=list)
    n_tiles: int = 0  # encoded
    seconds: float = 0.0  # that took, with the models loaded
    n_bytes: int = 0  # read for that
    dim: int = 0  # of an embedding
    peak_bytes: int = 0  # memory of this worker, at most
    errors: list[str] = field(default_factory=list)


def take_sample(
    slides: Sequence[tuple[str, float | None]], tissue: TissueSpec, features: FeatureSpec, seconds: float
) -> Sample:
    """Find tissue on each slide and encode tiles of it, as the stages slides and features do, for so many seconds in all.

    What a worker does once (loading models, the first batches) is not in them; what was begun when they are over is ended.

    Args:
        slides: URI and um/px of the CSV (None: the header's) of each.
        tissue: settings of the slides pass.
        features: settings of the features pass.
        seconds: shared out evenly over the slides.
    """
    sample = Sample()
    encode = encode_tiles(features, "doctor", tiles_ahead=_MANY_TILES)
    is_warm = False
    for uri, mpp in slides:
        begun = time.monotonic()
        looked = next(iter(find_tissue(tissue, "doctor")([_as_input(uri, mpp)])))
        found = cast(dict[str, Any], looked.iloc[0].to_dict())
        taken = time.monotonic() - begun
        read = found["work"]["bytes"] if found["work"] else 0
        said = found["error_message"] or ""
        error, too_small = ("", said) if found["status"] == "too_small" else (said, "")
        size = 0 if error else int(found["size_bytes"] or 0)
        sample.slides.append(SeenSlide(taken, read, found["n_tiles"] or 0, size, error, too_small))
        if found["status"] != "ok":
            continue
        units = _units(found | {"uri": uri, "tile_px": tissue.tile_px})
        if not is_warm:
            for _ in encode(units[:1]):
                pass
            is_warm = True
        _encode(sample, encode, units, max(0.0, seconds / len(slides) - taken))
    sample.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sample


def _encode(sample: Sample, encode: Any, units: Sequence[pa.RecordBatch], seconds: float) -> None:
    """Encode unit after unit until the time is over, at least one."""
    begun = time.monotonic()

    def in_time() -> Iterator[pa.RecordBatch]:
        for unit in units:
            yield unit
            if time.monotonic() - begun >= seconds:
                return

    for batch in encode(in_time()):
        if batch["x_px"].null_count == 0:
            sample.dim = len(batch["embedding_avg"][0])
            continue
        [end] = batch.to_pylist()  # how a unit went
        sample.n_tiles += end["n_tiles"]
        sample.n_bytes += end["work"]["bytes"] if end["work"] else 0
        if end["error_message"]:
            sample.errors.append(end["error_message"])
    sample.seconds += time.monotonic() - begun


def _as_input(uri: str, mpp: float | None) -> pd.DataFrame:
    row = {"image_id": "sample", "patient_id": "sample", "uri": uri, "mpp": mpp, "params_hash": ""}
    return pd.DataFrame([row], dtype=object)


def _units(found: dict[str, Any]) -> list[pa.RecordBatch]:
    """Work units of a slide, a batch each."""
    names = [name for name in UNITS.names if name not in ("unit", "n_tiles", "n_bytes", "cost")]
    slide = pa.RecordBatch.from_pylist(
        [{name: found[name] for name in names}], UNITS.empty_table().select(names).schema
    )
    [planned] = plan_units(_UNIT_TILES)([slide])
    return [planned.slice(row, 1) for row in range(planned.num_rows)]
