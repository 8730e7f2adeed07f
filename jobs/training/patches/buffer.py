"""The pixels of the patches that are on their way or wait for their turn, in memory that processes share and use again."""

import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_SHARED_MEMORY = Path("/dev/shm")  # a file system in memory, where there is one


class SharedPixels:
    """uint8 [patches, patch_px, patch_px, 3] in a file that is mapped into memory. Pickled, it is the file's path: whoever
    unpickles it has the same memory.
    """

    def __init__(self, patches: int, patch_px: int) -> None:
        """Take the memory.

        Raises:
            OSError: there is not enough.
        """
        self._shape = patches, patch_px, patch_px, 3
        in_memory = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
        descriptor, self._path = tempfile.mkstemp(prefix="slidelake-", dir=_SHARED_MEMORY if in_memory else None)
        try:
            self._take(descriptor, in_memory)
            self.pixels = self._mapped(descriptor)
        except BaseException:
            self.forget_path()
            raise
        finally:
            os.close(descriptor)

    def __reduce__(self) -> tuple[Callable[..., "SharedPixels"], tuple[object, ...]]:
        return _attach, (self._path, self._shape)

    def forget_path(self) -> None:
        """All who share the memory have it: it goes with the last of them, however they end."""
        with suppress(FileNotFoundError):
            Path(self._path).unlink()

    def _take(self, descriptor: int, in_memory: bool) -> None:
        size = int(np.prod(self._shape))
        os.ftruncate(descriptor, size)
        if not hasattr(os, "posix_fallocate"):  # macOS
            return
        try:
            os.posix_fallocate(descriptor, 0, size)  # else a full /dev/shm would end the process by a signal
        except OSError as error:
            where = f"{_SHARED_MEMORY} (in a container: --shm-size, or a volume there)" if in_memory else "the disk"
            raise OSError(
                error.errno,
                f"no room for {size / 1e6:,.0f} MB of patches in {where}: make it larger or buffer_patches smaller",
            ) from None

    def _mapped(self, descriptor: int) -> NDArray[np.uint8]:
        size = int(np.prod(self._shape))
        return np.frombuffer(mmap.mmap(descriptor, size), np.uint8).reshape(self._shape)


def _attach(path: str, shape: tuple[int, int, int, int]) -> SharedPixels:
    shared = object.__new__(SharedPixels)
    shared._path, shared._shape = path, shape
    descriptor = os.open(path, os.O_RDWR)
    try:
        shared.pixels = shared._mapped(descriptor)
    finally:
        os.close(descriptor)
    return shared


class PixelBuffer:
    """Room for some patches. Each goes in once and out once; anything else raises, for it would be a fault of ours."""

    def __init__(self, patches: int, patch_px: int) -> None:
        """Room for so many."""
        self.shared = SharedPixels(patches, patch_px)
        self.empty()

    def empty(self) -> None:
        """Forget all patches; nobody may write any more."""
        self._free = list(range(len(self.shared.pixels) - 1, -1, -1))
        self._place: dict[int, int] = {}  # by number of the patch; -1: it is skipped

    def __contains__(self, patch: int) -> bool:
        return patch in self._place

    def reserve(self, patches: int) -> NDArray[np.int64]:
        """Places for patches that are going to be written: int64 [m]."""
        return np.array([self._free.pop() for _ in range(patches)], np.int64)

    def put(self, patches: NDArray[np.int64], places: NDArray[np.int64], *, written: bool) -> None:
        """The patches int64 [m] are at their places, int64 [m]; not `written`: they are skipped."""
        for patch, place in zip(patches.tolist(), places.tolist(), strict=True):
            if patch in self._place:
                raise RuntimeError(f"patch {patch} came twice: report it")
            self._place[patch] = place if written else -1
            if not written:
                self._free.append(place)

    def move_to(self, patch: int, out: NDArray[np.uint8]) -> bool:
        """Write the pixels of a patch to `out`, uint8 [patch_px, patch_px, 3], and forget it; False where it is skipped."""
        place = self._place.pop(patch)
        if place < 0:
            return False
        out[:] = self.shared.pixels[place]
        self._free.append(place)
        return True
