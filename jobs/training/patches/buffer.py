"""The pixels of the patches that are on their way or wait for their turn, in memory that processes share and use again."""

import mmap
import os
import tempfile
import weakref

import numpy as np
from numpy.typing import NDArray


class PixelBuffer:
    """Room for some patches. Each goes in once and out once; anything else raises, for it would be a fault of ours."""

    def __init__(self, patches: int, patch_px: int) -> None:
        """Room for so many."""
        self.shape = patches, patch_px, patch_px, 3
        self.descriptor = _nameless(int(np.prod(self.shape)))
        weakref.finalize(self, os.close, self.descriptor)
        self.pixels = mapped(self.descriptor, self.shape)
        self.empty()

    def empty(self) -> None:
        """Forget all patches; nobody may write any more."""
        self._free = list(range(len(self.pixels) - 1, -1, -1))
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
        out[:] = self.pixels[place]
        self._free.append(place)
        return True


def mapped(descriptor: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The file as an array, uint8 of that shape, which all who map it share."""
    return np.frombuffer(mmap.mmap(descriptor, int(np.prod(shape))), np.uint8).reshape(shape)


def _nameless(size: int) -> int:
    """A file of so many bytes that no folder knows: it goes with the last process that has it, however that ends.

    Memory, which no small /dev/shm of a container limits; on systems that can't, a file of the temporary folder. Pages that
    are never written cost nothing; the first write of one costs more than what is written.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("slidelake-patches")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
