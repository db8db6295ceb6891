"""Maps out: GeoTIFFs that lie exactly where their source lies."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from vfmadapt.contracts import ClassSpec
from vfmadapt.raster.io import RasterInfo

NODATA = 255
"""Label of pixels without data in every map of classes that we write; in maps of values they are NaN."""


@dataclass(frozen=True)
class Band:
    """What a map says of one of its bands: name, what a stored 1 is worth, unit, and tags of its own."""

    name: str
    scale: float = 1.0
    unit: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


def nodata_of(dtype: DTypeLike) -> float:
    """What pixels without data hold: NaN among floats, `NODATA` among labels, 0 among numbers of objects."""
    if np.dtype(dtype).kind == "f":
        return math.nan
    return NODATA if np.dtype(dtype).itemsize == 1 else 0


def map_header(
    info: RasterInfo,
    bands: Sequence[Band],
    *,
    dtype: DTypeLike,
    classes: Sequence[ClassSpec] = (),
    tags: Mapping[str, str],
) -> bytes:
    """A GeoTIFF of one pixel in memory that says all that a map says besides its pixels.

    CRS, transform, control points and RPCs of `info`; nodata; the bands' names, scales, units and tags; classes as tags
    (`CLASS_NAMES`: JSON list; `CLASS_0` ...), as colour table too where the pixels are labels.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.io import MemoryFile

    profile: dict[str, Any] = {"driver": "GTiff", "count": len(bands), "height": 1, "width": 1}
    profile |= {"dtype": np.dtype(dtype).name, "nodata": nodata_of(dtype), "bigtiff": "YES"}
    if info.crs is not None:
        profile["crs"] = info.crs
    if not info.transform.is_identity:
        profile["transform"] = info.transform
    with rasterio.Env(), MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(**profile) as dataset:
            _georeference(dataset, info)
            dataset.descriptions = [band.name for band in bands]
            dataset.units = [band.unit for band in bands]
            if any(band.scale != 1 for band in bands):
                dataset.scales = [band.scale for band in bands]
            elif classes:
                dataset.write_colormap(1, _colour_table(classes))
            for index, band in enumerate(bands, start=1):
                dataset.update_tags(index, **band.tags)
            dataset.update_tags(**_class_tags(classes), **tags)
        return bytes(memory.getbuffer())


def _class_tags(classes: Sequence[ClassSpec]) -> dict[str, str]:
    if not classes:
        return {}
    names = [c.name for c in classes]
    return {"CLASS_NAMES": json.dumps(names)} | {f"CLASS_{i}": name for i, name in enumerate(names)}


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
