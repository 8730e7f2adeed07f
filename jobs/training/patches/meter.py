"""The meter: whether loading keeps up with the trainer, t_step > n_batch * t_load / n_parallel, measured per epoch."""

import json
import math
from dataclasses import asdict, dataclass

_MOST_PARALLEL = 256  # workers: more is no useful advice
_HARDLY = 0.1  # of an epoch: a trainer that waits less needs no more workers


@dataclass(frozen=True)
class MeterReading:
    """What an epoch took. Seconds are wall-clock."""

    epoch: int
    n_batch: int  # patches per batch
    n_parallel: int  # workers that load at once
    n_steps: int
    n_patches: int  # in all batches
    n_skipped: int  # of bad slides, if these are skipped
    t_step: float  # mean seconds for which the trainer keeps a batch
    t_load: float  # mean seconds in which one worker loads one patch
    waited_s: float  # that the trainer waited for batches, the first one excluded
    first_batch_s: float  # until the first batch was ready: the shuffle buffer fills
    seconds: float  # of the epoch
    mixing_slides: float  # distinct slides per batch, divided by those of a perfect shuffle
    mixing_units: float | None  # the same for units of neighbouring patches; None if the units are not known

    @property
    def t_batch(self) -> float:
        """Seconds in which all workers together load a batch."""
        return self.n_batch * self.t_load / self.n_parallel

    @property
    def holds(self) -> bool:
        """Whether t_step > n_batch * t_load / n_parallel, so that the trainer need not wait."""
        return self.t_step > self.t_batch

    @property
    def share_waited(self) -> float:
        """Share of the epoch that the trainer waited, the first batch excluded."""
        return self.waited_s / self.seconds if self.seconds else 0.0

    @property
    def enough_parallel(self) -> int | None:
        """The least n_parallel for which `holds` would be true, if workers do not slow each other down; None without a step.

        A trainer that hardly waited needs no more workers, whatever the means are: the buffer was filled in time.
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
        """Returns the fields and what follows from them, in one line of JSON."""
        derived = {"t_batch": self.t_batch, "holds": self.holds, "enough_parallel": self.enough_parallel}
        return json.dumps(asdict(self) | derived)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 10 else f"{seconds:.0f} s"
