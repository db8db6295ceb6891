"""Finished blocks -> the map: tiles are copied as they are, overviews are made of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.raster.blocks import SIDE, compress, decompress
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.plan import Plan
from vfmadapt.raster.tiff import Level
from vfmadapt.raster.write import NODATA


@dataclass(frozen=True)
class Collected:
    """All blocks of a plan: pixels by label, tiles that were forwarded, and the full image of each file."""

    counts: NDArray[np.int64]
    forwarded: int
    images: dict[str, Level]


def collect(folder: BlockFolder, plan: Plan) -> Collected:
    """Check every block and gather where its tiles are.

    Raises:
        UserError: blocks are missing or damaged; the line says how many.
    """
    canvas = plan.canvas
    shape = canvas.height // SIDE, canvas.width // SIDE
    files = [name for name in ("class", "scores") if plan.bands_of(name)]
    sizes = {f: np.zeros((plan.bands_of(f), *shape), dtype=np.int64) for f in files}
    offsets = {f: np.zeros_like(sizes[f]) for f in files}
    counts, forwarded, missing = np.zeros(NODATA + 1, dtype=np.int64), 0, []
    for index in plan.blocks:
        found = folder.read(plan, index)
        if found is None:
            missing.append(index)
            continue
        block, at = found
        counts += block.counts
        forwarded += block.forwarded
        area = plan.area(index)
        row, column = (area.row - canvas.row) // SIDE, (area.column - canvas.column) // SIDE
        where = (slice(None), slice(row, row + area.height // SIDE), slice(column, column + area.width // SIDE))
        for name in files:
            ends = at + np.cumsum(block.sizes[name]).reshape(block.sizes[name].shape)
            sizes[name][where], offsets[name][where] = block.sizes[name], ends - block.sizes[name]
            at = int(ends.ravel()[-1])
    if missing:
        raise UserError(
            f"{len(missing)} of {len(plan.blocks)} blocks of {folder.output} are not finished (first: {missing[0]}); "
            "run the parts that lack, or the same command again"
        )
    images = {f: _image(folder, plan, sizes[f], offsets[f]) for f in files}
    return Collected(counts, forwarded, images)


def _image(folder: BlockFolder, plan: Plan, sizes: NDArray[np.int64], offsets: NDArray[np.int64]) -> Level:
    canvas, per_row = plan.canvas, -(-plan.width // plan.block)

    def read(band: int, row: int, column: int) -> bytes:
        y, x = (canvas.row + row * SIDE) // plan.block, (canvas.column + column * SIDE) // plan.block
        with folder.block(y * per_row + x).open("rb") as file:
            file.seek(offsets[band, row, column])
            return file.read(sizes[band, row, column])

    return Level(canvas.height, canvas.width, sizes, read)


def pyramid(image: Level, plan: Plan, spool: IO[bytes]) -> list[Level]:
    """The window's full image and its overviews, each the half of the one before, down to one tile.

    An overview's pixel is the upper left one of four: a class, never a mixture. Overviews are kept in `spool`.
    """
    window, canvas = plan.window, plan.canvas
    down, right = window.row - canvas.row, window.column - canvas.column
    if down or right:
        levels = [_resampled(image, window.height, window.width, (down, right), 1, spool)]
    else:
        levels = [Level(window.height, window.width, image.sizes, image.read)]
    while max(levels[-1].height, levels[-1].width) > SIDE and window.width > 1:  # readers take the ratio of widths
        last = levels[-1]
        levels.append(_resampled(last, -(-last.height // 2), -(-last.width // 2), (0, 0), 2, spool))
    return levels


def _resampled(level: Level, height: int, width: int, start: tuple[int, int], step: int, spool: IO[bytes]) -> Level:
    """Every `step`-th pixel of a level, from `start` on, compressed into `spool`."""
    shape = len(level.sizes), -(-height // SIDE), -(-width // SIDE)
    sizes, offsets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    at = spool.seek(0, 2)
    for band, row, column in _not_void(level, shape, start, step):
        data = compress(_gathered(level, (band, row, column), (height, width), start, step))
        spool.seek(at)  # the finer level may lie in the same file
        spool.write(data)
        sizes[band, row, column], offsets[band, row, column] = len(data), at
        at += len(data)

    def read(band: int, row: int, column: int) -> bytes:
        spool.seek(offsets[band, row, column])
        return spool.read(sizes[band, row, column])

    return Level(height, width, sizes, read)


def _sources(start: int, step: int, tile: int, count: int) -> range:
    """Tiles of the finer level, along one side, that a tile of the coarser one is made of."""
    first = start + tile * SIDE * step
    return range(first // SIDE, min(count, (first + (SIDE - 1) * step) // SIDE + 1))


def _not_void(
    level: Level, shape: tuple[int, int, int], start: tuple[int, int], step: int
) -> Iterator[tuple[int, int, int]]:
    """Tiles of the coarser level below which any tile is stored, in order."""
    stored = np.zeros(shape, dtype=np.bool_)
    for band, row, column in np.argwhere(level.sizes > 0):
        rows, columns = (
            range(max(0, (at * SIDE - begin) // (SIDE * step)), (at * SIDE + SIDE - 1 - begin) // (SIDE * step) + 1)
            for at, begin in ((int(row), start[0]), (int(column), start[1]))
        )
        stored[band, rows.start : rows.stop, columns.start : columns.stop] = True
    for band, row, column in np.argwhere(stored):
        yield int(band), int(row), int(column)


def _gathered(
    level: Level, at: tuple[int, int, int], size: tuple[int, int], start: tuple[int, int], step: int
) -> NDArray[np.uint8]:
    """The pixels of one coarser tile (SIDE, SIDE); void outside `size`."""
    band, row, column = at
    rows = _sources(start[0], step, row, level.sizes.shape[1])
    columns = _sources(start[1], step, column, level.sizes.shape[2])
    mosaic = np.concatenate(
        [np.concatenate([decompress(level.read(band, y, x)) for x in columns], axis=1) for y in rows]
    )
    top, left = start[0] + row * SIDE * step - rows.start * SIDE, start[1] + column * SIDE * step - columns.start * SIDE
    part = mosaic[top::step, left::step][:SIDE, :SIDE]
    tile = np.full((SIDE, SIDE), NODATA, dtype=np.uint8)
    high, wide = min(len(part), size[0] - row * SIDE), min(part.shape[1], size[1] - column * SIDE)
    tile[:high, :wide] = part[:high, :wide]
    return tile
