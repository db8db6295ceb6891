"""Many bands made into the few that a model takes: means of neighbours, principal components, bands by wavelength.

Each is a weighted sum of the raster's bands and a constant, for each band of the model: a `Mix`. It is found once and
lies in the plan, so every block uses the same numbers.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.io import Raster
from vfmadapt.raster.tiling import Area

REDUCTIONS = ("mean", "pca", "wavelength")

Mix = tuple[tuple[float, ...], ...]
"""For each band of the model the weights of the bands that are read, and last the constant."""

_RESPONSES = {
    "coastal": (0.443, 0.021),
    "blue": (0.492, 0.066),
    "green": (0.560, 0.036),
    "red": (0.665, 0.031),
    "rededge1": (0.704, 0.015),
    "rededge2": (0.740, 0.015),
    "rededge3": (0.783, 0.020),
    "nir": (0.833, 0.106),
    "nir08": (0.865, 0.021),
    "nir09": (0.945, 0.020),
    "cirrus": (1.374, 0.031),
    "swir1": (1.614, 0.091),
    "swir2": (2.202, 0.175),
}
"""Centre and full width at half maximum in micrometres, by the names that STAC's eo extension gives: Sentinel-2A's."""

_PIECE = 64 << 20  # bytes of all bands, as floats, that are read at once
_SAMPLE = 32  # pixels per side of a piece of the sample
_PIECES, _PIXELS = 256, 1 << 14  # of the sample at most; 16384 pixels are 50 for each of 300 bands
_DIGITS = 6  # of a weight: what is left of it is the same on every machine
_LEAST = 1e-6  # standard deviation of a component over that of the first, below which it is rounding


def reduce_bands(
    raster: Raster, spec: DataSpec, kind: str, *, scale: float | None, offset: float | None
) -> tuple[tuple[int, ...], Mix]:
    """The 1-based bands to read and what is made of them, for `kind` of `REDUCTIONS`.

    Bands that the file marks as bad (ENVI's `bbl`), and for mean and pca those without a valid pixel in a sample, are
    left out. `scale`, `offset`: see `to_sensor_units`.

    Raises:
        UserError: another kind, too few bands, no wavelengths, a wavelength that the raster lacks, no valid pixel.
    """
    if kind not in REDUCTIONS:
        raise UserError(f"bands={kind}: allowed are {', '.join(REDUCTIONS)}, or numbers such as [4,3,2]")
    bands = tuple(b for b in raster.info.data_bands if b not in _bad_bands(raster))
    if kind == "wavelength":
        return _by_wavelength(raster, bands, spec.bands)
    pixels = _sample(raster, bands, scale, offset)
    if not len(pixels):
        bands = tuple(b for b in bands if len(_sample(raster, (b,), scale, offset)))
        pixels = _sample(raster, bands, scale, offset) if bands else pixels
    if len(bands) < len(spec.bands):
        raise UserError(
            f"bands={kind}: {raster.info.path} has {len(bands)} bands with data, wanted are {len(spec.bands)} or more "
            f"({', '.join(spec.bands)})"
        )
    if kind == "mean":
        return bands, tuple(_row(len(bands), group) for group in np.array_split(range(len(bands)), len(spec.bands)))
    if len(pixels) <= len(spec.bands):
        raise UserError(
            f"bands=pca: a sample of {raster.info.path} holds {len(pixels)} valid pixels, too few for components; "
            "take bands=mean, or list bands"
        )
    return bands, _components(pixels, spec)


def read_reduced(
    raster: Raster, bands: Sequence[int], mix: Mix, area: Area, *, scale: float | None, offset: float | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read an area as `Raster.read` does, reduced: float32 (bands of the model, h, w), 0 where void, and bool (h, w).

    The raster's own bands are held for a piece of the area at a time.
    """
    weights = np.asarray(mix, dtype=np.float32)
    image = np.zeros((len(mix), area.height, area.width), dtype=np.float32)
    valid = np.zeros((area.height, area.width), dtype=np.bool_)
    for part in _pieces(raster, area, len(bands)):
        values, known = raster.read(
            bands, row=part.row, column=part.column, height=part.height, width=part.width, scale=scale, offset=offset
        )
        mixed = weights[:, :-1] @ values.reshape(len(bands), -1) + weights[:, -1:]
        row, column = part.row - area.row, part.column - area.column
        at = (slice(row, row + part.height), slice(column, column + part.width))
        np.copyto(image[:, *at], mixed.reshape(-1, *known.shape), where=known)
        valid[at] = known
    return image, valid


def _pieces(raster: Raster, area: Area, bands: int) -> Iterator[Area]:
    """Parts of an area, as large as the file's own blocks or a few of them, and no larger than `_PIECE`."""
    high, wide = raster.block
    wide = min(wide, area.width)
    rows = max(1, _PIECE // (4 * bands * wide))
    rows -= rows % high if rows > high else 0
    for row, column in product(range(area.row // rows, -(-area.bottom // rows)), range(-(-area.right // wide))):
        part = Area(row * rows, column * wide, rows, wide).cut(area)
        if part.width > 0:
            yield part


def _sample(raster: Raster, bands: Sequence[int], scale: float | None, offset: float | None) -> NDArray[np.float32]:
    """Valid pixels (N, bands) of the whole raster in sensor units, from places that are the same in every run."""
    info, random = raster.info, np.random.default_rng(0)
    height, width = min(_SAMPLE, info.height), min(_SAMPLE, info.width)
    found: list[NDArray[np.float32]] = []
    for _ in range(_PIECES):
        row, column = int(random.integers(info.height - height + 1)), int(random.integers(info.width - width + 1))
        if raster.stored(bands, Area(row, column, height, width)):
            image, valid = raster.read(
                bands, row=row, column=column, height=height, width=width, scale=scale, offset=offset
            )
            found.append(image[:, valid].T)
        if sum(map(len, found)) >= _PIXELS or (height, width) == (info.height, info.width):
            break
    return np.concatenate(found) if found else np.empty((0, len(bands)), dtype=np.float32)


def _components(pixels: NDArray[np.float32], spec: DataSpec) -> Mix:
    """Principal components, each with the mean and standard deviation that the model knows of its band.

    The largest weight of a component is positive. One that the pixels do not have is constant.
    """
    mean = pixels.mean(axis=0, dtype=np.float64)
    centred = pixels - mean
    variances, vectors = np.linalg.eigh(centred.T @ centred / (len(pixels) - 1))
    deviations = np.sqrt(np.maximum(variances, 0))
    rows = []
    for number, (own, spread) in enumerate(zip(spec.mean, spec.std, strict=True), start=1):
        vector, deviation = vectors[:, -number], deviations[-number]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        used = deviation > _LEAST * deviations[-1]
        weights = vector * (spread / deviation) if used else np.zeros_like(vector)
        rows.append(_rounded([*weights, own - weights @ mean]))
    return tuple(rows)


def _by_wavelength(raster: Raster, bands: Sequence[int], wanted: Sequence[str]) -> tuple[tuple[int, ...], Mix]:
    path = raster.info.path
    if unknown := [name for name in wanted if name.lower() not in _RESPONSES]:
        raise UserError(
            f"bands=wavelength: the wavelength of the model's band {unknown[0]!r} is not known; known are "
            f"{', '.join(_RESPONSES)}; list bands instead, such as bands=[4,3,2]"
        )
    found = {band: length for band in bands if (length := _wavelength(raster, band)) is not None}
    if not found:
        raise UserError(
            f"bands=wavelength: {path} does not say its bands' wavelengths (wavelength, CENTRAL_WAVELENGTH_UM); take "
            "bands=mean, bands=pca, or list bands"
        )
    responses = []
    for name in wanted:
        centre, width = _RESPONSES[name.lower()]
        apart = np.array([length - centre for length in found.values()]) / width
        response = np.where(np.abs(apart) <= 1, np.exp2(-4 * apart**2), 0)  # a half at half the width
        if not response.any():
            raise UserError(
                f"bands=wavelength: {path} has no band within {width * 1000:g} nm of {name}, {centre * 1000:g} nm; its "
                f"bands lie from {min(found.values()) * 1000:g} to {max(found.values()) * 1000:g} nm; list bands"
            )
        responses.append(response / response.sum())
    weights = np.array(responses)
    used = weights.max(axis=0) > 0
    kept = tuple(band for band, use in zip(found, used, strict=True) if use)
    return kept, tuple(_rounded([*row, 0.0]) for row in weights[:, used])


def _wavelength(raster: Raster, band: int) -> float | None:
    """A band's central wavelength in micrometres, as GDAL or an ENVI header say it."""
    tags = {key.lower(): value for key, value in raster.tags(band).items()}
    try:
        if text := raster.tags(band, "IMAGERY").get("CENTRAL_WAVELENGTH_UM") or tags.get("central_wavelength_um"):
            return float(text)
        length = float(tags["wavelength"])
    except (KeyError, ValueError):
        return None
    return length / 1000 if length > 100 else length  # no sensor has 100 micrometres, or 100 nanometres


def _bad_bands(raster: Raster) -> set[int]:
    """Bands that an ENVI header marks as bad."""
    flags = raster.tags(0, "ENVI").get("bbl", "").strip("{} ").split(",")
    return {band for band, flag in enumerate(flags, start=1) if flag.strip() == "0"}


def _row(count: int, group: NDArray[np.intp]) -> tuple[float, ...]:
    row = np.zeros(count + 1)
    row[group] = 1 / len(group)
    return _rounded(row)


def _rounded(row: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in row)
