"""Whether loading keeps up with the trainer: t_step > n_batch * t_load / n_parallel, measured each epoch. No clock but this."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

_MOST_PARALLEL = 256  # processes: more is no advice
_HARDLY = 0.1  # of an epoch: a trainer that waits less needs no more processes


@dataclass(frozen=True)
class MeterReading:
    """What an epoch took. Seconds are wall-clock."""

    epoch: int
    n_batch: int  # patches a batch
    n_parallel: int  # workers that load at once
    n_steps: int
    n_patches: int  # that came
    n_skipped: int  # of bad slides, where these are skipped
    t_step: float  # mean seconds that the trainer keeps a batch
    t_load: float  # mean seconds in which one worker loads one patch
    waited_s: float  # that the trainer waited for batches, the first of the epoch left out
    first_batch_s: float  # until the first batch was there: the shuffle buffer fills
    seconds: float  # of the epoch
    mixing_slides: float  # distinct slides in a batch, of those in a perfect shuffle's
    mixing_units: float | None  # the same for units of neighbouring patches; None where they are not known

    @property
    def t_batch(self) -> float:
        """Seconds in which all workers together load a batch."""
        return self.n_batch * self.t_load / self.n_parallel

    @property
    def holds(self) -> bool:
        """Whether t_step > n_batch * t_load / n_parallel: the trainer need not wait."""
        return self.t_step > self.t_batch

    @property
    def share_waited(self) -> float:
        """Share of the epoch that the trainer waited, the first batch left out."""
        return self.waited_s / self.seconds if self.seconds else 0.0

    @property
    def enough_parallel(self) -> int | None:
        """The least n_parallel for which it would hold, if a worker more takes nothing from the others; None: no step.

        No more than there are if the trainer hardly waited: then the buffer was filled in time, whatever the means say.
        """
        if self.t_step <= 0:
            return None
        least = math.floor(self.n_batch * self.t_load / self.t_step) + 1
        return least if self.share_waited >= _HARDLY else min(least, self.n_parallel)

    def __str__(self) -> str:
        sign, verdict = (">", "holds") if self.holds else ("<=", "does not hold")
        if self.enough_parallel is None:
            enough = "no step was taken"
        elif self.enough_parallel > _MOST_PARALLEL:
            enough = "no n_parallel would be enough for a trainer that takes no time"
        else:
            is_enough = "is" if self.enough_parallel == self.n_parallel else "would be"
            enough = f"n_parallel {self.enough_parallel} {is_enough} enough"
        by_unit = "" if self.mixing_units is None else f", {self.mixing_units:.2f} by unit"
        skipped = f", {self.n_skipped:,} SKIPPED" if self.n_skipped else ""
        return (
            f"epoch {self.epoch}: t_step {_ms(self.t_step)} {sign} n_batch {self.n_batch} * t_load {_ms(self.t_load)} / "
            f"n_parallel {self.n_parallel} = {_ms(self.t_batch)}: {verdict}; {enough}; the trainer waited {self.waited_s:.1f} s "
            f"({100 * self.share_waited:.0f} %) and {self.first_batch_s:.1f} s for the first batch; {self.n_patches:,} "
            f"patches{skipped}; mixing {self.mixing_slides:.2f} by slide{by_unit}"
        )

    def to_json(self) -> str:
        """All of it in one line."""
        derived = {"t_batch": self.t_batch, "holds": self.holds, "enough_parallel": self.enough_parallel}
        return json.dumps(asdict(self) | derived)


class Meter:
    """The clock of one epoch."""

    def __init__(self) -> None:
        """Begin the epoch."""
        self._begun = self._since = perf_counter()
        self._steps = self._patches = self._loaded = self._skipped = 0
        self._step_s = self._load_s = self._waited_s = self._first_s = 0.0

    def loaded(self, patches: int, seconds: float) -> None:
        """One worker took so long for so many patches."""
        self._loaded += patches
        self._load_s += seconds

    def skipped(self, patches: int) -> None:
        """So many could not be read, and the trainer goes on without them."""
        self._skipped += patches

    def batch_is_there(self, patches: int) -> None:
        """The trainer gets it now."""
        now = perf_counter()
        if self._steps:
            self._waited_s += now - self._since
        else:
            self._first_s = now - self._since
        self._steps += 1
        self._patches += patches
        self._since = now

    def next_is_wanted(self) -> None:
        """The trainer is done with a batch."""
        now = perf_counter()
        self._step_s += now - self._since
        self._since = now

    def read(
        self, epoch: int, n_batch: int, n_parallel: int, mixing_slides: float, mixing_units: float | None
    ) -> MeterReading:
        """The epoch is over."""
        return MeterReading(
            epoch=epoch,
            n_batch=n_batch,
            n_parallel=n_parallel,
            n_steps=self._steps,
            n_patches=self._patches,
            n_skipped=self._skipped,
            t_step=self._step_s / self._steps if self._steps else 0.0,
            t_load=self._load_s / self._loaded if self._loaded else 0.0,
            waited_s=self._waited_s,
            first_batch_s=self._first_s,
            seconds=perf_counter() - self._begun,
            mixing_slides=mixing_slides,
            mixing_units=mixing_units,
        )


def store_reading(path: Path, reading: MeterReading) -> None:
    """Append an epoch to a file of JSON lines."""
    with path.open("a") as file:
        file.write(reading.to_json() + "\n")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 10 else f"{seconds:.0f} s"
