"""Styles of training sheets that belong to no series: signs of the training styles mixed, or drawn anew.

What is drawn anew comes from wide ranges with gaps: hues, periods and symbols of the held-out styles lie in the gaps or
outside, so that these styles are further members of the family, and no training sheet is one of them.
"""

from colorsys import hsv_to_rgb

import numpy as np

from vfmadapt.datasets._maps_styles import (
    ATLAS,
    TRAIN_STYLES,
    Railway,
    Range,
    Road,
    Style,
    Symbol,
    Tint,
)

Spans = tuple[Range, ...]

_HUES: dict[
    str, Spans
] = {  # degrees; survey has 292, 192, 50, 346, 86 and 175 to 180, field 220, 156, 2, 330, 58 and 148
    "black": ((0, 140), (150, 190)),
    "blue": ((164, 180), (202, 240)),
    "brown": ((10, 42), (62, 78)),
    "red": ((4, 54),),
    "green": ((68, 80), (94, 130)),
    "water": ((158, 168), (188, 222)),
}
_PAPER: Spans = ((30, 56),)  # survey has 72 to 75, field 24 to 27
_FACES = (
    "STIXGeneral.ttf",
    "STIXGeneralItalic.ttf",
    "STIXGeneralBolIta.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "DejaVuSans.ttf",
    "DejaVuSans-Oblique.ttf",
)


def training_style(rng: np.random.Generator) -> Style:
    """The style of a training sheet: one of its own, a mixture, or the series that is drawn like the Siegfried map."""
    chance = rng.random()
    return own_style(rng) if chance < 0.5 else mixed_style(rng) if chance < 0.7 else ATLAS


def mixed_style(rng: np.random.Generator) -> Style:
    """Palette, type faces and each thing's sign are any training style's, each by itself."""

    def any_style() -> Style:
        return TRAIN_STYLES[rng.integers(len(TRAIN_STYLES))]

    palette = any_style()
    return Style(
        name="mixed",
        paper=palette.paper,
        inks=palette.inks,
        railways=any_style().railways,
        roads=any_style().roads,
        rivers=any_style().rivers,
        lakes=any_style().lakes,
        vineyards=any_style().vineyards,
        houses=any_style().houses,
        woods=any_style().woods,
        faces=any_style().faces,
        wear=palette.wear,
        halo=palette.halo,
        rocks=palette.rocks,
        vines=palette.vines,
        rows=palette.rows,
    )


def own_style(rng: np.random.Generator) -> Style:
    """Palette and signs from the whole width of what maps have, but for what is held out."""
    signs = mixed_style(rng)
    own = rng.random() < 0.7
    return Style(
        name="own",
        paper=_tint(rng, _PAPER, (0.02, 0.2), (0.86, 1.0)),
        inks=_palette(rng),
        railways=(_railway(rng),),
        roads=(_road(rng, (9, 17)), _road(rng, (6, 10))),
        rivers="tint",
        lakes=signs.lakes,
        vineyards=(_symbol(rng),) if own else signs.vineyards,
        houses=("solid", "hatched", "crossed")[rng.integers(3)],  # what is filled with colour is a road
        woods=signs.woods,
        faces=tuple(str(face) for face in rng.choice(_FACES, 3, replace=False)),
        wear=(0.05, 0.5),
        vines=ATLAS.vines,
        rows=ATLAS.rows,
        rocks=4,  # else a comb of strokes is a railway: most real sheets of mountains have them
    )


def _tint(rng: np.random.Generator, hues: Spans, saturation: Range, value: Range) -> Tint:
    """A colour, and one close by."""
    low, high = hues[rng.integers(len(hues))]
    hue, strong = rng.uniform(low, high) / 360, rng.uniform(*saturation)
    dark, bright = np.sort(rng.uniform(*value, 2)).tolist()
    return hsv_to_rgb(hue, strong, dark), hsv_to_rgb(hue, strong, bright)


def _palette(rng: np.random.Generator) -> dict[str, Tint]:
    return {
        "black": _tint(rng, _HUES["black"], (0.0, 0.6), (0.0, 0.28)),
        "blue": _tint(rng, _HUES["blue"], (0.45, 0.9), (0.35, 0.8)),
        "brown": _tint(rng, _HUES["brown"], (0.4, 0.9), (0.5, 0.88)),
        "water": _tint(rng, _HUES["water"], (0.18, 0.45), (0.74, 0.94)),
        "green": _tint(rng, _HUES["green"], (0.08, 0.32), (0.78, 0.95)),
        "red": _tint(rng, _HUES["red"], (0.4, 0.85), (0.6, 0.96)),
    }


def _railway(rng: np.random.Generator) -> Railway:
    """A railway is black, heavier than any road, and where it is not two thick lines it has a rhythm."""
    kind = rng.choice(["rails"] * 3 + ["blocks"] * 5 + ["core", "ladder", "ticks"])
    width = float(rng.uniform(8, 14))
    wide = (width, width + 1)
    if kind == "rails":
        thick = float(rng.uniform(0.21, 0.32) * width)
        return Railway("rails", wide, (thick, thick))
    if kind == "core":
        return Railway("core", (width + 1, width + 2), (1.6, 2.6))
    if kind == "blocks":
        period = float(rng.uniform(*((8, 17), (27, 36))[rng.integers(2)]))  # survey: 18 to 26
        return Railway("blocks", wide, (1.2, 2.0), (period, period))
    period = float(rng.uniform(6, 11))
    if kind == "ladder":
        return Railway("ladder", wide, (1.4, 2.2), (period, period))
    return Railway("ticks", wide, (2.2, 3.2), (period, period))


def _road(rng: np.random.Generator, width: Range) -> Road:
    thick, shadow = float(rng.uniform(0.8, 1.8)), float(rng.choice([1, 1, rng.uniform(1, 1.8)]))
    wide = float(rng.uniform(*width))
    fill = "red" if rng.random() < 0.8 else ""
    dashed = bool(rng.random() < 0.1)
    return Road((wide, wide + 1), (thick, thick), (thick * shadow, thick * shadow), dashed=dashed, fill=fill)


def _symbol(rng: np.random.Generator) -> Symbol:
    """An upright stem with a stroke or two at it."""
    strokes: list[tuple[tuple[float, float], ...]] = [((0.0, -0.5), (0.0, 0.5))]
    for _ in range(rng.integers(1, 3)):
        at, side, long = float(rng.uniform(-0.5, 0.4)), float(rng.choice([-1, 1])), float(rng.uniform(0.2, 0.45))
        strokes.append(((0.0, at), (side * long, float(np.clip(at + rng.uniform(-0.4, 0.4), -0.5, 0.5)))))
    return tuple(strokes)
