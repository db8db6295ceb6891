"""Finished blocks -> the map: tiles are copied as they are, overviews are made of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.raster.blocks import DTYPES, SIDE, compress, decompress, is_void
from vfmadapt.raster.finishing import FULL
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.moments import Statistics, joined, moments, statistics
from vfmadapt.raster.objects import Numbering, numbering
from vfmadapt.raster.plan import LAYERS, Plan
from vfmadapt.raster.tiff import Level
from vfmadapt.raster.write import NODATA, Band, nodata_of


@dataclass(frozen=True)
class Collected:
    """All blocks of a plan: what they count (see `Block`), statistics of each value, the full image of each file.

    In a map of objects the image holds keys, and `numbering` says what becomes of them; `object_classes` (n,) are the
    labels of its objects' classes, None without classes.
    """

    counts: NDArray[np.int64]
    statistics: tuple[Statistics, ...]
    forwarded: int
    images: dict[str, Level]
    numbering: Numbering | None
    object_classes: NDArray[np.int64] | None

    @property
    def known(self) -> int:
        """Pixels with data."""
        return int(self.counts[:NODATA].sum())


def collect(folder: BlockFolder, plan: Plan) -> Collected:
    """Check every block and gather where its tiles are.

    Raises:
        UserError: blocks are missing or damaged; the line says how many.
    """
    canvas = plan.canvas
    shape = canvas.height // SIDE, canvas.width // SIDE
    sizes = {f: np.zeros((bands, *shape), dtype=np.int64) for f, bands in plan.files.items()}
    offsets = {f: np.zeros_like(sizes[f]) for f in plan.files}
    counts, forwarded, missing = np.zeros(NODATA + 1, dtype=np.int64), 0, []
    found_moments = moments(np.empty((len(plan.values), 0), dtype=np.float32))
    keys, links = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 2), dtype=np.int64)]
    for index in plan.blocks:
        found = folder.read(plan, index)
        if found is None:
            missing.append(index)
            continue
        block, at = found
        counts += block.counts
        found_moments = joined(found_moments, block.moments)
        forwarded += block.forwarded
        keys.append(block.objects)
        links.append(block.links)
        area = plan.area(index)
        row, column = (area.row - canvas.row) // SIDE, (area.column - canvas.column) // SIDE
        where = (slice(None), slice(row, row + area.height // SIDE), slice(column, column + area.width // SIDE))
        for name in plan.files:
            ends = at + np.cumsum(block.sizes[name]).reshape(block.sizes[name].shape)
            sizes[name][where], offsets[name][where] = block.sizes[name], ends - block.sizes[name]
            at = int(ends.ravel()[-1])
    if missing:
        raise UserError(
            f"{len(missing)} of {len(plan.blocks)} blocks of {folder.output} are not finished (first: {missing[0]}); "
            "run the parts that lack, or the same command again"
        )
    images = {f: _image(folder, plan, f, sizes[f], offsets[f]) for f in plan.files}
    known = int(counts[:NODATA].sum())
    numbers = numbering(np.unique(np.concatenate(keys)), np.concatenate(links)) if plan.objects else None
    classes = None if numbers is None or not plan.classes else numbers.classes(len(plan.classes))
    values = tuple(statistics(one, known) for one in found_moments)
    return Collected(counts, values, forwarded, images, numbers, classes)


def bands_of(plan: Plan, collected: Collected, name: str) -> list[Band]:
    """What the bands of a file are, in the order of `decide`; values with the statistics that GDAL looks for."""
    if name in ("class", "object"):
        return [Band(name)]
    if name == "scores":
        shares = [f"probability of {c}" for c, _ in plan.classes] if "probabilities" in plan.layers else []
        return [Band(n, 1 / FULL) for n in (*shares, *(n for n in LAYERS[2:] if n in plan.layers))]
    return [
        Band(value, unit=unit, tags=_statistics_tags(found) if collected.known else {})
        for (value, unit), found in zip(plan.values, collected.statistics, strict=True)
    ]


def _statistics_tags(found: Statistics) -> dict[str, str]:
    numbers = {"MINIMUM": found.least, "MAXIMUM": found.greatest, "MEAN": found.mean, "STDDEV": found.deviation}
    return {f"STATISTICS_{name}": f"{number:.9g}" for name, number in numbers.items()}  # floats have no more digits


def _image(folder: BlockFolder, plan: Plan, name: str, sizes: NDArray[np.int64], offsets: NDArray[np.int64]) -> Level:
    canvas, per_row = plan.canvas, -(-plan.width // plan.block)

    def read(band: int, row: int, column: int) -> bytes:
        y, x = (canvas.row + row * SIDE) // plan.block, (canvas.column + column * SIDE) // plan.block
        with folder.block(y * per_row + x).open("rb") as file:
            file.seek(offsets[band, row, column])
            return file.read(sizes[band, row, column])

    return Level(canvas.height, canvas.width, sizes, np.dtype(DTYPES[name]), read)


def numbered(image: Level, numbers: Numbering, spool: IO[bytes]) -> Level:
    """An image of keys -> that of the objects' numbers, compressed into `spool`."""
    sizes, offsets, at = np.zeros_like(image.sizes), np.zeros_like(image.sizes), spool.seek(0, 2)
    for band, row, column in np.argwhere(image.sizes > 0):
        data = compress(numbers(decompress(image.read(int(band), int(row), int(column)), image.dtype)))
        spool.write(data)
        sizes[band, row, column], offsets[band, row, column] = len(data), at
        at += len(data)
    return Level(image.height, image.width, sizes, np.dtype(np.uint32), _reader(spool, sizes, offsets))


def _reader(spool: IO[bytes], sizes: NDArray[np.int64], offsets: NDArray[np.int64]) -> Callable[[int, int, int], bytes]:
    def read(band: int, row: int, column: int) -> bytes:
        spool.seek(offsets[band, row, column])
        return spool.read(sizes[band, row, column])

    return read


def pyramid(image: Level, plan: Plan, spool: IO[bytes]) -> list[Level]:
    """The window's full image and its overviews, each the half of the one before, down to one tile.

    An overview's pixel is the upper left one of four: a class, never a mixture; of values it is the mean of those with
    data. Overviews are kept in `spool`.
    """
    window, canvas = plan.window, plan.canvas
    down, right = window.row - canvas.row, window.column - canvas.column
    if down or right:
        levels = [_resampled(image, window.height, window.width, (down, right), 1, spool)]
    else:
        levels = [replace(image, height=window.height, width=window.width)]
    while max(levels[-1].height, levels[-1].width) > SIDE and window.width > 1:  # readers take the ratio of widths
        last = levels[-1]
        levels.append(_resampled(last, -(-last.height // 2), -(-last.width // 2), (0, 0), 2, spool))
    return levels


def _resampled(level: Level, height: int, width: int, start: tuple[int, int], step: int, spool: IO[bytes]) -> Level:
    """A level from `start` on, 1 pixel for `step` x `step` of them, compressed into `spool`."""
    shape = len(level.sizes), -(-height // SIDE), -(-width // SIDE)
    sizes, offsets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    at = spool.seek(0, 2)
    for band, row, column in _not_void(level, shape, start, step):
        data = compress(_gathered(level, (band, row, column), (height, width), start, step))
        spool.seek(at)  # the finer level may lie in the same file
        spool.write(data)
        sizes[band, row, column], offsets[band, row, column] = len(data), at
        at += len(data)
    return Level(height, width, sizes, level.dtype, _reader(spool, sizes, offsets))


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
) -> NDArray[Any]:
    """The pixels of one coarser tile (SIDE, SIDE); void outside `size`."""
    band, row, column = at
    rows = _sources(start[0], step, row, level.sizes.shape[1])
    columns = _sources(start[1], step, column, level.sizes.shape[2])
    mosaic = np.concatenate(
        [np.concatenate([decompress(level.read(band, y, x), level.dtype) for x in columns], axis=1) for y in rows]
    )
    top, left = start[0] + row * SIDE * step - rows.start * SIDE, start[1] + column * SIDE * step - columns.start * SIDE
    if step > 1 and level.dtype.kind == "f":
        mosaic[level.height - rows.start * SIDE :], mosaic[:, level.width - columns.start * SIDE :] = np.nan, np.nan
        part = _means(mosaic, step)
    else:
        part = mosaic[top::step, left::step][:SIDE, :SIDE]
    tile = np.full((SIDE, SIDE), nodata_of(level.dtype), dtype=level.dtype)
    high, wide = min(len(part), size[0] - row * SIDE), min(part.shape[1], size[1] - column * SIDE)
    tile[:high, :wide] = part[:high, :wide]
    return tile


def _means(values: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Mean of the pixels with data among each `step` x `step`."""
    total, count = np.zeros((2, values.shape[0] // step, values.shape[1] // step))
    for row, column in np.ndindex(step, step):
        cells = values[row::step, column::step]
        known = ~is_void(cells)
        np.add(total, cells, out=total, where=known)
        count += known
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
