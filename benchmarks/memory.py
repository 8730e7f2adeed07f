"""memory: the most that a worker holds, imports and models included, by each runtime and precision.

Each has two fresh processes, of which the second one finds what the first one made once for the host: the converted model,
StainNet's table (64 MB that are mapped, so the processes of a host share them), the batch size.
"""

import os
import tempfile
from collections.abc import Iterator

from benchmarks.measure import Line, in_fresh_process
from benchmarks.ways import WAYS


def run() -> Iterator[Line]:
    """A line for each."""
    for what in ("encode", "features"):
        for runtime, precision in WAYS:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["SLIDELAKE_CACHE"] = cache
                first, later = (
                    in_fresh_process("benchmarks.memory_process", what, runtime, precision) for _ in range(2)
                )
                del os.environ["SLIDELAKE_CACHE"]
            yield {
                "worker": what,
                "runtime": runtime,
                "precision": precision,
                "peak_mb": later["peak_bytes"] / 1e6,
                "of_which_imports_mb": later["imported_bytes"] / 1e6,
                "first_of_host_peak_mb": first["peak_bytes"] / 1e6,
            }
