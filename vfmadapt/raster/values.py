"""What stored values mean: sensor units, and which pixels hold data."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError

_DTYPE_SCALE = {"uint8": 1 / 255, "uint16": 1 / 10_000, "int16": 1 / 10_000}
"""A digital number's worth where the file is silent: full scale of 8 bits; 1/10000 reflectance of 16-bit products."""


def to_sensor_units(
    values: NDArray[Any],
    *,
    scale: float | None = None,
    offset: float | None = None,
    tag_scales: Sequence[float] | None = None,
    tag_offsets: Sequence[float] | None = None,
) -> NDArray[np.float32]:
    """Digital numbers (C, H, W) -> float32 in sensor units: value x scale + offset.

    The first of these that applies: `scale` / `offset` as given (the other is then 1 or 0); the file's own GDAL tags,
    per band, where any band's differ from (1, 0); by dtype: uint8 / 255, uint16 and int16 / 10000, float as it is.
    Other dtypes raise UserError.
    """
    out = values.astype(np.float32)
    if scale is not None or offset is not None:
        return np.asarray(out * np.float32(1.0 if scale is None else scale) + np.float32(offset or 0.0))
    if tag_scales is not None and tag_offsets is not None and tagged(tag_scales, tag_offsets):
        gains = np.asarray(tag_scales, dtype=np.float32)[:, None, None]
        return np.asarray(out * gains + np.asarray(tag_offsets, dtype=np.float32)[:, None, None])
    if values.dtype.kind == "f":
        return out
    if values.dtype.name not in _DTYPE_SCALE:
        known = ", ".join([*_DTYPE_SCALE, "float"])
        raise UserError(f"no rule for {values.dtype.name} values (known: {known}); pass scale= and, if needed, offset=")
    out *= np.float32(_DTYPE_SCALE[values.dtype.name])
    return out


def valid_pixels(values: NDArray[Any], nodata: Sequence[float | None]) -> NDArray[np.bool_]:
    """Which pixels hold data, by value.

    A pixel is void where a band is NaN or infinite, where a band holds a negative nodata value (-9999: no measurement
    has it), or where *every* band holds its nodata value: 0 or 255 in one band alone is a dark or saturated pixel, not
    a hole.

    Args:
        values: (C, H, W) as stored in the file.
        nodata: the nodata value of each band, None where unset.

    Returns:
        bool (H, W).
    """
    if values.dtype.kind != "f" and all(v is None for v in nodata):
        return np.ones(values.shape[1:], dtype=np.bool_)
    every = np.ones(values.shape[1:], dtype=np.bool_)
    void = np.zeros(values.shape[1:], dtype=np.bool_)
    for band, value in zip(values, nodata, strict=True):
        missing = holds(band, value)
        every &= missing
        if value is not None and value < 0:
            void |= missing
        if band.dtype.kind == "f":
            void |= ~np.isfinite(band)
    return ~(void | every)


def tagged(scales: Sequence[float], offsets: Sequence[float]) -> bool:
    """Whether a file's GDAL scales and offsets say anything."""
    return any(s != 1.0 for s in scales) or any(o != 0.0 for o in offsets)


def holds(band: NDArray[Any], value: float | None) -> NDArray[np.bool_]:
    """Where a band holds its nodata value; floats within 1e-6 of it, because the tag is decimal text."""
    if value is None:
        return np.zeros(band.shape, dtype=np.bool_)
    if np.isnan(value):
        return np.asarray(np.isnan(band))
    if band.dtype.kind != "f":
        return np.asarray(band == value)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.abs(band - band.dtype.type(value)) <= 1e-6 * abs(value))
