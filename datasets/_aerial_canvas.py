"""What aerial scenes are painted on: ground colours, labels, heights and shade, and how solids cast and catch light.

All places and lengths are in metres, x to the right and y down from the middle of the tile; polygons are (n, 2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._clouds_surface import Sun
from vfmadapt.datasets._procedural import Field, Size

Points = NDArray[np.float32]
Colour = NDArray[np.float32]  # reflectance of red, green, blue

NAMES = ("background", "building", "road", "water", "barren", "forest", "agricultural")
BACKGROUND, BUILDING, ROAD, WATER, BARREN, FOREST, AGRICULTURAL = range(len(NAMES))

_SKY = np.array([0.22, 0.26, 0.33], dtype=np.float32)  # light that reaches the shade, relative to the sunlit ground's


@dataclass(frozen=True)
class Window:
    """Part of the tile: its slices, and the cover (0..1) of what is to be painted there."""

    at: tuple[slice, slice]
    cover: Field


class Canvas:
    """A tile on which the ground lies, labelled, and on which solids stand.

    Args:
        rng: source of randomness of all that is painted.
        size: (H, W).
        pixel: metres.
        sun: direction towards it.
        lean: metres (x, y) by which the top of a solid is displaced per metre of its height.
    """

    def __init__(self, rng: np.random.Generator, size: Size, pixel: float, sun: Sun, lean: Points) -> None:
        self.rng, self.size, self.pixel, self.lean = rng, size, pixel, lean
        self.elevation = sun.elevation
        self.to_sun = np.array([np.sin(sun.azimuth), -np.cos(sun.azimuth)], dtype=np.float32)
        self.shadow = np.asarray(-self.to_sun / np.tan(sun.elevation), dtype=np.float32)  # metres per metre of height
        self.colour: Field = np.zeros((3, *size), dtype=np.float32)
        self.labels: NDArray[np.uint8] = np.zeros(size, dtype=np.uint8)
        self.shade: Field = np.zeros(size, dtype=np.float32)
        self.heights: Field = np.zeros(size, dtype=np.float32)  # metres above the ground of what is seen
        self.fine = proc.power_noise(rng, size, 0.6, outer=6 / pixel)
        self.patchy = proc.power_noise(rng, size, 1.6, outer=40 / pixel)

    @property
    def reach(self) -> float:
        """Half the diagonal of the tile."""
        return float(np.hypot(*self.size)) / 2 * self.pixel

    def window(self, polygons: Sequence[Points]) -> Window | None:
        """Where polygons lie; None where that is outside the tile."""
        height, width = self.size
        pixels = [p / np.float32(self.pixel) + floats([width / 2, height / 2]) for p in polygons]
        every = np.concatenate(pixels)
        left, top = (max(int(v) - 1, 0) for v in every.min(0))
        right, bottom = (min(int(v) + 2, end) for v, end in zip(every.max(0), (width, height), strict=True))
        if right <= left or bottom <= top:
            return None
        corner = floats([left, top])
        cover = proc.draw_polygons((bottom - top, right - left), [p - corner for p in pixels])
        return Window((slice(top, bottom), slice(left, right)), cover)

    def shows(self, point: Points, margin: float) -> bool:
        """Whether a point lies on the tile or at most `margin` metres beside it."""
        height, width = self.size
        return bool((np.abs(point) < floats([width, height]) / 2 * self.pixel + margin).all())

    def where(self, window: Window) -> tuple[Field, Field]:
        """Coordinates of the pixels of a window: x (1, w) and y (h, 1)."""
        (rows, columns), (height, width) = window.at, self.size
        x = (np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - width / 2)) * self.pixel
        y = (np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5 - height / 2)) * self.pixel
        return np.asarray(x[None], dtype=np.float32), np.asarray(y[:, None], dtype=np.float32)

    def lay(self, window: Window, pixels: Field, label: int | None = None, *, raised: bool = False) -> None:
        """Paint a window with colours (3, h, w) or (3, 1, 1); what is raised lies above all shadows so far."""
        at, cover = window.at, window.cover
        part = self.colour[(slice(None), *at)]
        part += cover * (pixels - part)
        if label is not None:
            self.labels[at][cover > 0.5] = label
        if raised:
            self.shade[at] *= 1 - cover

    def lift(self, polygons: Sequence[Points], heights: float | Callable[[Field, Field], Field]) -> None:
        """Say how high above the ground what polygons show is, in metres: a number, or a function of x and y."""
        window = self.window(polygons)
        if window is not None:
            covered = window.cover > 0.5
            found = np.float32(heights) if not callable(heights) else heights(*self.where(window))
            self.heights[window.at][covered] = np.broadcast_to(found, covered.shape)[covered]

    def texture(self, window: Window, fine: float, patchy: float = 0.0) -> Field:
        """Multiplicative texture around 1 for a window."""
        made = 1 + np.float32(fine) * self.fine[window.at] + np.float32(patchy) * self.patchy[window.at]
        return np.asarray(np.maximum(made, 0.3), dtype=np.float32)

    def paint(
        self,
        polygons: Sequence[Points],
        colour: Colour,
        label: int | None = None,
        *,
        fine: float = 0.05,
        patchy: float = 0.03,
        raised: bool = False,
        spare: int | None = None,
    ) -> None:
        """Paint polygons in one colour with some texture; ground that carries the label `spare` is left alone."""
        window = self.window(polygons)
        if window is None:
            return
        if spare is not None:
            window.cover[self.labels[window.at] == spare] = 0
        self.lay(window, colour[:, None, None] * self.texture(window, fine, patchy), label, raised=raised)

    def cast(self, polygon: Points, height: float, *, density: float = 1.0) -> None:
        """Throw the shadow of a solid with this outline and height."""
        window = self.window(swept(polygon, self.shadow * np.float32(height)))
        if window is not None:
            np.maximum(self.shade[window.at], window.cover * np.float32(density), out=self.shade[window.at])

    def slope(self, towards: float, steepness: float) -> float:
        """Light on a plane that falls towards a direction (radians from the x axis), relative to level ground's."""
        facing = float(np.cos(towards) * self.to_sun[0] + np.sin(towards) * self.to_sun[1])
        light = np.cos(steepness) + np.sin(steepness) * facing / np.tan(self.elevation)
        return float(np.clip(light, 0.35, 1.5))

    def any_label(self, points: Points, label: int) -> bool:
        """Whether one of the points that lie on the tile carries the label."""
        height, width = self.size
        place = np.floor(points / np.float32(self.pixel) + floats([width / 2, height / 2])).astype(int)
        inside = place[((place >= 0) & (place < [width, height])).all(1)]
        return bool((self.labels[inside[:, 1], inside[:, 0]] == label).any())

    def lit(self) -> Field:
        """Colours (3, H, W) with shade."""
        shade = proc.blur(self.shade, 0.25 / self.pixel)  # the sun is a disc
        return np.asarray(self.colour * (1 - shade * (1 - _SKY[:, None, None])), dtype=np.float32)


def floats(values: ArrayLike) -> Points:
    """An array of single precision: a point, an outline, a colour."""
    return np.asarray(values, dtype=np.float32)


def swept(polygon: Points, offset: Points) -> list[Points]:
    """Polygons that together cover what a polygon passes over while it moves by `offset`."""
    after = np.roll(polygon, -1, 0)
    sides = np.stack([polygon, after, after + offset, polygon + offset], 1)
    return [polygon, polygon + offset, *sides]


def rectangle(centre: Points, length: float, width: float, angle: float) -> Points:
    """Corners of a rectangle whose length lies along `angle`."""
    x, y = length / 2, width / 2
    return floats(centre + turned(floats([[-x, -y], [x, -y], [x, y], [-x, y]]), angle))


def turned(points: Points, angle: float) -> Points:
    """Points turned about the origin, from the x axis towards the y axis."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.asarray(points @ floats([[cos, sin], [-sin, cos]]), dtype=np.float32)


def disc(centre: Points, radius: float, corners: int = 16) -> Points:
    """A circle as a polygon."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.asarray(centre + radius * np.stack([np.cos(angle), np.sin(angle)], 1), dtype=np.float32)
