"""Blocks of aerial scenes that are built on: houses, old town, estates, halls, car parks.

Each function paints a block's ground at once and gives back what stands on it.
"""

from dataclasses import replace

import numpy as np

from vfmadapt.datasets._aerial_canvas import Points, floats, rectangle, turned
from vfmadapt.datasets._aerial_plan import Block
from vfmadapt.datasets._aerial_regions import material
from vfmadapt.datasets._aerial_site import Site, Solids
from vfmadapt.datasets._aerial_solids import Building, draw_car
from vfmadapt.datasets._aerial_streets import rows_of


def houses(site: Site) -> Solids:
    """Detached or terraced houses in two rows, each in a garden of its own."""
    rng, block = site.canvas.rng, site.block
    site.canvas.paint(site.ground(block), site.of("lawns"), fine=0.1, patchy=0.15)
    upright = block.height > block.width
    long, deep = max(block.width, block.height), min(block.width, block.height)
    lot = rng.uniform(9, 13) if rng.random() < 0.25 else rng.uniform(15, 24)
    terraced = lot < 13
    setback, depth = rng.uniform(3, 7), rng.uniform(8, 11)
    roof = "hip" if rng.random() < site.region.hipped else "gable"
    found: list[Building] = []
    rows = (-1, 1) if deep > 2 * (setback + depth) + 4 else (rng.choice((-1, 1)),)
    for along in rows_of(long, lot):
        for side in rows:
            _garden(site, upright, (along, lot), side, deep)
            if rng.random() < (0.02 if terraced else 0.1):
                continue
            aside = side * (deep / 2 - setback - depth / 2)
            u, v = _around(block, along, aside, upright)
            width = long / len(rows_of(long, lot)) if terraced else lot * rng.uniform(0.5, 0.75)
            own = roof if rng.random() < 0.8 else str(rng.choice(("gable", "hip", "flat")))
            size, turn = ((width, depth), 0.0) if terraced or width >= depth else ((depth, width), np.pi / 2)
            turn += np.pi / 2 if upright else 0.0
            found.append(site.building(u, v, size, turn, rng.uniform(3.5, 7), own))
            if not terraced and rng.random() < 0.35:
                found.append(_wing(rng, found[-1]))
    return [*found, *site.trees(rng.uniform(9, 16), rng.uniform(0.15, 0.6), (1.2, 3.6), block.shrunk(3))]


def _wing(rng: np.random.Generator, house: Building) -> Building:
    """A lower part across a house."""
    shift = turned(floats([rng.uniform(-0.25, 0.25) * house.length, 0]), house.angle)
    return replace(
        house,
        centre=house.centre + shift,
        length=house.width * rng.uniform(1.3, 1.6),
        width=house.length * rng.uniform(0.4, 0.6),
        angle=house.angle + np.pi / 2,
        height=house.height * 0.97,
    )


def _around(block: Block, along: float, aside: float, upright: bool) -> tuple[float, float]:
    """A point so far from the block's middle along its longer side and across it."""
    u, v = (aside, along) if upright else (along, aside)
    return (block.left + block.right) / 2 + u, (block.top + block.bottom) / 2 + v


def _garden(site: Site, upright: bool, lot: tuple[float, float], side: int, deep: float) -> None:
    """Lawn, drive and, now and then, a pool."""
    rng, (along, width) = site.canvas.rng, lot

    def part(start: float, end: float, first: float, last: float) -> list[Points]:
        one, two = (_around(site.block, a, s, upright) for a, s in ((start, first), (end, last)))
        low, high = np.minimum(one, two), np.maximum(one, two)
        return site.ground(Block(low[0], low[1], high[0], high[1]))

    half, rim = width * 0.5, side * deep / 2
    site.canvas.paint(part(along - half, along + half, 0.0, rim), site.of("lawns", 0.18), fine=0.1, patchy=0.12)
    drive = along + rng.uniform(-0.3, 0.3) * width
    site.canvas.paint(part(drive - 1.5, drive + 1.5, rim, rim - side * 9), site.of("pavements"), patchy=0.08)
    if rng.random() < 0.07:
        pool = along + rng.uniform(-0.2, 0.2) * width
        far = side * rng.uniform(3, 5)
        site.canvas.paint(part(pool - 3.2, pool + 3.2, far - 1.8, far + 3.0), site.of("pavements"))
        site.canvas.paint(part(pool - 2.2, pool + 2.2, far - 0.8, far + 2.0), material(rng, ("pool",)), fine=0.03)


def perimeter(site: Site) -> Solids:
    """Old town: houses wall to wall along the streets around a yard."""
    rng, block, canvas = site.canvas.rng, site.block, site.canvas
    canvas.paint(site.ground(block), site.of("pavements"), patchy=0.1)
    depth = min(rng.uniform(10, 14), 0.4 * min(block.width, block.height))
    canvas.paint(site.ground(block.shrunk(depth + 2)), site.of(str(rng.choice(["lawns", "pavements"]))), patchy=0.15)
    storey = rng.uniform(8, 18)
    found: Solids = []
    middle_u, middle_v = (block.left + block.right) / 2, (block.top + block.bottom) / 2
    for side in (-1, 1):
        for length, turn in ((block.width, 0.0), (block.height - 2 * depth, np.pi / 2)):
            lot = rng.uniform(11, 22)
            for along in rows_of(length, lot):
                aside = side * ((block.height if turn == 0 else block.width) - depth) / 2
                u, v = (middle_u + along, middle_v + aside) if turn == 0 else (middle_u + aside, middle_v + along)
                height = storey * rng.uniform(0.75, 1.2)
                size = (length / len(rows_of(length, lot)) + 0.3, depth)
                found.append(site.building(u, v, size, turn, height, "gable" if rng.random() < 0.75 else "flat"))
    yard = block.shrunk(depth + 6)
    if min(yard.width, yard.height) > 12 and rng.random() < 0.6:
        size = (min(yard.width, 16) * 0.7, min(yard.height, 16) * 0.5)
        found.append(site.building(middle_u, middle_v, size, 0.0, rng.uniform(3, 6), "flat"))
    return found + site.trees(9, 0.4, (1.5, 3), yard)


def towers(site: Site) -> Solids:
    """Estate: slabs on lawns, with a row of cars."""
    rng, block, canvas = site.canvas.rng, site.block, site.canvas
    canvas.paint(site.ground(block), site.of("lawns"), fine=0.1, patchy=0.12)
    upright = bool(rng.random() < 0.5)
    long, deep = (block.height, block.width) if upright else (block.width, block.height)
    height, width = rng.uniform(12, 34), rng.uniform(10, 14)
    found: Solids = []
    _stalls(site, block.left + 4, block.top + 2, block.width - 8)
    for aside in rows_of(deep - 8, max(26.0, height * 1.1)):
        count = max(1, round((long - 10) / rng.uniform(28, 60)))
        for along in rows_of(long - 10, (long - 10) / count - 0.01):
            u, v = _around(block, along, aside, upright)
            size = ((long - 10) / count - rng.uniform(6, 12), width)
            roof = "flat" if rng.random() < 0.75 else "gable"
            found.append(site.building(u, v, size, np.pi / 2 if upright else 0.0, height * rng.uniform(0.9, 1.1), roof))
    return [b for b in found if not isinstance(b, Building) or b.length > 8] + site.trees(11, 0.35, (1.8, 4.2))


def halls(site: Site) -> Solids:
    """Industry and trade: halls on sealed yards with lorries and containers."""
    rng, block, canvas = site.canvas.rng, site.block, site.canvas
    canvas.paint(site.ground(block), site.of(str(rng.choice(["pavements", "roads"]))), fine=0.06, patchy=0.12)
    found: Solids = []
    for along in rows_of(block.width, rng.uniform(35, 70)):
        for aside in rows_of(block.height, rng.uniform(35, 60)):
            size = (rng.uniform(20, 42), rng.uniform(18, 34))
            u, v = (block.left + block.right) / 2 + along, (block.top + block.bottom) / 2 + aside
            roof = "ribbed" if rng.random() < 0.6 else "flat"
            found.append(site.building(u, v, size, rng.choice((0.0, np.pi / 2)), rng.uniform(6, 13), roof))
    for point in site.points(9):
        if rng.random() < 0.25 and canvas.shows(place := site.plan.place(point), 12):
            draw_car(canvas, place, site.plan.heading(point), lorry=rng.random() < 0.7)
    return found + site.trees(14, 0.1, (1.5, 3))


def car_park(site: Site) -> Solids:
    """A car park: the material of a road, but none."""
    rng, block, canvas = site.canvas.rng, site.block, site.canvas
    canvas.paint(site.ground(block), site.of("roads"), fine=0.05, patchy=0.08)
    for v in np.arange(block.top + 2, block.bottom - 6, 16.5):
        _stalls(site, block.left + 2, float(v), block.width - 4)
        if v + 10.5 < block.bottom:
            _stalls(site, block.left + 2, float(v) + 5.2, block.width - 4)
    return site.trees(13, rng.uniform(0, 0.5), (1.2, 2.4))


def _stalls(site: Site, left: float, top: float, length: float) -> None:
    """A row of marked places along u, some taken."""
    rng, canvas = site.canvas.rng, site.canvas
    canvas.paint(site.ground(Block(left, top, left + length, top + 5)), site.of("roads"), patchy=0.06)
    taken = rng.uniform(0.2, 0.95)
    for u in np.arange(left, left + length - 2.5, 2.6):
        middle = floats([u + 1.3, top + 2.5])
        if not canvas.shows(place := site.plan.place(middle), 12):
            continue
        line = rectangle(floats([0, 0]), 4.8, 0.15, np.pi / 2) + floats([u, top + 2.5])
        canvas.paint([site.plan.place(line)], floats([0.5, 0.5, 0.48]), fine=0.2)
        if rng.random() < taken:
            draw_car(canvas, place, site.plan.heading(middle, np.pi / 2))
