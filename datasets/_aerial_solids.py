"""What stands on the ground of aerial scenes: buildings with roofs of several kinds, trees, cars."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._aerial_canvas import BUILDING, WATER, Canvas, Colour, Points, floats, rectangle, swept, turned
from vfmadapt.datasets._procedural import Field

_CARS: Sequence[tuple[float, float, float]] = (
    (0.60, 0.60, 0.60),
    (0.52, 0.52, 0.51),
    (0.42, 0.43, 0.44),
    (0.30, 0.31, 0.32),
    (0.16, 0.165, 0.17),
    (0.06, 0.06, 0.065),
    (0.035, 0.035, 0.04),
    (0.26, 0.06, 0.05),
    (0.06, 0.09, 0.19),
    (0.25, 0.22, 0.16),
)
"""From the commonest, white to black, to red, blue and beige."""
_GLASS = np.array([0.05, 0.06, 0.075], dtype=np.float32)


@dataclass(frozen=True)
class Building:
    """A block of walls under one roof.

    Args:
        centre: metres.
        length: metres along `angle`.
        width: metres across it.
        angle: direction of the ridge.
        height: of the eaves.
        roof: flat, gable, hip or ribbed (a hall's, of sheet metal).
        pitch: slope of a gable's or a hip's planes, radians.
        colour: of the roof.
        wall: colour of the facades.
    """

    centre: Points
    length: float
    width: float
    angle: float
    height: float
    roof: str
    pitch: float
    colour: Colour
    wall: Colour

    def outline(self) -> Points:
        """Corners on the ground."""
        return rectangle(self.centre, self.length, self.width, self.angle)


@dataclass(frozen=True)
class Tree:
    """A crown."""

    centre: Points
    radius: float
    height: float
    colour: Colour


def draw_solids(canvas: Canvas, solids: Sequence[Building | Tree]) -> None:
    """Draw solids from low to high, so that what is higher shades what is lower; those in water are left out."""
    reach = float(np.hypot(*canvas.shadow)) + float(np.hypot(*canvas.lean))
    shown = [s for s in solids if canvas.shows(s.centre, _size(s) + reach * s.height)]
    for solid in sorted(shown, key=lambda s: s.height):
        stands = solid.centre[None] if isinstance(solid, Tree) else _spots(solid)
        if canvas.any_label(stands, WATER):
            continue
        if isinstance(solid, Tree):
            draw_tree(canvas, solid)
        else:
            draw_building(canvas, solid)


def _size(solid: Building | Tree) -> float:
    return 1.5 * solid.radius if isinstance(solid, Tree) else 0.6 * (solid.length + solid.width)


def _spots(building: Building) -> Points:
    """Points all over a building's ground, so close that no stream passes between them."""
    along, across = (
        np.linspace(-side / 2, side / 2, max(2, int(side / 4))) for side in (building.length, building.width)
    )
    grid = np.stack(np.meshgrid(along, across), -1).reshape(-1, 2).astype(np.float32)
    return building.centre + turned(grid, building.angle)


def draw_building(canvas: Canvas, building: Building) -> None:
    """Shadow, facades that lean into view, roof. All that is seen of it is labelled building."""
    outline = building.outline()
    pitched = building.roof in ("gable", "hip")
    canvas.cast(outline, building.height + (0.2 * building.width if pitched else 0.0))
    lean = canvas.lean * np.float32(building.height)
    canvas.paint(swept(outline, lean), building.wall * np.float32(0.6), BUILDING, raised=True)
    top = outline + lean
    canvas.lift(swept(outline, lean), building.height / 2)  # facades: somewhere between
    canvas.lift([top], partial(_roof_height, building, top.mean(0)))
    for polygon, towards in _facets(building, top) if pitched else [(top, 0.0)]:
        _roof_plane(canvas, building, polygon, canvas.slope(towards, building.pitch if pitched else 0.0))
    if pitched:
        _chimneys(canvas, building, top)
    else:
        _rim(canvas, top)
        _boxes(canvas, building, lean)


def _roof_height(building: Building, middle: Points, x: Field, y: Field) -> Field:
    """Metres above the ground of a roof's surface."""
    if building.roof not in ("gable", "hip"):
        return floats(building.height + 0 * (x + y))
    cos, sin = np.float32(np.cos(building.angle)), np.float32(np.sin(building.angle))
    along = (x - middle[0]) * cos + (y - middle[1]) * sin
    across = (y - middle[1]) * cos - (x - middle[0]) * sin
    inward = building.width / 2 - np.abs(across)
    if building.roof == "hip":
        inward = np.minimum(inward, building.length / 2 - np.abs(along))
    return floats(building.height + np.tan(building.pitch) * np.maximum(inward, 0))


def _facets(building: Building, top: Points) -> list[tuple[Points, float]]:
    """Planes of a pitched roof: outline, and the direction that it falls towards."""
    start, end = (top[0] + top[3]) / 2, (top[1] + top[2]) / 2
    inset = 0.5 * building.width / building.length if building.roof == "hip" else 0.0
    first, second = start + (end - start) * np.float32(inset), end + (start - end) * np.float32(inset)
    side = building.angle + np.pi / 2
    planes = [
        (np.stack([top[0], top[1], second, first]), side - np.pi),
        (np.stack([top[3], top[2], second, first]), side),
    ]
    if inset:
        planes.append((np.stack([top[0], top[3], first]), building.angle - np.pi))
        planes.append((np.stack([top[1], top[2], second]), building.angle))
    return planes


def _roof_plane(canvas: Canvas, building: Building, polygon: Points, light: float) -> None:
    window = canvas.window([polygon])
    if window is None:
        return
    x, y = canvas.where(window)
    along = x * np.float32(np.cos(building.angle)) + y * np.float32(np.sin(building.angle))
    across = y * np.float32(np.cos(building.angle)) - x * np.float32(np.sin(building.angle))
    if building.roof == "ribbed":
        lines = 1 + 0.08 * np.sin(along * np.float32(2 * np.pi / 2.4))  # sheets of 2.4 m
    elif building.roof == "flat":
        lines = np.ones_like(along)
    else:
        lines = 1 + 0.05 * np.sin(across * np.float32(2 * np.pi / 1.1))  # rows of tiles, as far as pixels show them
    texture = floats(canvas.texture(window, 0.05, 0.06) * lines * light)
    canvas.lay(window, building.colour[:, None, None] * texture, BUILDING, raised=True)


def _chimneys(canvas: Canvas, building: Building, top: Points) -> None:
    rng, middle = canvas.rng, top.mean(0)
    for _ in range(int(rng.integers(0, 3))):
        place = turned(floats([rng.uniform(-0.3, 0.3) * building.length, rng.normal(0, 0.8)]), building.angle)
        stack = rectangle(middle + place, 0.9, 0.9, building.angle)
        canvas.cast(stack, 1.6)
        canvas.paint([stack], building.wall * np.float32(0.7), raised=True)
    if rng.random() < 0.12:  # solar panels
        place = turned(floats([0.0, building.width * rng.choice([-0.25, 0.25])]), building.angle)
        panels = rectangle(middle + place, building.length * 0.5, building.width * 0.3, building.angle)
        canvas.paint([panels], floats([0.035, 0.045, 0.08]), fine=0.02)


def _rim(canvas: Canvas, top: Points) -> None:
    """The parapet of a flat roof: light on top, its shade on the roof."""
    middle = top.mean(0)
    inner = middle + (top - middle) * np.float32(0.94)
    lighter = float(canvas.rng.uniform(0.9, 1.35))
    ring = [np.stack([top[i - 1], top[i], inner[i], inner[i - 1]]) for i in range(4)]
    window = canvas.window(ring)
    if window is not None:
        canvas.lay(window, canvas.colour[(slice(None), *window.at)] * np.float32(lighter))


def _boxes(canvas: Canvas, building: Building, lean: Points) -> None:
    """Lift houses, ventilation and skylights of a flat roof."""
    rng = canvas.rng
    skylights = building.roof == "ribbed" and rng.random() < 0.5
    for _ in range(int(min(rng.poisson(building.length * building.width / 130), 14))):
        place = floats([rng.uniform(-0.4, 0.4) * building.length, rng.uniform(-0.4, 0.4) * building.width])
        centre = building.centre + lean + turned(place, building.angle)
        long, wide = (5.0, 1.2) if skylights else rng.uniform(0.8, 3.2, 2)
        box = rectangle(centre, float(long), float(wide), building.angle)
        if not skylights:
            canvas.cast(box, float(rng.uniform(0.6, 2.2)))
        colour = floats([0.42, 0.45, 0.47]) * np.float32(rng.uniform(0.5, 1.2))
        canvas.paint([box], colour, raised=True)


def draw_tree(canvas: Canvas, tree: Tree) -> None:
    """Shadow and a domed crown with a ragged edge; the ground below keeps its label."""
    reach = tree.radius * 1.3
    square = rectangle(tree.centre, 2 * reach, 2 * reach, 0.0)
    trunk = np.float32(max(tree.height - 1.2 * tree.radius, 0.5))
    low = rectangle(tree.centre + canvas.shadow * trunk, 1.5 * tree.radius, 1.5 * tree.radius, np.pi / 8)
    canvas.cast(low, 1.2 * tree.radius, density=0.85)
    window = canvas.window([square])
    if window is None:
        return
    x, y = canvas.where(window)
    x, y = (x - tree.centre[0]) / np.float32(tree.radius), (y - tree.centre[1]) / np.float32(tree.radius)
    away = np.sqrt(x * x + y * y)
    lumps = canvas.fine[window.at]
    window.cover[:] = proc.smoothstep(1 + 0.12 * lumps - away, -0.1, 0.15)
    dome = 0.72 + 0.42 * (x * canvas.to_sun[0] + y * canvas.to_sun[1]) * np.minimum(away, 1)
    texture = np.maximum(dome * (1 + 0.22 * lumps), 0.15)
    canvas.lay(window, tree.colour[:, None, None] * texture.astype(np.float32), raised=True)
    crown = tree.height - tree.radius * (1 - np.sqrt(np.maximum(1 - away * away, 0)))
    shown = window.cover > 0.5
    canvas.heights[window.at][shown] = np.maximum(crown, 0.5)[shown]


def draw_car(canvas: Canvas, centre: Points, angle: float, *, lorry: bool = False) -> None:
    """A car or lorry with its windows and its shadow."""
    rng = canvas.rng
    length, width, height = (rng.uniform(7, 12), 2.5, 3.2) if lorry else (rng.uniform(3.9, 4.9), 1.85, 1.5)
    body = rectangle(centre, length, width, angle)
    canvas.cast(body, height)
    colour = floats(_CARS[int(rng.integers(2 if lorry else len(_CARS)))])
    canvas.paint([body], colour * np.float32(rng.lognormal(0, 0.15)), fine=0.02, raised=True)
    for place, long in ((0.17, 0.14), (-0.3, 0.12)):
        pane = rectangle(centre + turned(floats([place * length, 0]), angle), long * length, width * 0.8, angle)
        canvas.paint([pane], _GLASS, fine=0.0)
