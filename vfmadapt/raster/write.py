"""Label maps out: GeoTIFFs that lie exactly where their source lies, and files that appear whole or not at all."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import ClassSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.io import RasterInfo

NODATA = 255
"""Label of pixels without data in every map that we write."""

_BLOCK = 256  # side of the GeoTIFF's inner tiles; rows are written in multiples of it: no tile is compressed twice


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there gets the real name at the end, or goes on an error.

    The folder is made where it is missing. Raises UserError where it cannot be written to.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another output") from error
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        with suppress(OSError):  # some file systems cannot open a folder; the file itself is safe by now
            _sync(target.parent)
    finally:
        for leftover in (temporary, temporary.with_name(temporary.name + ".aux.xml")):
            leftover.unlink(missing_ok=True)


class LabelWriter:
    """Writes a one-band uint8 map row band by row band, from top to bottom; made by `label_writer`."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._pending: list[NDArray[np.uint8]] = []
        self._row = 0

    def append(self, rows: NDArray[np.uint8]) -> None:
        """Add the next rows, (h, W)."""
        self._pending.append(rows)
        ready = sum(len(r) for r in self._pending) // _BLOCK * _BLOCK
        if ready:
            self._flush(ready)

    def finish(self, tags: Mapping[str, str]) -> None:
        """Write what is pending, and the tags."""
        self._flush(sum(len(r) for r in self._pending))
        if self._row != self._dataset.height:
            raise RuntimeError(f"{self._row} of {self._dataset.height} rows were written")
        self._dataset.update_tags(**tags)

    def _flush(self, count: int) -> None:
        from rasterio.windows import Window

        if not count:
            return
        rows = np.concatenate(self._pending)
        self._dataset.write(rows[:count], 1, window=Window(0, self._row, rows.shape[1], count))
        self._row += count
        self._pending = [rows[count:]]


@contextmanager
def label_writer(path: str | Path, info: RasterInfo, classes: Sequence[ClassSpec]) -> Iterator[LabelWriter]:
    """Open a GeoTIFF map of labels for a raster: same size, CRS, transform, control points and RPCs, nodata 255.

    It carries the classes as colour table and as tags (`CLASS_NAMES`: JSON list; `CLASS_0` ...). It appears under its
    name only after the block has ended without an error.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(temporary, "w", **_profile(info)) as dataset:
                _georeference(dataset, info)
                dataset.write_colormap(1, _colour_table(classes))
                dataset.set_band_description(1, "class")
                names = {f"CLASS_{i}": c.name for i, c in enumerate(classes)}
                dataset.update_tags(CLASS_NAMES=json.dumps([c.name for c in classes]), **names)
                yield LabelWriter(dataset)
        except RasterioError as error:
            raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from error


def _profile(info: RasterInfo) -> dict[str, Any]:
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 1,
        "height": info.height,
        "width": info.width,
        "nodata": NODATA,
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        "compress": "deflate",
        "bigtiff": "IF_SAFER",
    }
    if info.crs is not None:
        profile["crs"] = info.crs
    if not info.transform.is_identity:
        profile["transform"] = info.transform
    return profile


def _georeference(dataset: Any, info: RasterInfo) -> None:
    if info.area_or_point is not None:
        dataset.update_tags(AREA_OR_POINT=info.area_or_point)
    if info.gcps:
        dataset.gcps = (list(info.gcps), info.gcps_crs)
    if info.rpcs is not None:
        dataset.rpcs = info.rpcs


def _colour_table(classes: Sequence[ClassSpec]) -> dict[int, tuple[int, int, int, int]]:
    table = {i: (*c.colour, 255) for i, c in enumerate(classes)}
    return {**table, NODATA: (0, 0, 0, 0)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
