"""Styles of map sheets: palette, signatures of lines and areas, type faces, and how worn the scan is.

A pair of numbers is a range that every sheet draws from; widths and distances are in pixels, colours 0..1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Range = tuple[float, float]
Rgb = tuple[float, float, float]
Tint = tuple[Rgb, Rgb]
Symbol = tuple[tuple[tuple[float, float], ...], ...]
"""Strokes in the unit square around (0, 0), y down."""

STAKE: Symbol = (((0, -0.5), (0, 0.5)), ((0, -0.3), (0.22, -0.45), (0.25, -0.15), (0, 0)))
HOOK: Symbol = (((0.2, -0.4), (0, -0.5), (0, 0.35), (-0.15, 0.5), (-0.3, 0.4)),)
CROSS: Symbol = (((-0.35, -0.35), (0.35, 0.35)), ((-0.35, 0.35), (0.35, -0.35)))
BAR: Symbol = (((0, -0.5), (0, 0.5)),)
VEE: Symbol = (((-0.35, -0.4), (0, 0.4), (0.35, -0.4)),)


@dataclass(frozen=True)
class Railway:
    """A railway's signature, `width` wide over all, its lines `line` thick.

    "rails": two lines and the paper between them; "core": with a third line between; "ladder": with a cross bar every
    `period`; "blocks": black and white by turns; "ticks": one line with cross bars.
    """

    kind: Literal["rails", "core", "ladder", "blocks", "ticks"]
    width: Range
    line: Range
    period: Range = (8.0, 12.0)


@dataclass(frozen=True)
class Road:
    """A road's signature: two casings, the right one dashed if `dashed`, over a fill of ink `fill` if given."""

    width: Range
    left: Range
    right: Range
    dashed: bool = False
    fill: str = ""


@dataclass(frozen=True)
class Style:
    """What all sheets of a series have in common.

    Args:
        name: of the series.
        paper: colour of the paper.
        inks: colour of each plate: "black", "blue", "brown", "water" (tint), "green" (tint), "red".
        railways: signatures, one per line drawn.
        roads: signatures, likewise.
        rivers: wide rivers as "strokes" along the stream, or "tint" between banks.
        lakes: "lines" along the shore, "tint", "hatched" (level lines) or "both" (tint and lines).
        vineyards: symbols, of which a vineyard has one.
        houses: "solid", "hatched", "crossed", "outline" or "tint".
        woods: "circles", "tint" (with circles) or "trees".
        faces: files of the roman and the italic type faces (matplotlib's).
        wear: how far paper, inks and scan are from perfect.
        halo: paper that relief and vegetation leave on either side of lines and around parcels, in pixels.
        rocks: rock faces, dams and cuttings per sheet at most.
        vines: from one symbol of a vineyard to the next in its row, and ...
        rows: ... from row to row, as a share of that.
    """

    name: str
    paper: Tint
    inks: Mapping[str, Tint]
    railways: tuple[Railway, ...]
    roads: tuple[Road, ...]
    rivers: Literal["strokes", "tint"]
    lakes: Literal["lines", "tint", "hatched", "both"]
    vineyards: tuple[Symbol, ...]
    houses: Literal["solid", "hatched", "crossed", "outline", "tint"]
    woods: Literal["circles", "tint", "trees"]
    faces: tuple[str, ...]
    wear: Range = (0.2, 0.8)
    halo: Range = (0.0, 3.0)
    rocks: int = 4
    vines: Range = (7.0, 11.0)
    rows: Range = (0.8, 1.1)


_MAIN = Road((12, 20), (0.8, 1.4), (2.0, 4.8))
_SECOND = Road((7, 12), (0.8, 1.4), (0.8, 1.6))
_TRACK = Road((6, 9), (0.8, 1.3), (0.8, 1.3), dashed=True)

ATLAS = Style(  # three plates, thick rails, roads lit from one side: the look of the Siegfried map
    name="atlas",
    paper=((0.84, 0.80, 0.68), (0.97, 0.95, 0.88)),
    inks={
        "black": ((0.0, 0.0, 0.0), (0.12, 0.11, 0.10)),
        "blue": ((0.10, 0.22, 0.50), (0.28, 0.42, 0.70)),
        "brown": ((0.62, 0.36, 0.05), (0.88, 0.60, 0.25)),
        "water": ((0.62, 0.74, 0.84), (0.80, 0.88, 0.92)),
        "green": ((0.72, 0.82, 0.62), (0.86, 0.92, 0.78)),
        "red": ((0.75, 0.20, 0.12), (0.90, 0.40, 0.30)),
    },
    railways=(Railway("rails", (11, 15.5), (2.6, 4.4)),),
    roads=(_MAIN, _SECOND, _TRACK),
    rivers="strokes",
    lakes="lines",
    vineyards=(STAKE, BAR),
    houses="solid",
    woods="circles",
    faces=("STIXGeneral.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"),
    wear=(0.0, 0.7),
    halo=(0.0, 1.5),
    vines=(7, 14),
    rows=(0.8, 1.8),
)

STAFF = Style(  # grey paper, brown relief, hatched towns
    name="staff",
    paper=((0.80, 0.78, 0.72), (0.93, 0.92, 0.88)),
    inks={
        "black": ((0.08, 0.08, 0.08), (0.24, 0.22, 0.20)),
        "blue": ((0.20, 0.38, 0.55), (0.38, 0.55, 0.70)),
        "brown": ((0.45, 0.30, 0.18), (0.66, 0.48, 0.34)),
        "water": ((0.68, 0.78, 0.82), (0.82, 0.88, 0.90)),
        "green": ((0.74, 0.80, 0.66), (0.86, 0.88, 0.78)),
        "red": ((0.62, 0.22, 0.18), (0.78, 0.40, 0.34)),
    },
    railways=(Railway("ladder", (7, 11), (1.2, 2.2), (6, 11)), Railway("core", (10, 14), (1.4, 2.4))),
    roads=(Road((9, 14), (1.0, 1.8), (1.0, 1.8)), _SECOND, _TRACK),
    rivers="tint",
    lakes="both",
    vineyards=(BAR,),
    houses="hatched",
    woods="trees",
    faces=("DejaVuSerif.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf"),
)

TOURIST = Style(  # printed in six colours
    name="tourist",
    paper=((0.90, 0.88, 0.80), (0.99, 0.98, 0.94)),
    inks={
        "black": ((0.02, 0.02, 0.04), (0.18, 0.16, 0.18)),
        "blue": ((0.12, 0.40, 0.68), (0.32, 0.58, 0.82)),
        "brown": ((0.66, 0.44, 0.24), (0.84, 0.62, 0.42)),
        "water": ((0.60, 0.80, 0.90), (0.78, 0.90, 0.96)),
        "green": ((0.66, 0.84, 0.58), (0.82, 0.93, 0.74)),
        "red": ((0.80, 0.28, 0.16), (0.96, 0.55, 0.35)),
    },
    railways=(Railway("blocks", (6.5, 10), (1.2, 1.8), (12, 20)), Railway("rails", (9, 13), (2.2, 3.2))),
    roads=(Road((8, 13), (0.8, 1.4), (0.8, 1.4), fill="red"), _SECOND, _TRACK),
    rivers="tint",
    lakes="tint",
    vineyards=(CROSS,),
    houses="tint",
    woods="tint",
    faces=("DejaVuSans.ttf", "DejaVuSans-Oblique.ttf", "STIXGeneral.ttf"),
)

ENGRAVED = Style(  # one dark plate and a blue one
    name="engraved",
    paper=((0.82, 0.76, 0.60), (0.95, 0.91, 0.80)),
    inks={
        "black": ((0.10, 0.06, 0.03), (0.26, 0.20, 0.14)),
        "blue": ((0.16, 0.28, 0.40), (0.34, 0.44, 0.56)),
        "brown": ((0.14, 0.10, 0.06), (0.40, 0.32, 0.24)),
        "water": ((0.66, 0.74, 0.74), (0.80, 0.84, 0.80)),
        "green": ((0.76, 0.78, 0.62), (0.86, 0.87, 0.74)),
        "red": ((0.50, 0.18, 0.12), (0.66, 0.34, 0.26)),
    },
    railways=(Railway("ticks", (8, 12), (1.8, 3.2), (6, 11)), Railway("rails", (10, 14.5), (2.2, 4.0))),
    roads=(_MAIN, Road((8, 13), (1.6, 2.6), (0.8, 1.2)), _SECOND),
    rivers="strokes",
    lakes="hatched",
    vineyards=(STAKE,),
    houses="crossed",
    woods="trees",
    faces=("STIXGeneral.ttf", "STIXGeneralItalic.ttf", "DejaVuSerif-Italic.ttf"),
    wear=(0.4, 1.0),
)

SURVEY = Style(  # held out for testing: violet lines, olive relief, another set of everything
    name="survey",
    paper=((0.84, 0.86, 0.78), (0.94, 0.95, 0.90)),
    inks={
        "black": ((0.14, 0.06, 0.16), (0.24, 0.16, 0.28)),
        "blue": ((0.06, 0.36, 0.44), (0.20, 0.50, 0.58)),
        "brown": ((0.48, 0.44, 0.16), (0.64, 0.58, 0.32)),
        "water": ((0.62, 0.80, 0.80), (0.76, 0.88, 0.87)),
        "green": ((0.78, 0.84, 0.70), (0.86, 0.90, 0.80)),
        "red": ((0.66, 0.24, 0.34), (0.80, 0.42, 0.50)),
    },
    railways=(Railway("blocks", (9, 12), (1.2, 1.8), (18, 26)), Railway("rails", (9, 12), (2.4, 3.0))),
    roads=(Road((9, 13), (1.0, 1.4), (1.2, 1.6), fill="red"), Road((7, 10), (1.2, 1.6), (1.2, 1.6), fill="red")),
    rivers="tint",
    lakes="both",
    vineyards=(HOOK,),
    houses="crossed",
    woods="circles",
    faces=("cmr10.ttf", "cmti10.ttf", "cmb10.ttf"),
    wear=(0.1, 0.5),
    halo=(1.5, 3.0),
    rocks=1,
)

FIELD = Style(  # for few-shot: blue and red exchanged against the rest, open houses, level water lines
    name="field",
    paper=((0.86, 0.80, 0.76), (0.95, 0.90, 0.86)),
    inks={
        "black": ((0.06, 0.10, 0.20), (0.18, 0.22, 0.34)),
        "blue": ((0.10, 0.42, 0.30), (0.26, 0.56, 0.44)),
        "brown": ((0.60, 0.30, 0.30), (0.76, 0.48, 0.46)),
        "water": ((0.70, 0.84, 0.76), (0.82, 0.90, 0.84)),
        "green": ((0.84, 0.84, 0.62), (0.92, 0.92, 0.74)),
        "red": ((0.70, 0.30, 0.50), (0.84, 0.46, 0.64)),
    },
    railways=(Railway("ticks", (11, 14), (3.2, 4.4), (14, 20)), Railway("ladder", (12, 15), (1.0, 1.4), (4, 6))),
    roads=(Road((5, 8), (1.8, 2.6), (1.8, 2.6)), Road((12, 16), (0.8, 1.2), (0.8, 1.2), dashed=True)),
    rivers="strokes",
    lakes="hatched",
    vineyards=(VEE,),
    houses="outline",
    woods="trees",
    faces=("cmss10.ttf", "DejaVuSans-BoldOblique.ttf", "cmtt10.ttf"),
    wear=(0.4, 1.0),
)

TRAIN_STYLES = (ATLAS, STAFF, TOURIST, ENGRAVED)
TEST_STYLE = SURVEY
STYLES = {style.name: style for style in (*TRAIN_STYLES, SURVEY, FIELD)}
