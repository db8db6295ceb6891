"""Which bands of a raster feed a model."""

import logging
from collections.abc import Sequence

from vfmadapt.errors import UserError
from vfmadapt.raster.io import RasterInfo

logger = logging.getLogger(__name__)


def select_bands(
    info: RasterInfo, wanted: Sequence[str], bands: Sequence[int] | None = None, *, advice: str = ""
) -> tuple[int, ...]:
    """Which bands of a raster to read, 1-based, in the order of `wanted` (what a model or a data set is made of).

    The user's `bands` if given; else by name (or colour), where the raster has all that is wanted; else all bands in
    order, where their number is right. An alpha band counts only if the user lists it. `advice` ends the error's line.

    Raises:
        UserError: the bands do not fit; the line says what the raster has and what is wanted.
    """
    count = len(info.dtypes)
    wants = f"wanted {'are' if len(wanted) != 1 else 'is'} {len(wanted)} ({', '.join(wanted)})"
    names = info.names
    has = f"{info.path} has {len(names)} band{'s' * (len(names) != 1)}"
    has += f" ({', '.join(n or '?' for n in names)})" if any(names) else ""
    has += f" and an alpha band, {info.alpha}" if info.alpha else ""
    if bands is not None:
        if len(bands) != len(wanted) or any(not 1 <= b <= count for b in bands):
            raise UserError(
                f"bands={list(bands)} does not fit: {has}, {wants}; list {len(wanted)} numbers from 1 to {count}"
            )
        return tuple(bands)
    lower = [(name or "").strip().lower() for name in names]
    if all(lower.count(w.lower()) == 1 for w in wanted):
        return tuple(info.data_bands[lower.index(w.lower())] for w in wanted)
    if len(names) != len(wanted):
        example = ",".join(str(1 + i % count) for i in range(len(wanted)))
        advice = advice or f"choose in that order, counted from 1, for instance bands=[{example}]"
        raise UserError(f"{has}, {wants}; {advice}")
    if all(info.band_names[b - 1] for b in info.data_bands):
        logger.warning("%s, %s: the names differ, so the bands are taken in order", has, wants)
    return info.data_bands


def shown_bands(info: RasterInfo, wanted: Sequence[str], bands: Sequence[int] | str | None) -> tuple[int, ...]:
    """Bands for a picture of what a model is given; of bands that are reduced, one from the middle of each group."""
    if not isinstance(bands, str):
        return select_bands(info, wanted, bands)
    count = len(info.data_bands)
    return tuple(info.data_bands[(2 * i + 1) * count // (2 * len(wanted))] for i in range(len(wanted)))
