"""Lettering and single symbols of a map sheet, in real type faces, letter by letter along a line."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._maps_curves import STEP, Points, line_of, resample
from vfmadapt.datasets._maps_plates import LINES, Plates
from vfmadapt.datasets._procedural import Field, blur

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

_FIRST = ("Ober", "Unter", "Hinter", "Vorder", "Alt", "Neu", "Gross", "Klein", "Hoch", "St. ", "Im ", "")
_STEMS = ("Matt", "Erlen", "Buch", "Stein", "Rüti", "Wald", "Eich", "Moos", "Linden", "Burg", "Hasel", "Sonnen")
_LAST = ("berg", "hof", "wil", "dorf", "bach", "tal", "egg", "au", "acker", "halde", "ried", "feld", "holz", "kirch")
_SHORT = ("Bhf.", "St.", "K.", "R.", "Br.", "M.", "Zgl.", "W.H.", "Stat.")
PLACES = 3  # tried for a name, of which the one that hides the least is taken
_WATER = ("bach", "aach", "wasser", "graben", "see")


@cache
def _font(face: str, size: int) -> "FreeTypeFont":
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / face), size)


def place_name(rng: np.random.Generator) -> str:
    """A made-up name in the manner of the German-speaking Alps."""
    stem = str(rng.choice(_STEMS))
    name = f"{rng.choice(_FIRST)}{stem if rng.random() < 0.5 else stem.lower()}{rng.choice(_LAST)}".strip()
    return name.upper() if rng.random() < 0.12 else name[:1].upper() + name[1:]


class _Writer:
    """Sets letters at twice the sheet's scale."""

    def __init__(self, plates: Plates) -> None:
        from PIL import Image

        self.image = Image.new("L", (2 * plates.size[1], 2 * plates.size[0]))
        self._taken: list[tuple[float, float, float]] = []

    def write(self, text: str, along: Points, face: str, size: float, spacing: float) -> None:
        """Letters whose baseline follows a curve of steps of 2 pixels, `spacing` pixels added between them.

        Nothing is written where letters stand already.
        """
        font = _font(face, round(2 * size))
        places, at = [], 0.0
        for letter in text:
            advance = font.getlength(letter) / 2
            middle = int((at + advance / 2) / STEP)
            if middle + 1 >= len(along):
                return
            (x, y), (dx, dy) = along[middle].tolist(), (along[middle + 1] - along[middle]).tolist()
            if any(np.hypot(x - a, y - b) < max(size, c) for a, b, c in self._taken):
                return
            places.append((letter, x, y, float(-np.degrees(np.arctan2(dy, dx)))))
            at += advance + spacing
        for letter, x, y, turn in places:
            self._set(letter, x, y, turn, font)
            self._taken.append((x, y, size))

    def _set(self, letter: str, x: float, y: float, turn: float, font: "FreeTypeFont") -> None:
        from PIL import Image, ImageChops, ImageDraw

        side = 2 * int(font.size) + 8
        glyph = Image.new("L", (side, side))
        ImageDraw.Draw(glyph).text((side / 2, side / 2), letter, fill=255, font=font, anchor="ms")
        glyph = glyph.rotate(turn, resample=Image.Resampling.BILINEAR)
        left, top = round(2 * x - side / 2), round(2 * y - side / 2)
        under = self.image.crop((left, top, left + side, top + side))
        self.image.paste(ImageChops.lighter(under, glyph), (left, top))

    def cover(self) -> Field:
        """What was written, (H, W)."""
        return np.asarray(self.image.reduce(2), dtype=np.float32) / np.float32(255)


def draw_lettering(plates: Plates, rivers: list[Points]) -> None:
    """Names, numbers and abbreviations in black, names of waters along them in blue or black."""
    rng, style = plates.rng, plates.style
    writer, water = _Writer(plates), _Writer(plates)
    for _ in range(rng.integers(2, 7)):
        size = float(rng.choice([11, 13, 16, 20, 26, 34, 42]) * rng.uniform(0.9, 1.15))
        spacing = float(rng.choice([0, 0, 0, 1, rng.uniform(2, 14)]))
        text = place_name(rng) if rng.random() < 0.8 else str(rng.choice(_SHORT))
        slant = float(rng.choice([0, 0, 0, rng.uniform(-0.9, 0.9)]))
        lines = [_straight(plates.place(30), slant) for _ in range(PLACES)]
        best = min(lines, key=lambda line: _hidden(plates, line[: round(len(text) * size / 4)]))
        writer.write(text, best, str(rng.choice(style.faces)), size, spacing)
    for river in rivers:
        if rng.random() < 0.6 and len(river) > 60:
            start = int(rng.integers(len(river) - 50))
            line = river[start:] if river[start + 50, 0] > river[start, 0] else river[start + 50 :: -1]
            name = str(rng.choice(_STEMS)) + str(rng.choice(_WATER))
            chosen = writer if rng.random() < 0.5 else water
            chosen.write(name, line + line_of((0, 4)), style.faces[1], float(rng.uniform(10, 18)), 3)
    _spot_heights(plates, writer)
    letters = writer.cover()
    if rng.random() < 0.3:  # the engraver left a rim of paper around the letters
        plates.clear(np.clip(blur(letters, 1.5) * 3, 0, 1))
    plates.draw("black", letters)
    plates.draw("blue", water.cover())


def _hidden(plates: Plates, line: Points) -> int:
    """How much of railways, roads and rivers a name at this place would lie on."""
    height, width = plates.size
    x, y = np.clip(line[:, 0].astype(int), 0, width - 1), np.clip(line[:, 1].astype(int) - 4, 0, height - 1)
    return int(np.isin(plates.labels[y, x], LINES).sum())


def _straight(place: tuple[float, float], slant: float) -> Points:
    x, y = place
    return resample(line_of((x, y), (x + 400 * np.cos(slant), y - 400 * np.sin(slant))))


def _spot_heights(plates: Plates, writer: _Writer) -> None:
    """Points with their height, trigonometric points, churches."""
    rng = plates.rng
    for _ in range(rng.integers(0, 4)):
        x, y = plates.place()
        plates.lines("black", [line_of((x, y), (x + 0.5, y))], float(rng.uniform(2.5, 5)))
        if rng.random() < 0.3:
            plates.lines("black", [_ring(x, y, 5, int(rng.choice([3, 24])))], 1.0)
        size = float(rng.choice([10, 13, 18, 24, 34]))
        text = str(rng.integers(300, 2800)) + str(rng.choice(["", "", ".4"]))
        writer.write(text, _straight((x + 5, y + size / 3), 0.0), str(rng.choice(plates.style.faces)), size, 0.5)


def _ring(x: float, y: float, radius: float, corners: int) -> Points:
    turn = np.linspace(0, 2 * np.pi, corners + 1) - np.pi / 2
    ring: NDArray[np.float64] = np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], axis=1)
    return ring.astype(np.float32)
