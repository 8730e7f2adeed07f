"""The pixels of the patches that are waiting for their turn, in memory that is taken once."""

import numpy as np
from numpy.typing import NDArray


class PixelBuffer:
    """Room for some patches. Each goes in once and out once; anything else raises, for it would be a fault of ours."""

    def __init__(self, patches: int, patch_px: int) -> None:
        """Room for so many."""
        # pages that are never written cost nothing
        self._pixels = np.empty((patches, patch_px, patch_px, 3), np.uint8)
        self._free = list(range(patches - 1, -1, -1))
        self._place: dict[int, int] = {}  # by number of the patch; -1: it is skipped

    def __contains__(self, patch: int) -> bool:
        return patch in self._place

    def put(self, patches: NDArray[np.int64], pixels: NDArray[np.uint8] | None) -> None:
        """Take patches in: int64 [m] and uint8 [m, patch_px, patch_px, 3], None for patches that are skipped."""
        if pixels is not None and len(pixels) != len(patches):
            raise RuntimeError(f"{len(pixels)} patches came instead of {len(patches)}: report it")
        for i, patch in enumerate(patches.tolist()):
            if patch in self._place:
                raise RuntimeError(f"patch {patch} came twice: report it")
            if pixels is None:
                self._place[patch] = -1
                continue
            self._place[patch] = self._free.pop()
            self._pixels[self._place[patch]] = pixels[i]

    def move_to(self, patch: int, out: NDArray[np.uint8]) -> bool:
        """Write the pixels of a patch to `out`, uint8 [patch_px, patch_px, 3], and forget it; False where it is skipped."""
        place = self._place.pop(patch)
        if place < 0:
            return False
        out[:] = self._pixels[place]
        self._free.append(place)
        return True
