"""A synthetic map sheet: what is on it, in which order it is drawn, and its labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets import _maps_areas as areas
from vfmadapt.datasets._maps_curves import Points, beside, curve, inside, smooth, stroke
from vfmadapt.datasets._maps_family import training_style
from vfmadapt.datasets._maps_lettering import draw_lettering
from vfmadapt.datasets._maps_lines import draw_paths, draw_railway, draw_river, draw_roads, draw_walls
from vfmadapt.datasets._maps_plates import Plates
from vfmadapt.datasets._maps_relief import draw_contours, draw_hachures, make_ground
from vfmadapt.datasets._maps_scan import scan
from vfmadapt.datasets._maps_styles import Style
from vfmadapt.datasets._procedural import Size, coordinates

VERSION = 5
"""Of the generator; another one draws other sheets from the same seeds."""


@dataclass(frozen=True)
class Sheet:
    """A piece of a map: `image` uint8 RGB (H, W, 3), `labels` uint8 (H, W), the name of its style."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    style: str


def render_sheet(seed: int, *, size: Size = (256, 256), style: Style | None = None) -> Sheet:
    """One piece of a map sheet drawn by `seed`, in a style or in that of a training sheet."""
    rng = np.random.default_rng([seed, 4])  # 4: the stream of labelled maps
    plates = Plates(rng, size, style or training_style(np.random.default_rng([seed, 5])))  # 5: of styles
    river = curve(rng, size, step=14, turn=0.22) if rng.random() < 0.7 else None
    make_ground(plates, river)
    _ground(plates)
    rivers = _water(plates, river)
    _lines(plates, rivers)
    draw_lettering(plates, rivers)
    if rng.random() < 0.2:
        _grid(plates)
    return Sheet(scan(plates), plates.labels, plates.style.name)


def _ground(plates: Plates) -> None:
    """Relief, vegetation and lakes."""
    rng = plates.rng
    if rng.random() < 0.9:
        (draw_hachures if rng.random() < 0.15 else draw_contours)(plates)
    for draw, most in (
        (areas.draw_wood, 2),
        (areas.draw_orchard, 2),
        (areas.draw_marsh, 2),
        (areas.draw_vineyard, 3),
    ):
        for _ in range(rng.integers(0, most)):
            draw(plates)
    if rng.random() < 0.35:
        areas.draw_lake(plates)


def _water(plates: Plates, river: Points | None) -> list[Points]:
    """The river of the valley, and streams."""
    rng, drawn = plates.rng, []
    for _ in range(rng.integers(0, 2)):
        stream = curve(rng, plates.size, step=9, turn=0.4)
        drawn.append((stream[: len(stream) // 2] if rng.random() < 0.6 else stream, rng.uniform(1.8, 3.4)))
    if river is not None:
        drawn.append((river, rng.uniform(5, 28) if rng.random() < 0.75 else rng.uniform(1.8, 3.4)))
    for line, width in drawn:
        draw_river(plates, line, float(width))
    return [line for line, _ in drawn]


def _lines(plates: Plates, rivers: list[Points]) -> None:
    """A railway or none, a road or two and those that branch off, free or down the valley; houses and walls beside."""
    rng, style = plates.rng, plates.style
    valley = rivers[-1:]
    rails: list[Points] = []
    lines: list[Points] = []
    if rng.random() < 0.75:
        down = valley and rng.random() < 0.4
        rails = [_accompany(plates, valley[0]) if down else _free(plates, valley, step=32, turn=0.10)]
    for _ in range(rng.choice([0, 1, 1, 2, 2])):
        down = valley and not rails and not lines and rng.random() < 0.3  # else two lines would run in each other
        lines.append(_accompany(plates, valley[0]) if down else _free(plates, rails + lines, step=24, turn=0.14))
    lines += [_branch(plates, line) for line in lines if rng.random() < 0.5]
    draw_paths(plates)
    draw_walls(plates, lines + rails)
    taken = np.maximum(stroke(plates.size, lines + rails, 18), plates.lake | plates.river | plates.vineyard)
    areas.draw_houses(plates, lines, taken)
    draw_roads(plates, [(line, style.roads[rng.integers(len(style.roads))]) for line in lines])
    for line in rails:
        draw_railway(plates, line, style.railways[rng.integers(len(style.railways))])


def _free(plates: Plates, others: list[Points], *, step: float, turn: float) -> Points:
    """The one of six curves that keeps clearest of the lake and of other lines, so that it crosses these steeply."""
    taken = plates.lake | (stroke(plates.size, others, 36) > 0)
    curves = [curve(plates.rng, plates.size, step=step, turn=turn) for _ in range(6)]
    return min(curves, key=lambda line: sum(map(len, inside(line, taken))))


def _branch(plates: Plates, road: Points) -> Points:
    """A road that leaves another one on the sheet, as squarely as the best of six does."""
    rng, (height, width) = plates.rng, plates.size
    on_sheet = np.flatnonzero(((road > 0) & (road < (width, height))).all(axis=1))
    at = int(rng.choice(on_sheet)) if on_sheet.size else len(road) // 2
    at = min(max(at, 1), len(road) - 2)
    along = road[at + 1] - road[at - 1]
    halves = []
    for _ in range(6):
        line = curve(rng, plates.size, step=24, turn=0.14)
        halves.append(line[len(line) // 2 :])
    best = min(halves, key=lambda half: abs(float((half[min(15, len(half) - 1)] - half[0]) @ along)))
    return np.asarray(best - best[0] + road[at], dtype=np.float32)


def _accompany(plates: Plates, river: Points) -> Points:
    """A line down the valley, smoother than the river."""
    away = float(plates.rng.choice([-1, 1]) * plates.rng.uniform(16, 50))
    return smooth(beside(smooth(river, 24), away), 12)


def _grid(plates: Plates) -> None:
    """Two families of thin straight lines across everything."""
    rng = plates.rng
    u, v = coordinates(plates.size, float(rng.normal(0, 0.02)))
    step = float(rng.uniform(60, 160))
    shift = rng.uniform(0, step, 2)
    near = np.minimum(np.abs((u + shift[0]) % step), np.abs((v + shift[1]) % step))
    plates.draw(str(rng.choice(["black", "blue", "brown"])), np.clip(1.2 - near, 0, 1).astype(np.float32))
