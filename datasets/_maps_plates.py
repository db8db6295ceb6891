"""A map sheet before it is printed: one plate per ink, and the label of every pixel."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._maps_curves import Points, stroke
from vfmadapt.datasets._maps_styles import Range, Rgb, Style, Tint
from vfmadapt.datasets._procedural import Field, Size, draw_polygons

NAMES = ("background", "railway", "road", "river", "vineyard", "lake", "built-up")
"""Classes in the order of their labels."""


class Plates:
    """Plates and labels of a sheet that is being drawn; what is drawn later covers what is there.

    So the order of drawing is the precedence of the labels: vineyard, lake, built-up, river, road, railway.

    `height` is the ground (H, W), `lake`, `river` and `vineyard` what is drawn of these so far (bool).
    """

    def __init__(self, rng: np.random.Generator, size: Size, style: Style) -> None:
        self.rng, self.size, self.style = rng, size, style
        self.covers: dict[str, Field] = {ink: np.zeros(size, dtype=np.float32) for ink in style.inks}
        self.colours: dict[str, Rgb] = {ink: self.between(tint) for ink, tint in style.inks.items()}
        self.labels = np.zeros(size, dtype=np.uint8)
        self.height = np.zeros(size, dtype=np.float32)
        self.lake = np.zeros(size, dtype=np.bool_)
        self.river = np.zeros(size, dtype=np.bool_)
        self.vineyard = np.zeros(size, dtype=np.bool_)

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

    def label(self, name: str, cover: Field) -> NDArray[np.bool_]:
        """Give the pixels that are covered by half or more to a class, and return which these are."""
        area = cover >= 0.5
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
