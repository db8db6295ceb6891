"""A map of objects: what a model found in each tile, made one where neighbouring tiles agree.

A pixel belongs to the tile in whose middle it lies. Two objects of neighbouring tiles are one where, in what both tiles
see, their intersection is more than half of their union; as the objects of a tile do not overlap, each has at most one
such partner in a neighbour (Kirillov et al. 2019, "Panoptic Segmentation", https://arxiv.org/abs/1801.00868, §4.1).

Where a tile found nothing in its middle, its neighbours' overlap tells: an object that the tile missed is taken from
there, so far as it is seen. Missed are objects on at most half of which, in what both tiles see, the tile has objects
of its own: where it found one it also says where that ends. Of several neighbours the first counts: above, left, right,
below. Filling makes no two objects one; an object that is seen in an overlap only is an object, too. All tiles that see
a pixel of a block touch the block, so neither blocks nor who computed them change a pixel.

An object of a tile goes by its key, made of the tile's place in the grid and its number there: the same in every block
that the tile touches. When all blocks are there, objects are numbered in the order of their first keys, so the blocks
do not change a number either. That takes some tens of bytes of memory for each object of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.raster.tiling import Area, TileGrid

_BITS = 24  # of a key for the number in the tile: what float32, in which models give it, counts without a gap
_NUMBER = (1 << _BITS) - 1


class Stitcher:
    """Keys of the objects over one row of tiles of a block; finished rows of pixels leave at once.

    Memory: tile x width of the block x 8 bytes, and the lower overlap of two rows of tiles. Tiles come in the order of
    the grid.

    Args:
        grid: the raster's grid.
        rows: first pixel rows of the rows of tiles that touch the block (`grid.rows_over`).
        columns: first pixel columns of the tiles that do (`grid.columns_over`).
    """

    def __init__(self, grid: TileGrid, rows: Sequence[int], columns: Sequence[int]) -> None:
        self._grid, self._left, self._per_row = grid, columns[0], len(grid.columns)
        self._rows, self._row = iter(rows), rows[0]
        next(self._rows)
        self.keys = np.zeros((1, grid.tile, columns[-1] - columns[0] + grid.tile), dtype=np.int64)
        self._above: dict[int, NDArray[np.int64]] = {}  # what the tiles of the row above share with those below them,
        self._below: dict[int, NDArray[np.int64]] = {}  # those of this row with the next one's,
        self._before: tuple[int, NDArray[np.int64]] | None = None  # and the last tile with the one to its right
        self._links = [np.zeros((0, 2), dtype=np.int64)]

    @property
    def links(self) -> NDArray[np.int64]:
        """Pairs of keys (n, 2) that are one object."""
        return np.concatenate(self._links)

    def add(self, column: int, numbers: NDArray[np.float32]) -> None:
        """Add a tile, numbers of objects (1, tile, tile), whose first pixel column is `column`."""
        grid, row, tile = self._grid, self._row, self._keyed(column, numbers[0])
        middle = self._middle(row, column)
        self._fill(middle, tile[middle.row - row :, middle.column - column :])
        if (above := self._above.get(column)) is not None:
            upper = Area(row, column, grid.overlap, grid.tile)
            self._join(upper, above, self._middle(row - grid.stride, column), tile[: grid.overlap], middle)
        if self._before is not None and self._before[0] == column - grid.stride:
            left = Area(row, column, grid.tile, grid.overlap)
            before = self._middle(row, column - grid.stride)
            self._join(left, self._before[1], before, tile[:, : grid.overlap], middle)
        self._below[column], self._before = tile[grid.stride :].copy(), (column, tile[:, grid.stride :])

    def next_row(self) -> None:
        """Go on with the next row of tiles; the uppermost `grid.stride` rows of pixels are dropped."""
        grid = self._grid
        self.keys[:, : grid.overlap] = self.keys[:, grid.stride :].copy()
        self.keys[:, grid.overlap :] = 0
        self._above, self._below, self._before = self._below, {}, None
        self._row = next(self._rows, self._row)

    def _join(self, shared: Area, first: NDArray[np.int64], one: Area, second: NDArray[np.int64], other: Area) -> None:
        """Compare two tiles' views `first` and `second` of the pixels `shared`; their middles are `one` and `other`."""
        self._links.append(agreeing(first, second))
        for middle, keys in ((other, missed(first, second)), (one, missed(second, first))):
            part = shared.cut(middle)
            self._fill(part, keys[part.row - shared.row :, part.column - shared.column :])

    def _fill(self, area: Area, keys: NDArray[np.int64]) -> None:
        """Where an area has no keys yet, take those given, which begin in its corner and may reach farther."""
        row, column = area.row - self._row, area.column - self._left
        into = self.keys[0, row : row + area.height, column : column + area.width]
        np.copyto(into, keys[: area.height, : area.width], where=into == 0)

    def _middle(self, row: int, column: int) -> Area:
        """The pixels that belong to a tile."""
        grid, half = self._grid, self._grid.overlap // 2
        top, left = row + half * (row > 0), column + half * (column > 0)
        bottom = row + (grid.tile if row == grid.rows[-1] else grid.stride + half)
        right = column + (grid.tile if column == grid.columns[-1] else grid.stride + half)
        return Area(top, left, bottom - top, right - left)

    def _keyed(self, column: int, numbers: NDArray[np.float32]) -> NDArray[np.int64]:
        """The keys of a tile's objects, 0 where none is and beyond the raster."""
        grid = self._grid
        place = self._row // grid.stride * self._per_row + column // grid.stride
        keys = np.where(numbers > 0, (place << _BITS) + numbers.astype(np.int64), 0)
        keys[grid.height - self._row :] = 0
        keys[:, grid.width - column :] = 0
        return keys


def agreeing(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs (n, 2) of keys in two views of the same pixels whose IoU there is above 1/2; 0 is no object."""
    (ones, one), (others, other) = np.unique(first, return_inverse=True), np.unique(second, return_inverse=True)
    shape = len(ones), len(others)
    both = np.bincount((one * shape[1] + other).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    either = both.sum(axis=1, keepdims=True) + both.sum(axis=0) - both
    i, j = np.nonzero((2 * both > either) & (ones[:, None] > 0) & (others > 0))
    return np.column_stack([ones[i], others[j]])


def missed(keys: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """The keys of a view without the objects of whose pixels more than half are objects in another view, too."""
    _, index, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    index = index.reshape(keys.shape)
    free = np.bincount(index[other == 0], minlength=len(sizes))
    return np.where((2 * free >= sizes)[index], keys, 0)


@dataclass(frozen=True)
class Numbering:
    """The final number of each key; `keys` ascend."""

    keys: NDArray[np.int64]
    numbers: NDArray[np.uint32]

    @property
    def count(self) -> int:
        """Objects."""
        return int(self.numbers.max(initial=0))

    def __call__(self, keys: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Keys of any shape -> numbers, 0 for what has none."""
        if not len(self.keys):
            return np.zeros(keys.shape, dtype=np.uint32)
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.numbers[at], np.uint32(0))

    def classes(self, count: int) -> NDArray[np.int64]:
        """The class of each object, the first being number 1: of the `count` the one that most of its tiles say."""
        said = (self.numbers.astype(np.int64) - 1) * count + ((self.keys & _NUMBER) - 1) % count
        said, tiles = np.unique(said, return_counts=True)
        said = said[np.lexsort((-said, tiles))]  # what is said last counts: by most tiles, and then the lowest class
        found = np.zeros(self.count, dtype=np.int64)
        found[said // count] = said % count
        return found


def numbering(keys: NDArray[np.int64], links: NDArray[np.int64]) -> Numbering:
    """1, 2, ... for the objects of `keys` (ascending) in the order of their first key; `links` (n, 2) make them one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes = np.unique(np.concatenate([keys, links.ravel()]))
    ends: Any = np.searchsorted(nodes, links.T)
    graph = coo_array((np.ones(len(links), dtype=np.bool_), tuple(ends)), shape=(len(nodes), len(nodes)))
    object_of = connected_components(graph, directed=False)[1][np.searchsorted(nodes, keys)]
    _, first, members = np.unique(object_of, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.uint32)
    order[np.argsort(first)] = np.arange(1, len(first) + 1)
    return Numbering(keys, order[members])
