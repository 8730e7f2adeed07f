"""StainNet by table: it maps one colour to one colour, so 2^24 numbers replace it.

The table of a checkpoint is a file of the cache: built once, mapped by all processes of a host.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from udfs.wsi.host_cache import cache_folder, make_once
from udfs.wsi.quality.colours import COLOURS, STRIP_PX, rgb, strips
from udfs.wsi.stain.stain_network import StainNet

_LAYOUT = 1  # of the file: raise it when it changes or StainNet.normalise begins to give other pixels
_PAYS_TILES = 110  # of 448 px: building maps as many pixels as 84 of them have, each colour once, and writes the file

Table = NDArray[np.uint32]
"""uint32 [2**24]: at ``r | g << 8 | b << 16`` the colour that it becomes, in the same form."""


class StainNormaliser:
    """Normalises pixels by table if there is one or if it pays, else by StainNet itself: the pixels are the same."""

    def __init__(self, net: StainNet, tiles_ahead: int = 0, folder: Path | None = None) -> None:
        """Builds nothing yet. `folder` is that of the tables, None for `cache_folder`.

        `tiles_ahead` is how many tiles of 448 px this host is going to normalise, as far as known; many pay for a table.
        """
        self.net, self.tiles_ahead, self._folder = net, tiles_ahead, folder
        self._name = f"stainnet-{net.fingerprint}-v{_LAYOUT}.table"
        self._table: Table | None = None
        self._on: dict[str, torch.Tensor] = {}  # by device
        self._is_shared = True

    def normalise(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the pixels, uint8 [..., 3], that `StainNet.normalise` gives.

        The first process for which a table pays builds it; the others do not wait for it. A warning says once if it cannot be
        kept.
        """
        if self._table is None and self._is_shared:
            self._table = self._shared(build=self.tiles_ahead >= _PAYS_TILES, wait=False)
        return self.net.normalise(tiles) if self._table is None else _looked_up(self._table, tiles)

    def table_on(self, device: torch.device | str) -> torch.Tensor:
        """Returns the table for `lookup`, int32 [2**24] on a device; built if missing, in memory if it cannot be kept."""
        if (key := str(device)) not in self._on:
            table = self._table if self._table is not None else self._shared(build=True, wait=True)
            if table is None:
                table = np.concatenate(list(_strips_of_table(self.net)))
            self._on[key] = torch.tensor(table.view(np.int32), device=device)
        return self._on[key]

    def _shared(self, *, build: bool, wait: bool) -> Table | None:
        """Returns the table that the processes of this host share; None if none exists, or another process is building it."""
        try:
            path = (self._folder or cache_folder()) / self._name
            if (table := map_table(path)) is None and build:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists() and map_table(path) is None:  # of another size
                    path.unlink(missing_ok=True)
                make_once(path, lambda unfinished: _write(unfinished, self.net), wait=wait)
                table = map_table(path)
        except OSError as error:
            self._is_shared = False
            warnings.warn(
                f"the table of StainNet's colours cannot be kept ({error}), so that normalising takes longer: "
                "name a folder with room for 64 MB in SLIDELAKE_CACHE",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        return table


def lookup(table: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Normalises pixels by table (`StainNormaliser.table_on`) on the device that both are on: uint8 [..., 3] to the same."""
    r, g, b = tiles.int().unbind(-1)
    packed = table[r | g << 8 | b << 16]
    return packed[..., None].view(torch.uint8)[..., :3]


def map_table(path: Path) -> Table | None:
    """Returns the table in a file, mapped read-only; None if there is no whole one."""
    try:
        if path.stat().st_size == 4 * COLOURS:
            return np.asarray(np.memmap(path, "<u4", mode="r"))
    except FileNotFoundError:
        pass
    return None


def _looked_up(table: Table, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    result = np.empty(tiles.shape, np.uint8)
    pixels = result.reshape(-1, 3)
    packed = np.empty(STRIP_PX, "<u4")
    start = 0
    for colours in strips(tiles):
        found = packed[: len(colours)]
        np.take(table, colours, out=found, mode="wrap")  # all are in it: this mode alone neither checks nor copies
        for channel in range(3):  # one byte three times takes a quarter of the time of three bytes once
            pixels[start : start + len(colours), channel] = found.view(np.uint8)[channel::4]
        start += len(colours)
    return result


def _strips_of_table(net: StainNet) -> Iterator[Table]:
    for first in range(0, COLOURS, STRIP_PX):
        packed = np.zeros((STRIP_PX, 4), np.uint8)
        packed[:, :3] = net.normalise(rgb(first, first + STRIP_PX))
        yield packed.view("<u4")[:, 0]


def _write(path: Path, net: StainNet) -> None:
    with path.open("wb") as file:
        file.writelines(strip.tobytes() for strip in _strips_of_table(net))
