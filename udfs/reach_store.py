"""Whether an executor reaches the store, for the job doctor: it reads a range of a slide. Imports no model."""

import socket
import time
from dataclasses import dataclass

from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import File, StorageOptions

_RANGE_BYTES = 65_536


@dataclass(frozen=True)
class Reached:
    """The result of reading from a slide."""

    host: str
    n_bytes: int = 0
    seconds: float = 0.0  # from the first request to the last byte
    error: ErrorCode | None = None
    message: str = ""  # of the error, with the remedy and without secrets


def read_range(uri: str, storage_options: StorageOptions) -> Reached:
    """Reads the first bytes of a slide, as many as a small block has."""
    host, begun = socket.gethostname(), time.perf_counter()
    try:
        file = File(uri, storage_options)
        try:
            [data] = file.ranges([0], [min(_RANGE_BYTES, file.info.size_bytes)])
        finally:
            file.close()
    except SlideError as error:
        return Reached(host, error=error.code, message=error.message)
    return Reached(host, len(data), time.perf_counter() - begun)
