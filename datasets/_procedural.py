"""Numpy primitives for procedural imagery: power-law noise, warps, cell and parcel mosaics, polylines, relief shading.

Every function that draws random numbers takes an explicit `rng`; fields are float32 (H, W); lengths are in pixels,
angles in radians counter-clockwise from the column axis. A 256 x 256 field costs a few milliseconds.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Size = tuple[int, int]


def _fast_length(length: int) -> int:
    """The smallest 2^a 3^b 5^c that is not below `length`: FFTs of such lengths are fast."""
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1


def power_noise(
    rng: np.random.Generator,
    size: Size,
    exponent: float = 1.7,
    *,
    outer: float = 128.0,
    inner: float = 0.0,
    anisotropy: float = 1.0,
    angle: float = 0.0,
) -> Field:
    """Gaussian random field whose amplitude spectrum falls as frequency^-exponent, with mean 0 and variance 1.

    Args:
        rng: source of randomness.
        size: (H, W).
        exponent: slope of the amplitude spectrum; 1 is rough (ground texture), 1.7 cloud-like, 3 smooth.
        outer: wavelength (pixels) above which the spectrum is flat.
        inner: wavelength (pixels) below which it is cut off smoothly; 0 cuts nothing.
        anisotropy: how many times longer features are along `angle` than across it.
        angle: direction of elongation.
    """
    height, width = (_fast_length(n) for n in size)
    drawn = rng.standard_normal((height, width // 2 + 1, 2), dtype=np.float32)
    spectrum = drawn.view(np.complex64)[..., 0]
    fy = np.fft.fftfreq(height).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(width).astype(np.float32)[None, :]
    if anisotropy == 1.0:
        squared = fx * fx + fy * fy
    else:
        cos, sin, stretch = np.float32(np.cos(angle)), np.float32(np.sin(angle)), np.float32(np.sqrt(anisotropy))
        squared = ((fx * cos - fy * sin) * stretch) ** 2 + ((fx * sin + fy * cos) / stretch) ** 2
    gain = (squared + np.float32(outer**-2)) ** np.float32(-exponent / 2)
    if inner > 0:
        gain *= np.exp(-squared * np.float32(inner * inner))
    gain[0, 0] = 0
    field = np.fft.irfft2(spectrum * gain, s=(height, width))[: size[0], : size[1]].astype(np.float32)
    field -= field.mean()
    return np.asarray(field / max(float(field.std()), 1e-12), dtype=np.float32)


def ridged(field: Field, sharpness: float = 1.0) -> Field:
    """Crests where a zero-mean field crosses zero: 1 on the crest, 0 from a standard deviation / `sharpness` on."""
    return np.maximum(1 - np.abs(field) * np.float32(sharpness), 0).astype(np.float32)


def smoothstep(field: Field, low: float, high: float) -> Field:
    """0 below `low`, 1 above `high`, a cubic between."""
    t = np.clip((field - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def quantile(field: Field, share: float) -> float:
    """The value below which `share` of a field lies, from some 4000 pixels (a full sort costs more than the field)."""
    step = max(1, min(field.shape) // 64)
    return float(np.quantile(field[::step, ::step], min(max(share, 0.0), 1.0)))


def coordinates(size: Size, angle: float = 0.0) -> tuple[Field, Field]:
    """Coordinates (u along `angle`, v across it) of every pixel, in pixels, from the centre."""
    y = (np.arange(size[0], dtype=np.float32) - np.float32(size[0] / 2))[:, None]
    x = (np.arange(size[1], dtype=np.float32) - np.float32(size[1] / 2))[None, :]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.asarray(x * cos - y * sin), np.asarray(x * sin + y * cos)


def warp(field: Field, rows: Field | float, columns: Field | float) -> Field:
    """Sample a field bilinearly at (row + rows, column + columns); the edge pixel repeats outside."""
    height, width = field.shape
    y = np.clip(np.arange(height, dtype=np.float32)[:, None] + np.float32(rows), 0, height - 1.001)
    x = np.clip(np.arange(width, dtype=np.float32)[None, :] + np.float32(columns), 0, width - 1.001)
    y, x = np.broadcast_arrays(y, x)
    y0, x0 = y.astype(np.int32), x.astype(np.int32)
    fy, fx = y - y0, x - x0
    flat, index = np.ascontiguousarray(field).ravel(), y0 * width + x0
    top = flat[index] * (1 - fx) + flat[index + 1] * fx
    below = flat[index + width] * (1 - fx) + flat[index + width + 1] * fx
    return np.asarray(top * (1 - fy) + below * fy, dtype=np.float32)


def blur(field: Field, sigma: float) -> Field:
    """Gaussian blur with standard deviation `sigma` (pixels); reflects at the edges."""
    if sigma < 0.2:  # narrower than a pixel's own square: nothing to see
        return field
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(field, sigma, truncate=3.0), dtype=np.float32)


def cells(
    rng: np.random.Generator, u: Field, v: Field, scale: float, jitter: float = 0.9
) -> tuple[NDArray[np.int32], Field, Field]:
    """Voronoi cells of a jittered square grid of spacing `scale`.

    Returns:
        the cell's number (0 .. n-1) and the distances to the nearest and the second nearest site, in units of `scale`.
    """
    x, y = u / np.float32(scale), v / np.float32(scale)
    column, row = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    left, top = int(column.min()) - 1, int(row.min()) - 1
    columns, rows = int(column.max()) - left + 2, int(row.max()) - top + 2
    column, row = column - left, row - top
    offset = (0.5 + jitter * (rng.random((rows, columns, 2), dtype=np.float32) - 0.5)).reshape(-1, 2)
    x, y = x - left, y - top
    first = np.full(u.shape, 1e9, dtype=np.float32)
    second, number = first.copy(), np.zeros(u.shape, dtype=np.int32)
    for dr in (-1, 0, 1):
        for dc in (-1, 0, 1):
            index = (row + dr) * columns + (column + dc)
            site = offset[index]
            distance = (column + dc + site[..., 0] - x) ** 2 + (row + dr + site[..., 1] - y) ** 2
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            first = np.where(nearer, distance, first)
            number = np.where(nearer, index.astype(np.int32), number)
    return number, np.sqrt(first), np.sqrt(second)


def parcels(
    rng: np.random.Generator, u: Field, v: Field, width: float, length: float
) -> tuple[NDArray[np.int32], Field]:
    """Field mosaic: strips of about `width` across v, each cut into parcels of about `length` along u.

    Returns:
        the parcel's number (0 .. n-1) and the distance in pixels to its border.
    """
    low, high = float(v.min()), float(v.max())
    strips = int((high - low) / width) + 2
    edges = np.float32(low) + np.cumsum(rng.uniform(0.5, 1.5, strips + 1) * width).astype(np.float32)
    edges -= edges[0] - np.float32(low) + np.float32(1)
    edges[-1] = max(float(edges[-1]), high + width)
    strip = np.clip(np.searchsorted(edges, v, side="right") - 1, 0, strips - 1).astype(np.int32)
    across = np.minimum(v - edges[strip], edges[strip + 1] - v)
    lengths = (length * rng.uniform(0.5, 1.7, strips)).astype(np.float32)
    start = rng.uniform(0, length, strips).astype(np.float32) - np.float32(u.min())
    along = (u + start[strip]) / lengths[strip]
    cell = np.floor(along).astype(np.int32)
    fraction = along - cell
    border = np.minimum(across, np.minimum(fraction, 1 - fraction) * lengths[strip])
    per_strip = int(cell.max()) + 1
    return strip * per_strip + cell, np.maximum(border, 0).astype(np.float32)


def walk(
    rng: np.random.Generator,
    size: Size,
    *,
    step: float = 12.0,
    turn: float = 0.3,
    start: tuple[float, float] | None = None,
) -> NDArray[np.float32]:
    """A wandering polyline across the image: points (n, 2) as (x, y); `turn` is the bend per step (radians)."""
    height, width = size
    heading = rng.uniform(0, 2 * np.pi)
    centre = start if start is not None else (rng.uniform(0.15, 0.85) * width, rng.uniform(0.15, 0.85) * height)
    count = int(1.2 * (height + width) / step)
    halves = []
    for direction in (heading, heading + np.pi):
        headings = direction + np.cumsum(rng.normal(0, turn, count)) * 0.7 + rng.normal(0, turn, count)
        points = np.cumsum(np.stack([np.cos(headings), np.sin(headings)], 1) * step, 0) + np.asarray(centre)
        halves.append(points)
    return np.concatenate([halves[1][::-1], [centre], halves[0]]).astype(np.float32)


def draw_lines(size: Size, lines: Sequence[NDArray[np.float32]], widths: Sequence[float]) -> Field:
    """Coverage (0..1, antialiased) of polylines, each of points (n, 2) as (x, y), with a width in pixels."""
    return _draw(
        size, [(line, max(1, round(2 * width))) for line, width in zip(lines, widths, strict=True)], filled=False
    )


def draw_polygons(size: Size, polygons: Sequence[NDArray[np.float32]], values: Sequence[float] | None = None) -> Field:
    """Filled polygons of points (n, 2) as (x, y), each with its value (0..1, default 1); later ones lie on top."""
    fills = [255] * len(polygons) if values is None else [round(255 * value) for value in values]
    return _draw(size, list(zip(polygons, fills, strict=True)), filled=True)


def _draw(size: Size, shapes: Sequence[tuple[NDArray[np.float32], int]], *, filled: bool) -> Field:
    from PIL import Image, ImageDraw

    image = Image.new("L", (2 * size[1], 2 * size[0]))  # twice the size, then averaged: antialiasing
    canvas = ImageDraw.Draw(image)
    for points, number in shapes:
        flat = (points * 2).ravel().tolist()
        if filled:
            canvas.polygon(flat, fill=number)
        else:
            canvas.line(flat, fill=255, width=number, joint="curve")
    return np.asarray(image.reduce(2), dtype=np.float32) / np.float32(255)


def hillshade(height: Field, azimuth: float, elevation: float, relief: float = 1.0) -> Field:
    """Lambertian shading of a height field (pixels x `relief`), 1 on flat ground, 0 where the sun does not reach.

    Args:
        height: the field.
        azimuth: direction towards the sun, clockwise from north (up).
        elevation: of the sun above the horizon.
        relief: factor on the heights.
    """
    down, right = np.gradient(height * np.float32(relief))
    towards = right * np.float32(np.sin(azimuth)) - down * np.float32(np.cos(azimuth))
    sine, cosine = np.float32(np.sin(elevation)), np.float32(np.cos(elevation))
    light = (sine - cosine * towards) / np.sqrt(1 + down * down + right * right)
    return np.asarray(np.maximum(light / sine, 0), dtype=np.float32)


def remove_specks(labels: NDArray[np.uint8], classes: int, smallest: int, *, ignore: int = 255) -> NDArray[np.uint8]:
    """Give connected regions of fewer than `smallest` pixels to the class that is most common around them.

    Args:
        labels: (H, W) with 0 .. classes-1 and `ignore`.
        classes: number of classes.
        smallest: smallest region kept, in pixels (4-connected).
        ignore: label that is left alone.
    """
    from scipy.ndimage import label, uniform_filter

    small = np.zeros(labels.shape, dtype=bool)
    for value in range(classes):
        regions, count = label(labels == value)
        if count:
            tiny = np.bincount(regions.ravel(), minlength=count + 1) < smallest
            tiny[0] = False
            small |= tiny[regions]
    if not small.any():
        return labels
    kept = [uniform_filter(((labels == value) & ~small).astype(np.float32), 9) for value in range(classes)]
    votes = np.stack(kept)
    winner = np.where(votes.max(0) > 1e-6, votes.argmax(0), ignore).astype(np.uint8)
    return np.where(small & (labels != ignore), winner, labels)
