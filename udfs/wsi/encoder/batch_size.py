"""The batch size of an encoder, measured once per host: the smallest that is about as fast as any."""

import json
import time
from collections.abc import Callable

from udfs.wsi.host_cache import cache_folder, make_once

_WORTHWHILE = 1.05  # how many times as fast a larger batch must be: it takes more memory, and results wait for it
_PATIENCE = 2  # doublings that bring nothing, after which none will
_TRIALS, _TILES_TRIED = 3, 16  # at least so many batches, and tiles, for the shortest of their times to be a good one
_LONG_S = (
    1.0  # a batch that takes so long is run no more often, and a larger one brings nothing: calls cost milliseconds
)
_SIGNS = (
    "out of memory",
    "cannot allocate memory",
    "alloc_failed",
)  # of CUDA, of PyTorch on a processor, of cuBLAS and cuDNN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: torch's own error on GPUs, a RuntimeError by its text on CPUs and in OpenVINO."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def measured_batch_size(run: Callable[[int], object], smallest: int, most: int, key: str) -> int:
    """The batch size to use.

    It is doubled as long as it fits into memory, takes less than a second, and two doublings make tiles at least 5 % faster.
    What was found is kept for the processes and runs to come on this host, so that they all calculate alike to the last bit.

    Args:
        run: runs a batch of a size and returns when it is done.
        smallest: to begin with.
        most: no more than this.
        key: names what is measured: two of the same share the result.
    """
    try:
        path = cache_folder() / f"batch-size-{key}.json"
        make_once(path, lambda unfinished: unfinished.write_text(json.dumps(_find(run, smallest, most))))
        return int(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # no place to keep it, or somebody wrote something else there
        return _find(run, smallest, most)


def _find(run: Callable[[int], object], smallest: int, most: int) -> int:
    best, rate, size, in_vain = smallest, 0.0, smallest, 0
    while size <= most and in_vain < _PATIENCE:
        try:
            spent = _seconds(run, size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            if rate:
                break
            best = most = size = size // 2  # even the smallest is too large
            continue
        in_vain += 1
        if size / spent >= rate * _WORTHWHILE:
            best, rate, in_vain = size, size / spent, 0
        if spent >= _LONG_S:
            break
        size *= 2
    return best


def _seconds(run: Callable[[int], object], size: int) -> float:
    """The shortest of some trials, after one that does not count."""
    run(size)
    times: list[float] = []
    while len(times) < max(_TRIALS, _TILES_TRIED // size) and sum(times) < _LONG_S:
        start = time.perf_counter()
        run(size)
        times.append(time.perf_counter() - start)
    return min(times)
