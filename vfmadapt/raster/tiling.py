"""Tiles over a raster and how their predictions are blended.

The grid is anchored at pixel (0, 0) of the raster, so a pixel's tiles do not depend on how far the raster goes on.
Every tile is weighted by a window that is > 0 everywhere (also on the raster's outer frame); where scores are wanted,
weighted sums are divided by the sum of weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError

_LEAST = 1e-8  # weight at a tile's edge: lost in float32 beside another tile's 1, yet > 0 at the raster's frame
_STRIP = 32  # rows at a time that are compared class by class: they stay in the processor's cache


@dataclass(frozen=True)
class Area:
    """A rectangle of pixels."""

    row: int
    column: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The first row beneath."""
        return self.row + self.height

    @property
    def right(self) -> int:
        """The first column to the right."""
        return self.column + self.width

    def cut(self, other: "Area") -> "Area":
        """What both have in common; without any, height or width is <= 0."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        height, width = min(self.bottom, other.bottom) - row, min(self.right, other.right) - column
        return Area(row, column, height, width)


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

    def rows_over(self, start: int, stop: int) -> range:
        """First pixel row of each row of tiles that touches the pixel rows `start` to `stop` - 1."""
        return self._over(self.rows, start, stop)

    def columns_over(self, start: int, stop: int) -> range:
        """First pixel column of each column of tiles that touches the pixel columns `start` to `stop` - 1."""
        return self._over(self.columns, start, stop)

    def _starts(self, size: int) -> range:
        count = max(1, -(-(size - self.overlap) // self.stride))
        return range(0, count * self.stride, self.stride)

    def _over(self, starts: range, start: int, stop: int) -> range:
        first = max(0, (start - self.tile) // self.stride + 1)
        return starts[first : -(-stop // self.stride)]


def window(tile: int, overlap: int) -> NDArray[np.float32]:
    """Weights (tile, tile) of a tile: raised-cosine ramps over the overlap's middle half, 1 inside, > 0 everywhere.

    Where overlap <= tile / 2, its outer quarter, in which a model sees the tile's edge, counts only where no other tile
    reaches, and the windows of a grid sum to 1 by themselves inside (sin^2 + cos^2). At the raster's frame and beside
    skipped tiles they sum to less, but nowhere to 0.
    """
    distance = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5  # to the tile's edge, from pixel centres
    share = np.clip((distance - overlap / 4) / (overlap / 2), 0.0, 1.0) if overlap else np.ones(tile)
    ramp = np.maximum(np.sin(0.5 * np.pi * share) ** 2, _LEAST)
    return np.outer(ramp, ramp).astype(np.float32)


def pad_to_tile(array: NDArray[np.generic], tile: int) -> NDArray[np.generic]:
    """Extend (..., h, w) at the bottom and right to (..., tile, tile) by reflection; a single row is repeated."""
    missing = [(0, tile - size) for size in array.shape[-2:]]
    if not any(after for _, after in missing):
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 2) + missing, mode="reflect")


class Blender:
    """Weighted float32 sums over one row of tiles of a block; finished rows of pixels leave at once.

    Memory: planes x tile x width of the block x 4 bytes. Tiles must come in the order of the grid, row by row: then
    every pixel is the sum of the same numbers in the same order, whatever the block or the batch.

    Args:
        grid: the raster's grid.
        columns: first pixel columns of the tiles that touch the block (`grid.columns_over`).
        outputs: K, classes or values.
        votes: also sum up each tile's winning classes, and the weights (needed for scores).
        total: also sum up the weights (needed for values).
    """

    def __init__(
        self, grid: TileGrid, columns: Sequence[int], outputs: int, *, votes: bool = False, total: bool = False
    ) -> None:
        self._grid, self._left = grid, columns[0]
        self._weights = window(grid.tile, grid.overlap)
        self._product = np.empty_like(self._weights)
        span = columns[-1] - columns[0] + grid.tile
        self.sums = np.zeros((outputs, grid.tile, span), dtype=np.float32)
        self.votes = np.zeros((outputs if votes else 0, grid.tile, span), dtype=np.float32)
        self.total = np.zeros((int(votes or total), grid.tile, span), dtype=np.float32)

    def add(self, column: int, logits: NDArray[np.float32]) -> None:
        """Add a tile, (K, tile, tile), of the present row of tiles, whose first pixel column is `column`."""
        at = slice(column - self._left, column - self._left + self._grid.tile)
        for sums, plane in zip(self.sums, logits, strict=True):  # by class: a plane stays in the processor's cache
            np.multiply(plane, self._weights, out=self._product)
            sums[:, at] += self._product
        if len(self.votes):
            winners = winning_class(logits)
            for index in range(len(logits)):
                self.votes[index, :, at] += self._weights * (winners == index)
        self.total[:, :, at] += self._weights

    def next_row(self) -> None:
        """Go on with the next row of tiles; the uppermost `grid.stride` rows of pixels are dropped."""
        grid = self._grid
        for sums in (*self.sums, *self.votes, *self.total):
            sums[: grid.overlap] = sums[grid.stride :].copy()
            sums[grid.overlap :] = 0


def winning_class(scores: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Index of the largest of K scores, (K, h, w) -> uint8 (h, w); the first of equals, as argmax, but faster."""
    labels = np.zeros(scores.shape[1:], dtype=np.uint8)
    for top in range(0, len(labels), _STRIP):
        planes, winners = scores[:, top : top + _STRIP], labels[top : top + _STRIP]
        best = planes[0].copy()
        for index in range(1, len(planes)):
            # a later winner has the higher index: the maximum is an assignment without a branch per pixel
            np.maximum(winners, (planes[index] > best) * np.uint8(index), out=winners)
            np.maximum(best, planes[index], out=best)
    return labels
