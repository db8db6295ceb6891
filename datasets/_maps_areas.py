"""Lakes, vineyards, woods, orchards, marshes and houses of a map sheet."""

import numpy as np

from vfmadapt.datasets._maps_curves import Points, blob, lattice, line_of, normals, rectangle
from vfmadapt.datasets._maps_plates import Plates
from vfmadapt.datasets._procedural import Field, coordinates, draw_polygons


def _in(points: Points, area: Field) -> Points:
    """The points that lie in an area."""
    height, width = area.shape
    x, y = np.clip(points[:, 0].astype(int), 0, width - 1), np.clip(points[:, 1].astype(int), 0, height - 1)
    return points[area[y, x] >= 0.5]


def draw_vineyard(plates: Plates) -> None:
    """A parcel of symbols in rows; always upright, as an engraver sets them."""
    rng = plates.rng
    corners = blob(rng, plates.place(20), float(rng.uniform(40, 110)), 0.3)[:: int(rng.integers(12, 20))]
    area = draw_polygons(plates.size, [corners])
    plates.clear(area * 0.999, ["black", "green"])
    plates.vineyard |= plates.label("vineyard", area)
    step = plates.among(plates.style.vines)
    down = step * plates.among(plates.style.rows)
    places = _in(lattice(rng, plates.size, step, down, float(rng.uniform(-0.5, 0.5)), 0.5), area)
    tall = float(rng.uniform(4.5, 7)) * max(1.0, down / 11)
    symbol = plates.style.vineyards[rng.integers(len(plates.style.vineyards))]
    strokes = [np.asarray(s, dtype=np.float32) * tall for s in symbol]
    plates.lines("black", [stroke + p for p in places for stroke in strokes], float(rng.uniform(0.9, 1.3)))
    if rng.random() < 0.8:
        plates.lines("black", [np.concatenate([corners, corners[:1]])], 0.8)


def draw_wood(plates: Plates) -> None:
    """A wood of tree symbols without order, on a tint or the paper."""
    rng = plates.rng
    outline = blob(rng, plates.place(40), float(rng.uniform(50, 140)))
    area = draw_polygons(plates.size, [outline])
    if plates.style.woods == "tint":
        plates.draw("green", area)
    across, down, angle = (float(rng.uniform(*span)) for span in ((9, 16), (9, 16), (0, 1)))
    places = _in(lattice(rng, plates.size, across, down, angle, 3.5), area)
    rings = []
    turn = np.linspace(0, 2 * np.pi, 11, dtype=np.float32)
    for place in places:
        radius = rng.uniform(1.2, 3.2)
        ring = place + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        rings.append(ring)
        if plates.style.woods == "trees":  # the shadow's side, thicker
            rings += [ring[1:5] + 0.7, place + line_of((0, radius), (radius, radius))]
    plates.lines("black", [r.astype(np.float32) for r in rings], float(rng.uniform(0.7, 1.1)))
    if rng.random() < 0.6:
        plates.lines("black", [place + line_of((0, 0), (0.8, 0)) for place in outline], 1.2)


def draw_orchard(plates: Plates) -> None:
    """Dots or rings in rows, which are no vineyard."""
    rng = plates.rng
    area = draw_polygons(plates.size, [blob(rng, plates.place(), float(rng.uniform(15, 35)), 0.3)[::20]])
    step = float(rng.uniform(8, 13))
    places = _in(lattice(rng, plates.size, step, step, float(rng.uniform(0, 1.5)), 0.3), area)
    plates.lines("black", [p + line_of((0, 0), (0.5, 0)) for p in places], float(rng.uniform(1.5, 3)))


def draw_marsh(plates: Plates) -> None:
    """Short level strokes in blue, which are no lake."""
    rng = plates.rng
    area = draw_polygons(plates.size, [blob(rng, plates.place(), float(rng.uniform(20, 50)))])
    places = _in(lattice(rng, plates.size, 16, float(rng.uniform(3.5, 6)), 0.0, 3.0), area)
    reach = rng.uniform(3, 7, len(places))
    plates.lines("blue", [p + line_of((-r, 0), (r, 0)) for p, r in zip(places, reach, strict=True)], 0.8)


def draw_lake(plates: Plates) -> None:
    """A lake with its shore, filled as the style has it; it clears what lies below."""
    from scipy.ndimage import distance_transform_edt

    rng, style = plates.rng, plates.style
    outline = blob(rng, plates.place(50), float(rng.uniform(55, 140)), 0.35)
    area = draw_polygons(plates.size, [outline])
    plates.clear(area)
    plates.lake |= plates.label("lake", area, "blue")
    if style.lakes in ("tint", "both"):
        plates.draw("water", area)
    # from the shore inwards; beyond the frame the lake goes on
    depth = distance_transform_edt(np.pad(area >= 0.5, 60, mode="edge"))[60:-60, 60:-60].astype(np.float32)
    if style.lakes in ("lines", "both"):
        at, gap, grow = rng.uniform(2.5, 4), rng.uniform(2.2, 3.5), rng.uniform(1.04, 1.2)
        for _ in range(rng.integers(6, 30)):
            plates.draw("blue", np.clip(0.9 - np.abs(depth - np.float32(at)), 0, 1) * area)
            at, gap = at + gap, gap * grow
    elif style.lakes == "hatched":
        level = coordinates(plates.size)[1] % np.float32(rng.uniform(2.6, 4))
        plates.draw("blue", np.clip(1.4 - level, 0, 1) * area)
    plates.lines("blue", [np.concatenate([outline, outline[:1]])], float(rng.uniform(1.0, 2.2)))


def draw_houses(plates: Plates, roads: list[Points], taken: Field) -> None:
    """Houses or a town's blocks beside the roads, in two rows around a centre, and a few alone; none in `taken`."""
    rng = plates.rng
    shapes: list[Points] = []
    for road in roads:
        on_sheet = np.flatnonzero(((road > 0) & (road < plates.size[::-1])).all(axis=1))
        if not on_sheet.size:
            continue
        grown = rng.choice([1.4, 2.0, 2.8])
        centre, reach = rng.choice(on_sheet), rng.uniform(30, 80) * grown
        sides = normals(road)
        for i in range(int(on_sheet[0]), int(on_sheet[-1]), int(rng.integers(6, 10) * grown)):
            near = float(np.exp(-(((i - centre) * 2 / reach) ** 2)))
            for side in (-1, 1):
                deep, away = rng.uniform(8, 12) * grown, rng.uniform(10, 14)
                for _ in range(2):
                    if rng.random() < 0.05 + 0.85 * near:
                        middle = road[i] + sides[i] * np.float32(side * (away + deep / 2))
                        angle = float(np.arctan2(sides[i, 0], sides[i, 1]))
                        shapes.append(rectangle(middle, rng.uniform(7, 17) * grown, deep, angle))
                    away += deep + rng.uniform(4, 8)
    for _ in range(rng.integers(0, 3)):
        long, deep = rng.uniform(10, 36, 2).tolist()
        shapes.append(rectangle(line_of(plates.place())[0], long, deep, float(rng.uniform(0, 2))))
    _print_houses(plates, _apart([s for s in shapes if not _in(_spots(s), taken).size]))


def _spots(shape: Points) -> Points:
    """Five by five points of a rectangle, its corners among them: what lies below it is seldom missed by all."""
    along = np.linspace(0, 1, 5, dtype=np.float32)
    first, second = along.repeat(5)[:, None], np.tile(along, 5)[:, None]
    return np.asarray(shape[0] + first * (shape[1] - shape[0]) + second * (shape[3] - shape[0]), dtype=np.float32)


def _apart(shapes: list[Points]) -> list[Points]:
    """Without those that would overlap one before them."""
    kept: list[Points] = []
    for shape in shapes:
        middle, reach = shape.mean(axis=0), np.hypot(*(shape[2] - shape[0])) / 2
        if all(np.hypot(*(middle - k.mean(axis=0))) > 0.8 * (reach + np.hypot(*(k[2] - k[0])) / 2) for k in kept):
            kept.append(shape)
    return kept


def _print_houses(plates: Plates, shapes: list[Points]) -> None:
    rng, kind = plates.rng, plates.style.houses
    area = draw_polygons(plates.size, shapes)
    plates.clear(area)
    plates.label("built-up", area)
    if kind == "solid":
        plates.draw("black", area)
        return
    edges = [np.concatenate([s, s[:1]]) for s in shapes]
    plates.lines("black", edges, float(rng.uniform(1.0, 1.5)))
    if kind == "tint":
        plates.draw("red", area)
    for turn in {"hatched": (0.8,), "crossed": (0.8, -0.8)}.get(kind, ()):
        stripe = coordinates(plates.size, turn)[1] % np.float32(3.2)
        plates.draw("black", np.clip(1.3 - stripe, 0, 1) * area)
