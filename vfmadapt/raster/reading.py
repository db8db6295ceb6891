"""First stage of a run: rows of tiles, read from the raster."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import DataSpec
from vfmadapt.raster.io import Raster, open_raster
from vfmadapt.raster.plan import Plan
from vfmadapt.raster.reduction import read_reduced
from vfmadapt.raster.tiling import Area

logger = logging.getLogger(__name__)

_FAR = 20.0  # standard deviations from the training mean that no median of an image in the right units reaches


@dataclass(frozen=True)
class TileRow:
    """One row of tiles of a block.

    `first` is its first pixel row, `left` the pixel column where `image` float32 (C, h, w) and `valid` bool (h, w)
    begin; `columns` are the first pixel columns of the tiles with data.
    """

    block: int
    first: int
    left: int
    columns: tuple[int, ...]
    image: NDArray[np.float32]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class Done:
    """The end of a block; with an error the block is to be dropped."""

    block: int
    error: Exception | None = None


def read_rows(plan: Plan, indices: Iterable[int]) -> Iterator[TileRow | Done]:
    """Rows of tiles of the blocks `indices`, each block ended by a `Done`.

    Always the whole block, even where the window ends inside it: which tiles share a batch must not depend on the
    window, because a matrix product of another composition rounds in another way.
    """
    with open_raster(plan.source) as raster:
        for index in indices:
            try:
                yield from _rows_of(plan, raster, index)
            except Exception as error:
                yield Done(index, error)
            else:
                yield Done(index)


def _rows_of(plan: Plan, raster: Raster, index: int) -> Iterator[TileRow]:
    grid, tile = plan.grid, plan.tile
    row, column = divmod(index, -(-plan.width // plan.block))
    square = Area(row * plan.block, column * plan.block, plan.block, plan.block)
    whole = square.cut(Area(0, 0, plan.height, plan.width))
    starts, columns = grid.rows_over(whole.row, whole.bottom), grid.columns_over(whole.column, whole.right)
    left, width = columns[0], min(columns[-1] + tile, plan.width) - columns[0]
    bottom = min(starts[-1] + tile, plan.height)
    if not raster.stored(plan.bands, Area(starts[0], left, bottom - starts[0], width)):
        return
    image = np.empty((plan.inputs, 0, width), dtype=np.float32)
    valid = np.empty((0, width), dtype=np.bool_)
    for first in starts:
        kept = max(0, image.shape[1] - grid.stride)
        height = min(first + tile, plan.height) - first - kept
        more, known = _read(plan, raster, Area(first + kept, left, height, width))
        if kept:
            more = np.concatenate([image[:, -kept:], more], axis=1)
            known = np.concatenate([valid[-kept:], known])
        image, valid = more, known
        filled = tuple(c for c in columns if valid[:, c - left : c - left + tile].any())
        yield TileRow(index, first, left, filled, image, valid)


def _read(plan: Plan, raster: Raster, area: Area) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    units = {"scale": plan.scale, "offset": plan.offset}
    if plan.mix is not None:
        return read_reduced(raster, plan.bands, plan.mix, area, **units)
    return raster.read(plan.bands, row=area.row, column=area.column, height=area.height, width=area.width, **units)


def with_units_checked(path: str, spec: DataSpec, rows: Iterator[TileRow | Done]) -> Iterator[TileRow | Done]:
    """The rows as they are; the first with data tells whether the raster's values can be in the model's units."""
    checked = False
    for row in rows:
        if not checked and isinstance(row, TileRow) and row.columns:
            checked = True
            _warn_of_units(path, spec, row)
        yield row


def _warn_of_units(path: str, spec: DataSpec, row: TileRow) -> None:
    """Say so where the values cannot be in the model's units, such as 10000 where it knows reflectance 0..1."""
    medians = np.median(row.image[:, row.valid], axis=1)
    far = np.abs(medians - np.asarray(spec.mean)) > _FAR * np.maximum(np.asarray(spec.std), 1e-6)
    if far.any():
        band = int(far.argmax())
        logger.warning(
            "%s: the median of band %s is %g, the model was trained on values around %g; check scale= and offset=",
            path,
            spec.bands[band],
            medians[band],
            spec.mean[band],
        )
