"""What a run counts, times and meets, for its summary and its row in table runs."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from typing import Any

from pyspark.sql import Row

from udfs.schemas import RUNS
from udfs.wording import new_run_id, package_versions

_PACKAGES = ["slidelake", "delta-spark", "pyarrow", "torch", "timm", "openvino", "tifffile", "simplejpeg"]


@dataclass(frozen=True)
class Work:
    """What workers did, as `udfs.schemas.WORK`."""

    requests: int = 0
    bytes: int = 0
    waited_s: float = 0.0
    decoded_s: float = 0.0
    encoded_s: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Record:
    """What is recorded of one run."""

    run_id: str = field(default_factory=new_run_id)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    counts: Counter[str] = field(default_factory=Counter)
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage
    reads: dict[tuple[str, str], tuple[int, Work]] = field(default_factory=dict)  # file size, by image_id and stage
    problems: list[str] = field(default_factory=list)  # one line for each problem that is not a slide's fault

    def count_work(self, stage: str, rows: Iterable[Row]) -> None:
        """Add the work that workers report; rows have image_id, size_bytes and work, null if unread."""
        for row in rows:
            if row.work:
                _, before = self.reads.get((row.image_id, stage), (0, Work()))
                self.reads[row.image_id, stage] = row.size_bytes, before + Work(*row.work)

    def work(self) -> dict[str, Work]:
        """Return what all workers did, by stage."""
        sums: dict[str, Work] = {}
        for (_, stage), (_, work) in sorted(self.reads.items()):
            sums[stage] = sums.get(stage, Work()) + work
        return sums

    def row(self, **others: Any) -> tuple[Any, ...]:
        """Return the row of table runs of a run that ends now; `others` are the columns that this object does not know."""
        row = others | {
            "run_id": self.run_id,
            "started_at": self.started_at,
            "finished_at": datetime.now(UTC),
            "versions": package_versions(_PACKAGES) | others["versions"],
            "counts": dict(self.counts),
            "timings": dict(self.timings),
            "reads": [
                (*of, size, work.requests, work.bytes, work.waited_s) for of, (size, work) in sorted(self.reads.items())
            ],
            "work": {stage: astuple(work) for stage, work in self.work().items()},
        }
        return tuple(row[name] for name in RUNS.names)
