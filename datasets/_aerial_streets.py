"""Streets of aerial scenes with pavements, markings, cars and the trees beside them; rivers and ponds."""

from collections.abc import Sequence

import numpy as np

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._aerial_canvas import BACKGROUND, ROAD, WATER, Canvas, Colour, Points, Window, disc, floats
from vfmadapt.datasets._aerial_plan import Plan, Street
from vfmadapt.datasets._aerial_regions import Region, material
from vfmadapt.datasets._aerial_solids import Tree, draw_car

PAVEMENT = 2.0
"""Metres of pavement on either side of a paved street."""
_PAINT = np.array([0.50, 0.50, 0.48], dtype=np.float32)


def draw_streets(canvas: Canvas, plan: Plan, region: Region, *, paved: bool, parked: float) -> list[Tree]:
    """Draw a plan's streets; only the first cuts' bridge water. The trees beside them are left to be drawn.

    Args:
        canvas: to draw on.
        plan: where the streets lie.
        region: what they are made of.
        paved: with pavements and cars along the kerbs; else the lesser streets are tracks.
        parked: share of the kerb that cars stand at.
    """
    rng = canvas.rng
    streets = sorted((s for s in plan.streets if s.width), key=lambda s: -s.level)  # main streets lie above the others
    side = material(rng, region.pavements)
    tar = material(rng, region.roads)
    track = material(rng, region.soils)
    trees: list[Tree] = []
    if paved:
        for street in streets:
            half = street.width / 2 + PAVEMENT
            _strip(canvas, plan, street, (0, street.length), (-half, half), side, BACKGROUND)
    for street in streets:
        sealed = paved or street.level == 0
        colour = tar * np.float32(rng.lognormal(0, 0.06)) if sealed else track
        half = street.width / 2
        _strip(canvas, plan, street, (0, street.length), (-half, half), colour, ROAD)
        if not sealed:
            _ruts(canvas, plan, street, colour)
    for street in streets:
        if paved or street.level == 0:
            _markings(canvas, plan, street)
            _cars(canvas, plan, street, parked if paved else 0.0)
        if paved and rng.random() < 0.55:
            trees += _avenue(canvas, plan, street, material(rng, region.trees))
    return trees


def _strip(
    canvas: Canvas,
    plan: Plan,
    street: Street,
    along: tuple[float, float],
    aside: tuple[float, float],
    colour: Colour,
    label: int | None,
) -> None:
    spare = None if street.level == 0 else WATER
    band = plan.place(street.band(*along, *aside))
    canvas.paint([band], colour, label, fine=0.05, patchy=0.07, spare=spare)


def _ruts(canvas: Canvas, plan: Plan, street: Street, colour: Colour) -> None:
    """The green strip between a track's wheel marks."""
    green = colour * floats([0.7, 0.85, 0.7])
    _strip(canvas, plan, street, (0, street.length), (-0.35, 0.35), green, None)


def _markings(canvas: Canvas, plan: Plan, street: Street) -> None:
    """Dashes along the middle, stop lines and zebra crossings at the ends of wider streets."""
    if street.width < 6.5:
        return
    dashes = [street.band(at, at + 3, -0.15, 0.15) for at in np.arange(12, street.length - 12, 7)]
    half = street.width / 2 - 0.6
    if canvas.rng.random() < 0.6:
        for end in (6.0, street.length - 9.0):
            dashes += [street.band(end, end + 3, x, x + 0.55) for x in np.arange(-half, half, 1.2)]
    for dash in dashes:
        canvas.paint([plan.place(dash)], _PAINT, fine=0.2, spare=None if street.level == 0 else WATER)


def _cars(canvas: Canvas, plan: Plan, street: Street, parked: float) -> None:
    """Cars parked along the kerbs and under way in the lanes."""
    rng = canvas.rng
    along = np.arctan2(*(street.end - street.start)[::-1])
    kerb = street.width / 2 - 1.1
    places = [(at, side * kerb, parked) for at in np.arange(9, street.length - 9, 5.6) for side in (-1, 1)]
    if street.width < 6:
        places = [p for p in places if p[1] > 0]
    places += [(at, side * 1.6, 0.08) for at in np.arange(4, street.length, 11) for side in (-1, 1)]
    for at, aside, share in places:
        if rng.random() < share:
            point = street.at(at + rng.uniform(-0.4, 0.4), aside)
            place = plan.place(point)
            if canvas.shows(place, 12) and not canvas.any_label(place[None], WATER):
                draw_car(canvas, place, plan.heading(point, along))


def _avenue(canvas: Canvas, plan: Plan, street: Street, colour: Colour) -> list[Tree]:
    """Trees at even distances on one or both pavements; their crowns reach over the street."""
    rng = canvas.rng
    apart, radius = rng.uniform(7, 14), rng.uniform(1.8, 3.8)
    sides = [(-1, 1), (-1,), (1,)][rng.integers(3)]
    found = []
    for side in sides:
        for at in np.arange(5, street.length - 5, apart):
            if rng.random() < 0.8:
                place = plan.place(street.at(at, side * (street.width / 2 + 0.9)))
                found.append(make_tree(rng, place, radius, colour))
    return found


def make_tree(rng: np.random.Generator, place: Points, radius: float, colour: Colour) -> Tree:
    """A tree of about this radius and colour."""
    own = float(radius * rng.lognormal(0, 0.18))
    return Tree(place, own, own * rng.uniform(1.7, 2.6), colour * np.float32(rng.lognormal(0, 0.12)))


def draw_river(canvas: Canvas, colour: Colour, bank: Colour) -> None:
    """A river or canal through the tile, with its banks."""
    rng = canvas.rng
    width = np.exp(rng.uniform(np.log(5), np.log(45))) / canvas.pixel
    line = proc.walk(rng, canvas.size, step=20 / canvas.pixel, turn=rng.uniform(0.03, 0.25))
    everywhere = (slice(0, canvas.size[0]), slice(0, canvas.size[1]))
    shore = rng.uniform(1.5, 6) / canvas.pixel
    ragged = proc.power_noise(rng, canvas.size, 2.6, outer=60 / canvas.pixel)
    ragged *= np.float32(rng.uniform(0, 5) / canvas.pixel)  # 0: a canal
    for wide, what, label in ((width + 2 * shore, bank, None), (width, colour, WATER)):
        cover = proc.draw_lines(canvas.size, [line], [wide])
        _flow(canvas, Window(everywhere, proc.warp(cover, ragged, ragged[::-1])), what, label)


def draw_pond(canvas: Canvas, centre: Points, radius: float, colour: Colour, bank: Colour) -> None:
    """A pond of irregular outline with its bank."""
    angle = np.arctan2(*(disc(floats([0, 0]), 1, 48).T[::-1]))
    wobble = sum(canvas.rng.normal(0, 0.22 / k) * np.sin(k * angle + canvas.rng.uniform(0, 6.3)) for k in (2, 3, 4, 5))
    unit = disc(floats([0, 0]), 1, 48) * np.float32(radius) * (1 + np.asarray(wobble))[:, None].astype(np.float32)
    for scale, what, label in ((1 + 2.5 / radius, bank, None), (1.0, colour, WATER)):
        window = canvas.window([centre + unit * np.float32(scale)])
        if window is not None:
            _flow(canvas, window, what, label)


def _flow(canvas: Canvas, window: Window, colour: Colour, label: int | None) -> None:
    smooth = (0.03, 0.10) if label == WATER else (0.12, 0.15)
    canvas.lay(window, colour[:, None, None] * canvas.texture(window, *smooth), label)


def rows_of(length: float, step: float) -> Sequence[float]:
    """Middles of equal parts of about `step` along a length, from its middle."""
    count = max(1, int(length / step))
    return [float((i + 0.5) * length / count - length / 2) for i in range(count)]
