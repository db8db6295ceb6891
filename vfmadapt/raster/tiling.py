"""Tiles over a raster and how their predictions are blended.

The grid is anchored at pixel (0, 0) of the raster, so a pixel's tiles do not depend on how far the raster goes on.
Every tile is weighted by a window that is > 0 everywhere (also on the raster's outer frame); weighted sums are divided
by the sum of weights.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError


@dataclass(frozen=True)
class TileGrid:
    """Square tiles of `tile` pixels that overlap by `overlap`, over `height` x `width` pixels.

    The last row and column of tiles may hang over the raster's edge. Raises UserError for sizes that make no grid.
    """

    height: int
    width: int
    tile: int
    overlap: int

    def __post_init__(self) -> None:
        if self.tile < 1 or not 0 <= self.overlap < self.tile:
            raise UserError(
                f"tile={self.tile} overlap={self.overlap} makes no grid; allowed: tile >= 1 and 0 <= overlap < tile, "
                "for instance tile=256 overlap=64"
            )

    @property
    def stride(self) -> int:
        """Pixels from one tile to the next."""
        return self.tile - self.overlap

    @property
    def rows(self) -> range:
        """First pixel row of each row of tiles."""
        return self._starts(self.height)

    @property
    def columns(self) -> range:
        """First pixel column of each column of tiles."""
        return self._starts(self.width)

    def _starts(self, size: int) -> range:
        count = max(1, -(-(size - self.overlap) // self.stride))
        return range(0, count * self.stride, self.stride)


def window(tile: int, overlap: int) -> NDArray[np.float32]:
    """Weights (tile, tile) of a tile: raised-cosine ramps over the overlap, 1 in the middle, > 0 everywhere.

    Where overlap <= tile / 2 the windows of a grid sum to 1 by themselves inside (sin^2 + cos^2); `RowBlender` divides
    by their sum everywhere.
    """
    distance = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5  # to the tile's edge, from pixel centres
    ramp = np.sin(0.5 * np.pi * np.minimum(distance / max(overlap, 1), 1.0)) ** 2 if overlap else np.ones(tile)
    return np.outer(ramp, ramp).astype(np.float32)


def pad_to_tile(array: NDArray[np.generic], tile: int) -> NDArray[np.generic]:
    """Extend (..., h, w) at the bottom and right to (..., tile, tile) by reflection; a single row is repeated."""
    missing = [(0, tile - size) for size in array.shape[-2:]]
    if not any(after for _, after in missing):
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 2) + missing, mode="reflect")


class RowBlender:
    """Blends the tiles of a grid row by row: float32 sums over one row of tiles only, finished rows leave at once.

    Memory: (classes + 1) x tile x width x 4 bytes, whatever the height. The order of addition is that of the grid, so
    the sums do not depend on how tiles were batched.
    """

    def __init__(self, grid: TileGrid, classes: int) -> None:
        self._grid = grid
        self._weights = window(grid.tile, grid.overlap)
        span = len(grid.columns) * grid.stride + grid.overlap  # the last column hangs over
        self._sums = np.zeros((classes, grid.tile, span), dtype=np.float32)
        self._total = np.zeros((grid.tile, span), dtype=np.float32)

    def add(self, column: int, logits: NDArray[np.float32]) -> None:
        """Add a tile, (K, tile, tile), of the present row of tiles, whose first pixel column is `column`."""
        at = slice(column, column + self._grid.tile)
        self._sums[:, :, at] += logits * self._weights
        self._total[:, at] += self._weights

    def finish_row(self, first: int) -> NDArray[np.float32]:
        """End the row of tiles that starts at pixel row `first`.

        Returns:
            The logits of all rows of pixels that no later tile touches, (K, h, W); 0 where no tile was added.
        """
        grid = self._grid
        last = first == grid.rows[-1]
        done = min(grid.height - first, grid.tile if last else grid.stride)
        total = self._total[:done, : grid.width].copy()
        total[total == 0] = 1
        out = self._sums[:, :done, : grid.width] / total
        for sums in (*self._sums, self._total):
            sums[: grid.overlap] = sums[grid.stride :].copy()
            sums[grid.overlap :] = 0
        return out
