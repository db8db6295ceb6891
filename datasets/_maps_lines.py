"""Railways, roads, rivers, paths and walls of a map sheet."""

import numpy as np

from vfmadapt.datasets._maps_curves import Points, bars, beside, curve, dashes, inside, normals, smooth, stroke
from vfmadapt.datasets._maps_plates import Plates
from vfmadapt.datasets._maps_styles import Railway, Road
from vfmadapt.datasets._procedural import Field

NARROWEST = 5.0
"""Pixels that a line's label is wide at least: nobody traces a hair line by its ink."""


def draw_river(plates: Plates, line: Points, width: float) -> None:
    """A river `width` pixels wide between banks, below 4 pixels a stream of one stroke; it ends at a lake's shore."""
    for piece in inside(line, ~plates.lake):
        corridor = stroke(plates.size, [piece], max(width, NARROWEST))
        plates.river |= plates.label("river", corridor, "blue")
        leave_paper(plates, [(piece, width)])
        if width < 4:
            plates.lines("blue", [piece], width)
        else:
            plates.clear(stroke(plates.size, [piece], width))
            _fill_river(plates, piece, width)


def _fill_river(plates: Plates, line: Points, width: float) -> None:
    rng = plates.rng
    banks = [beside(line, side * (width / 2 - 0.5)) for side in (-1, 1)]
    plates.lines("blue", banks, float(rng.uniform(0.8, 1.6)))
    if plates.style.rivers == "tint":
        plates.draw("water", stroke(plates.size, [line], width - 1))
        return
    strokes = []
    for at in np.arange(-width / 2 + 2, width / 2 - 1, rng.uniform(2.2, 3.4)):  # paper shows between them
        drift = rng.uniform(-0.4, 0.4)
        strokes += dashes(beside(line, float(at + drift)), float(rng.uniform(30, 120)), float(rng.uniform(2, 16)))
    plates.lines("blue", strokes, float(rng.uniform(0.6, 1.0)))


def leave_paper(plates: Plates, lines: list[tuple[Points, float]]) -> None:
    """Break relief and vegetation beside lines of some width, as far as the style does."""
    halo = plates.among(plates.style.halo)
    for line, width in lines if halo >= 0.5 else ():
        plates.clear(stroke(plates.size, [line], width + 2 * halo), ["brown", "black", "green"])


def draw_roads(plates: Plates, roads: list[tuple[Points, Road]]) -> None:
    """All roads at once, so that they open into one another: casings first, then what lies between them."""
    drawn = []
    for line, road in roads:
        width, left, right = (plates.among(span) for span in (road.width, road.left, road.right))
        side = plates.rng.choice([-1, 1])
        drawn += [(piece, road, width, left, right, side) for piece in inside(line, ~plates.lake)]
    leave_paper(plates, [(line, width) for line, _, width, _, _, _ in drawn])
    for line, road, width, left, right, side in drawn:
        cover = stroke(plates.size, [line], width)
        plates.clear(cover)
        plates.label("road", stroke(plates.size, [line], max(width, NARROWEST)))
        plates.lines("black", [beside(line, side * (width - left) / 2)], left)
        other = beside(line, -side * (width - right) / 2)
        plates.lines("black", dashes(other, 7, 4) if road.dashed else [other], right)
        _parapets(plates, line, width)
    for line, road, width, left, right, side in drawn:
        between = stroke(plates.size, [beside(line, side * (right - left) / 2)], width - left - right)
        plates.clear(between, ["black"])
        if road.fill:
            plates.draw(road.fill, between)


def _parapets(plates: Plates, line: Points, width: float) -> None:
    """The sides of a bridge, where a line crosses a river."""
    sides = [piece for side in (-1, 1) for piece in inside(beside(line, side * (width / 2 + 1.5)), plates.river)]
    plates.lines("black", sides, 1.0)


def draw_railway(plates: Plates, line: Points, railway: Railway) -> None:
    """One railway, over everything that is there but lakes."""
    width, thick, period = (plates.among(span) for span in (railway.width, railway.line, railway.period))
    for piece in inside(line, ~plates.lake):
        leave_paper(plates, [(piece, width)])
        plates.clear(stroke(plates.size, [piece], width))
        plates.label("railway", stroke(plates.size, [piece], max(width, 9.0)))
        if railway.kind == "ticks":
            plates.lines("black", [piece], thick)
            plates.lines("black", bars(piece, period, width / 2, width / 2), max(1.0, thick * 0.6))
        else:
            plates.lines("black", [beside(piece, side * (width - thick) / 2) for side in (-1, 1)], thick)
        if railway.kind == "core":
            plates.lines("black", [piece], max(1.0, thick * 0.5))
        elif railway.kind == "ladder":
            plates.lines("black", bars(piece, period, width / 2 - 0.5, width / 2 - 0.5), 1.0)
        elif railway.kind == "blocks":
            plates.lines("black", dashes(piece, period / 2, period / 2), width - 1)
        _parapets(plates, piece, width)


def draw_paths(plates: Plates) -> None:
    """Footpaths, boundaries and field edges: dashed, dotted and single lines that are no roads."""
    rng = plates.rng
    for _ in range(rng.integers(0, 3)):
        line = curve(rng, plates.size, step=float(rng.uniform(8, 16)), turn=0.3)
        (on, off), width = ((7, 4), (4, 4), (12, 6))[rng.integers(3)], float(rng.uniform(0.8, 1.4))
        for piece in inside(line, ~plates.lake):
            plates.lines("black", dashes(piece, on, off), width)
            if on == 12:  # a boundary: a dot in every gap
                plates.lines("black", dashes(piece[7:], 2, 16), 2.0)
    for _ in range(rng.integers(0, 3)):
        line = curve(rng, plates.size, step=30, turn=0.15)
        start, length = int(rng.integers(max(1, len(line) - 60))), int(rng.integers(20, 60))
        plates.lines("black", inside(line[start : start + length], ~plates.lake), 0.8)


def draw_walls(plates: Plates, along: list[Points]) -> None:
    """Rock faces, dams and cuttings: combs of strokes, black ones free or beside a road, brown ones beside a line."""
    rng = plates.rng
    for _ in range(rng.integers(0, plates.style.rocks + 1)):
        if along and rng.random() < 0.6:
            base = along[rng.integers(len(along))]
            line = beside(base, float(rng.choice([-1, 1]) * rng.uniform(12, 30)))
        else:
            line = curve(rng, plates.size, step=14, turn=0.3)
        start, length = int(rng.integers(max(1, len(line) - 40))), int(rng.integers(20, 110))
        piece = max(inside(line[start : start + length], ~plates.lake), key=len, default=line[:0])
        if len(piece) < 10:
            continue
        tall = rng.uniform(4, 12) * rng.choice([1, 1, 2.5]) * np.abs(1 + 0.4 * rng.normal(size=len(piece)))
        if rng.random() < 0.35:
            plates.lines("brown", bars(piece, float(rng.uniform(2.5, 5)), float(tall.mean() * 1.6), 0), 0.9)
        else:
            _rock(plates, piece, tall.astype(np.float32))


def _rock(plates: Plates, line: Points, tall: Field) -> None:
    """A band between two uneven edges with lines along it, hatched across."""
    rng = plates.rng
    across = normals(line) * tall[:, None]
    high = float(tall.mean())
    shares = np.linspace(1, -0.6, int(rng.integers(2, 5) + high // 12))
    along = [smooth(line + across * np.float32(share), 3) for share in shares]
    plates.lines("black", along, 1.0)
    upper, lower = along[0], along[-1]
    places = range(0, min(len(upper), len(lower)), int(rng.integers(1, 3) + high // 12))
    strokes = [np.stack([upper[i], lower[i]]) + rng.normal(0, 0.5, (2, 2)) for i in places]
    plates.lines("black", [s.astype(np.float32) for s in strokes], 1.0)
