"""A map sheet before it is printed: one plate per ink, how it will print, and the label of every pixel."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._maps_curves import Points, stroke
from vfmadapt.datasets._maps_styles import Range, Rgb, Style, Tint
from vfmadapt.datasets._procedural import Field, Size, blur, draw_polygons, warp

NAMES = ("background", "railway", "road", "river", "vineyard", "lake", "built-up")
"""Classes in the order of their labels."""
LINES = (1, 2, 3)
"""Labels of what is a line."""


@dataclass(frozen=True)
class Press:
    """How a plate prints: off by (`down`, `right`) pixels, its ink bled by a blur of `bleed` pixels.

    What is covered by more than `least` after the blur becomes ink: below a half it runs.
    """

    down: float
    right: float
    bleed: float
    least: float

    def spread(self, cover: Field) -> Field:
        """A plate's cover (H, W), moved and blurred."""
        if self.down or self.right:
            cover = warp(cover, self.down, self.right)
        return blur(cover, self.bleed)


class Plates:
    """Plates and labels of a sheet that is being drawn; what is drawn later covers what is there.

    So the order of drawing is the precedence of the labels: vineyard, lake, built-up, river, road, railway.

    A label follows the ink as it will lie on the paper, not as it lies on the plate: who traces a sheet sees no other.

    `height` is the ground (H, W), `lake`, `river` and `vineyard` what is drawn of these so far (bool).
    """

    def __init__(self, rng: np.random.Generator, size: Size, style: Style) -> None:
        self.rng, self.size, self.style = rng, size, style
        self.covers: dict[str, Field] = {ink: np.zeros(size, dtype=np.float32) for ink in style.inks}
        self.colours: dict[str, Rgb] = {ink: self.between(tint) for ink, tint in style.inks.items()}
        self.wear = self.among(style.wear)
        self.presses = {ink: self._press(ink) for ink in style.inks}
        self.labels = np.zeros(size, dtype=np.uint8)
        self.height = np.zeros(size, dtype=np.float32)
        self.lake = np.zeros(size, dtype=np.bool_)
        self.river = np.zeros(size, dtype=np.bool_)
        self.vineyard = np.zeros(size, dtype=np.bool_)

    def _press(self, ink: str) -> Press:
        """Black is what the others are set by."""
        down, right = (0.0, 0.0) if ink == "black" else self.rng.normal(0, 0.3 + 0.9 * self.wear, 2).tolist()
        bleed, least = self.rng.uniform(0.25, 0.5 + 0.4 * self.wear), self.rng.uniform(0.15, 0.5)
        return Press(float(down), float(right), float(bleed), float(least))

    def between(self, tint: Tint) -> Rgb:
        """A colour between two, a little off the straight way."""
        low, high = np.asarray(tint)
        mixed = low + self.rng.random() * (high - low) + self.rng.normal(0, 0.015, 3)
        red, green, blue = np.clip(mixed, 0, 1).tolist()
        return red, green, blue

    def draw(self, ink: str, cover: Field) -> None:
        """Add to a plate where `cover` (H, W) is up to 1."""
        np.maximum(self.covers[ink], cover, out=self.covers[ink])

    def lines(self, ink: str, lines: Sequence[Points], width: float) -> None:
        """Add polylines of one width."""
        if lines:
            self.draw(ink, stroke(self.size, lines, width))

    def shapes(self, ink: str, shapes: Sequence[Points]) -> None:
        """Add filled polygons."""
        if shapes:
            self.draw(ink, draw_polygons(self.size, shapes))

    def clear(self, cover: Field, inks: Sequence[str] = ()) -> None:
        """Take away what the plates (all, or the named ones) hold where `cover` is 1: the paper shows."""
        for ink in inks or self.covers:
            self.covers[ink] *= 1 - cover

    def label(self, name: str, cover: Field, ink: str = "black") -> NDArray[np.bool_]:
        """Give the pixels that `cover` reaches in print to a class, and return which these are."""
        press = self.presses[ink]
        area = np.asarray(press.spread(cover) >= press.least)
        self.labels[area] = NAMES.index(name)
        return area

    def place(self, margin: float = 0.0) -> tuple[float, float]:
        """A random point of the sheet, up to `margin` pixels outside of it."""
        height, width = self.size
        x, y = self.rng.uniform((-margin, -margin), (width + margin, height + margin))
        return float(x), float(y)

    def among(self, span: Range) -> float:
        """A number of a range."""
        return float(self.rng.uniform(*span))
