"""Third stage of a run: blend the tiles, decide, compress, write the block."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vfmadapt.raster.blocks import DTYPES, SIDE, Block, compress, is_void, write_block
from vfmadapt.raster.moments import joined, moments
from vfmadapt.raster.objects import Stitcher
from vfmadapt.raster.plan import Plan
from vfmadapt.raster.reading import Done
from vfmadapt.raster.scoring import ScoredRow
from vfmadapt.raster.tiling import Area, Blender, winning_class
from vfmadapt.raster.write import NODATA, nodata_of

FULL = 254
"""What 1.0 is stored as in the file of scores; 255 is nodata."""


class Finisher:
    """Makes blocks out of scored rows."""

    def __init__(self, plan: Plan, path_of: Callable[[int], Path]) -> None:
        self._plan, self._path_of, self._key = plan, path_of, plan.key
        self._part: _Part | None = None
        self._failure: Exception | None = None

    def take(self, row: ScoredRow | Done) -> int | Done | None:
        """Write the block that ends well; gives the pixels that were finished, at a block's end its `Done`."""
        pixels = None
        try:
            if self._failure is None and not (isinstance(row, Done) and row.error):
                part = self._part = self._part or _Part(self._plan, row.block)
                if isinstance(row, ScoredRow):
                    pixels = part.add(row)
                else:
                    block, tiles = part.finished(self._key)
                    write_block(self._path_of(row.block), block, tiles)
        except Exception as error:
            self._failure = error
        if isinstance(row, ScoredRow):
            return pixels
        done = Done(row.block, row.error or self._failure)
        self._part = self._failure = None
        return done


def finish(
    maps: Sequence[tuple[Plan, Callable[[int], Path]]], rows: Iterator[ScoredRow | Done]
) -> Iterator[int | Done]:
    """Write the blocks of maps, each given as its plan and where its blocks go; yields pixels and every block's `Done`.

    The tiles' logits are those of all maps, one after another.
    """
    finishers = [Finisher(plan, path_of) for plan, path_of in maps]
    ends = list(accumulate((plan.outputs for plan, _ in maps), initial=0))
    for row in rows:
        taken = [f.take(_part_of(row, first, last)) for f, first, last in zip(finishers, ends, ends[1:], strict=False)]
        failed = (done for done in taken if isinstance(done, Done) and done.error)
        if (result := next(failed, taken[0])) is not None:
            yield result


def _part_of(row: ScoredRow | Done, first: int, last: int) -> ScoredRow | Done:
    """The row with the outputs `first` to `last` - 1 only."""
    if isinstance(row, Done):
        return row
    return replace(row, tiles=[(column, logits[first:last]) for column, logits in row.tiles])


class _Part:
    """A block in the making: sums of one row of tiles, and one row of output tiles that fills up."""

    def __init__(self, plan: Plan, index: int) -> None:
        self._plan, self._index, self._area = plan, index, plan.area(index)
        self._inside = inside = self._area.cut(Area(0, 0, plan.height, plan.width))
        self._starts = plan.grid.rows_over(inside.row, inside.bottom)
        self._columns = plan.grid.columns_over(inside.column, inside.right)
        self._blender: Blender | Stitcher | None = None
        self._strips = {f: _void((n, SIDE, self._area.width), DTYPES[f]) for f, n in plan.files.items()}
        self._tiles: dict[str, list[list[bytes]]] = {f: [[] for _ in range(n)] for f, n in plan.files.items()}
        self._counts = np.zeros(NODATA + 1, dtype=np.int64)
        self._moments = moments(np.empty((len(plan.values), 0), dtype=np.float32))
        self._objects = np.zeros(0, dtype=np.int64)
        self._row = self._area.row
        self._forwarded = 0

    def add(self, row: ScoredRow) -> int:
        """Add a row of tiles; gives the number of pixels of the window that are finished by it."""
        if row.first not in self._starts:
            return 0
        plan, last = self._plan, row.first == self._starts[-1]
        if self._blender is None:
            self._blender = self._begun()
        for column, logits in row.tiles:
            self._blender.add(column, logits)
        self._forwarded += len(row.tiles)
        stop = min(row.first + (plan.tile if last else plan.grid.stride), self._inside.bottom)
        before = self._counts.sum()
        while self._row < stop:
            self._emit(row, min(stop, (self._row // SIDE + 1) * SIDE))
        self._blender.next_row()
        return int(self._counts.sum() - before)

    def _begun(self) -> Blender | Stitcher:
        plan = self._plan
        if plan.objects:
            return Stitcher(plan.grid, self._starts, self._columns)
        wanted = {"votes": "scores" in plan.files, "total": "value" in plan.files}
        return Blender(plan.grid, self._columns, plan.outputs, **wanted)

    def _emit(self, row: ScoredRow, stop: int) -> None:
        """Decide the pixel rows from the present one to `stop`, all of one row of output tiles."""
        assert self._blender is not None
        inside, rows = self._inside, slice(self._row - row.first, stop - row.first)
        valid = row.valid[rows, inside.column - row.left : inside.right - row.left]
        left = self._columns[0]
        at = (slice(None), rows, slice(inside.column - left, inside.right - left))
        into = (slice(None), slice(self._row % SIDE, self._row % SIDE + stop - self._row), slice(0, inside.width))
        if valid.any():
            for name, values in self._decided(at).items():
                np.copyto(self._strips[name][into], values, where=valid)
        self._count(into, Area(self._row, inside.column, stop - self._row, inside.width), valid)
        self._row = stop
        if stop % SIDE == 0:
            self._compress()

    def _decided(self, at: tuple[slice, slice, slice]) -> dict[str, NDArray[Any]]:
        """What is stored of the pixels `at` of the sums, for each file."""
        blender = self._blender
        if isinstance(blender, Stitcher):
            return {"object": blender.keys[at]}
        assert blender is not None
        return decide(self._plan, blender.sums[at], blender.total[at], blender.votes[at])

    def _count(self, into: tuple[slice, slice, slice], where: Area, valid: NDArray[np.bool_]) -> None:
        """Count what lies inside the window, of the pixels `into` of the strips; they are the raster's `where`."""
        part = where.cut(self._plan.window)
        if min(part.height, part.width) < 1:
            return
        row, column = part.row - where.row, part.column - where.column
        name = next(iter(self._strips))
        counted = self._strips[name][into][:, row : row + part.height, column : column + part.width]
        if name == "class":
            self._counts += np.bincount(counted.ravel(), minlength=NODATA + 1)
            return
        if name == "object":
            part_valid = valid[row : row + part.height, column : column + part.width]
            numbers = np.where(part_valid, counted[0] > 0, NODATA)
            self._counts += np.bincount(numbers.ravel(), minlength=NODATA + 1)
            self._objects = np.union1d(self._objects, counted[counted > 0])
            return
        known = ~is_void(counted[0])
        self._counts[[0, NODATA]] += known.sum(), (~known).sum()
        self._moments = joined(self._moments, moments(counted[:, known]))

    def _compress(self) -> None:
        for name, strip in self._strips.items():
            for band, tiles in zip(strip, self._tiles[name], strict=True):
                tiles += [compress(band[:, c : c + SIDE]) for c in range(0, band.shape[1], SIDE)]
            strip[:] = nodata_of(strip.dtype)

    def finished(self, key: str) -> tuple[Block, dict[str, list[bytes]]]:
        """The block, and its tiles by file."""
        missing = self._inside.cut(self._plan.window)
        if self._blender is None:  # nothing was read: all of it is void
            self._counts[NODATA] = max(missing.height, 0) * max(missing.width, 0)
        elif self._row < self._inside.bottom:
            raise RuntimeError(f"block {self._index} ended at row {self._row} of {self._inside.bottom}")
        if self._row % SIDE:
            self._compress()
        rows, columns = self._area.height // SIDE, self._area.width // SIDE
        sizes, tiles = {}, {}
        for name, bands in self._tiles.items():
            full = [band + [b""] * (rows * columns - len(band)) for band in bands]
            sizes[name] = np.array([[len(t) for t in band] for band in full]).reshape(-1, rows, columns)
            tiles[name] = [tile for band in full for tile in band]
        counts = tuple(self._counts.tolist())
        links = self._blender.links if isinstance(self._blender, Stitcher) else np.zeros((0, 2), dtype=np.int64)
        block = Block(key, self._index, counts, self._forwarded, sizes, self._moments, self._objects, links)
        return block, tiles


def _void(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    return np.full(shape, nodata_of(dtype), dtype=dtype)


def decide(
    plan: Plan, sums: NDArray[np.float32], total: NDArray[np.float32], votes: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """Weighted sums of the model's outputs (K, h, w) -> what is stored, (bands, h, w) for each file.

    `total` (1, h, w) are the sums of the weights, empty where only labels are wanted. Values are means. Scores, with
    `votes` (K, h, w: weights of the tiles that chose each class): probabilities (softmax of the mean logits), their
    entropy over its maximum log K, and the share of the overlapping tiles' weight that voted for another class than the
    map's.
    """
    if not len(total):
        return {"class": winning_class(sums)[None]}
    total = np.maximum(total, np.finfo(np.float32).tiny)  # 0 where no tile was added: void
    means = sums / total
    if plan.values:
        return {"value": means}
    labels = winning_class(sums)
    shares = np.exp(means - means.max(axis=0))
    shares /= shares.sum(axis=0)
    planes = list(shares) if "probabilities" in plan.layers else []
    if "entropy" in plan.layers:
        terms = shares * np.log(np.maximum(shares, np.finfo(np.float32).tiny))
        planes.append(-terms.sum(axis=0) / np.log(max(len(shares), 2)))
    if "disagreement" in plan.layers:
        winner = np.take_along_axis(votes, labels[None].astype(np.intp), axis=0)
        planes.append(1 - (winner / total)[0])
    return {"class": labels[None], "scores": np.rint(np.clip(np.stack(planes), 0, 1) * FULL).astype(np.uint8)}
