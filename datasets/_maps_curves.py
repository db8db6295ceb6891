"""Polylines as a draughtsman needs them: even steps, offsets, dashes, cross bars, parts inside an area.

Points are (n, 2) float32 as (x, y) in pixels.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._procedural import Field, Size, draw_lines, walk

Points = NDArray[np.float32]

STEP = 2.0
"""Distance of neighbouring points of every curve made here, in pixels."""
_OUTSIDE = 60  # pixels beyond the frame that parallel curves and smoothing may need
_JOINTLESS = 2.0  # pixels up to which the gap at a bend is not seen


def line_of(*places: tuple[float, float]) -> Points:
    """A polyline through (x, y) places."""
    return np.array(places, dtype=np.float32)


def resample(points: Points, step: float = STEP) -> Points:
    """Points every `step` pixels along a polyline."""
    lengths = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    at = np.arange(0, lengths[-1], step)
    return np.stack([np.interp(at, lengths, points[:, i]) for i in (0, 1)], axis=1).astype(np.float32)


def smooth(points: Points, sigma: float) -> Points:
    """A polyline of even steps with its corners rounded over `sigma` pixels; its ends stay about where they are."""
    from scipy.ndimage import gaussian_filter1d

    return resample(gaussian_filter1d(points, sigma / STEP, axis=0, mode="nearest"))


def curve(rng: np.random.Generator, size: Size, *, step: float, turn: float) -> Points:
    """A smooth line that wanders across the sheet and ends soon outside; `turn` is the bend per `step` (radians)."""
    line = smooth(resample(walk(rng, size, step=step, turn=turn)), step)
    near = np.flatnonzero(((line > -_OUTSIDE) & (line < np.asarray(size[::-1]) + _OUTSIDE)).all(axis=1))
    return line[near[0] : near[-1] + 1]


def stroke(size: Size, lines: Sequence[Points], width: float) -> Field:
    """Coverage of curves drawn `width` pixels wide.

    Wide ones go by longer steps, whose joints leave no burrs; thin ones need no joints, which take most of the time.
    """
    from PIL import Image, ImageDraw

    if width > _JOINTLESS:
        every = max(1, round(width / 2 / STEP))
        return draw_lines(size, [np.concatenate([line[:-1:every], line[-1:]]) for line in lines], [width] * len(lines))
    image = Image.new("L", (2 * size[1], 2 * size[0]))
    pen = ImageDraw.Draw(image)
    for line in lines:
        pen.line((line * 2).ravel().tolist(), fill=255, width=max(1, round(2 * width)))
    return np.asarray(image.reduce(2), dtype=np.float32) / np.float32(255)


def normals(points: Points) -> Points:
    """Unit vectors to the left of the direction of travel (y points down)."""
    along = np.gradient(points, axis=0)
    along /= np.maximum(np.hypot(*along.T), 1e-6)[:, None]
    return np.stack([along[:, 1], -along[:, 0]], axis=1)


def beside(points: Points, distance: float) -> Points:
    """The parallel curve `distance` pixels to the left, to the right where negative."""
    return np.asarray(points + normals(points) * np.float32(distance), dtype=np.float32)


def dashes(points: Points, on: float, off: float) -> list[Points]:
    """Pieces `on` pixels long with gaps of `off` pixels."""
    period, length = max(2, round((on + off) / STEP)), max(2, round(on / STEP) + 1)
    return [points[i : i + length] for i in range(0, len(points) - length, period)]


def bars(points: Points, period: float, left: float, right: float) -> list[Points]:
    """Cross bars every `period` pixels, from `left` pixels on the left to `right` pixels on the right."""
    every = max(1, round(period / STEP))
    at, across = points[::every], normals(points)[::every]
    return [np.stack([p + n * left, p - n * right]).astype(np.float32) for p, n in zip(at, across, strict=True)]


def inside(points: Points, area: NDArray[np.bool_]) -> list[Points]:
    """The pieces of a curve whose points lie in `area` (H, W); points outside the sheet count as at its frame."""
    height, width = area.shape
    x, y = (np.clip(points[:, i].astype(int), 0, n - 1) for i, n in ((0, width), (1, height)))
    kept = area[y, x]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    return [points[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 2]


def blob(rng: np.random.Generator, centre: tuple[float, float], radius: float, rough: float = 0.25) -> Points:
    """A closed outline around `centre` whose distance varies by about `rough` of `radius`."""
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    away = np.ones_like(turn)
    for wave in range(1, 7):
        away += rough * rng.normal() / wave * np.cos(wave * turn + rng.uniform(0, 2 * np.pi))
    away = np.maximum(away, 0.25) * radius
    return np.stack([centre[0] + away * np.cos(turn), centre[1] + away * np.sin(turn)], axis=1).astype(np.float32)


def rectangle(centre: Points, width: float, height: float, angle: float) -> Points:
    """Corners of a rectangle, `width` along `angle`."""
    corners = np.array([[-width, -height], [width, -height], [width, height], [-width, height]]) / 2
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.asarray(corners @ turn + centre, dtype=np.float32)


def lattice(rng: np.random.Generator, size: Size, across: float, down: float, angle: float, jitter: float) -> Points:
    """Places of a staggered grid over the whole sheet, each off by about `jitter` pixels."""
    height, width = size
    reach = int((height + width) / min(across, down)) + 2
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    x, y = (columns + 0.5 * (rows % 2)) * across, rows * down
    turned = np.stack([x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)], axis=-1)
    places = turned.reshape(-1, 2) + rng.uniform(0, 20, 2) + (width / 2, height / 2)
    places = places[((places > -8) & (places < (width + 8, height + 8))).all(axis=1)]
    return np.asarray(places + rng.normal(0, jitter, places.shape), dtype=np.float32)
