"""Blocks of aerial scenes that are not built on: parks, fields, woods, bare soil.

Each function paints a block's ground at once and gives back what stands on it.
"""

import numpy as np

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._aerial_canvas import AGRICULTURAL, BARREN, FOREST, floats
from vfmadapt.datasets._aerial_plan import Block
from vfmadapt.datasets._aerial_site import Site, Solids
from vfmadapt.datasets._aerial_streets import draw_pond, make_tree


def park(site: Site) -> Solids:
    """Lawn, a path, trees, perhaps a pond."""
    rng, block, canvas = site.canvas.rng, site.block, site.canvas
    canvas.paint(site.ground(block), site.of("lawns"), fine=0.09, patchy=0.15)
    path = np.linspace(0, 1, 16)[:, None]
    start, end = floats([block.left, block.top]), floats([block.right, block.bottom])
    wave = floats([1, -1]) * np.sin(path * 6) * min(block.width, block.height) * 0.12
    line = start + (end - start) * path + wave
    ribbon = np.concatenate([line + floats([1.0, -1.0]), (line - floats([1.0, -1.0]))[::-1]])
    canvas.paint([site.plan.place(ribbon.astype(np.float32))], site.of("soils"), patchy=0.05)
    if rng.random() < 0.35 and min(block.width, block.height) > 26:
        centre = site.place((block.left + block.right) / 2, (block.top + block.bottom) / 2)
        radius = rng.uniform(0.2, 0.36) * min(block.width, block.height)
        draw_pond(canvas, centre, radius, site.of("waters"), site.of("lawns"))
    return site.trees(rng.uniform(6, 11), rng.uniform(0.1, 0.45), (1.6, 4.5))


def crops(site: Site) -> Solids:
    """A field with the marks of its rows and of the machines."""
    rng, block, canvas = site.canvas.rng, site.block, site.canvas
    window = canvas.window(site.ground(block.shrunk(rng.uniform(0.2, 1.2))))
    if window is None:
        return []
    canvas.paint(site.ground(block), site.of("lawns"), fine=0.12, patchy=0.15)  # the balk
    x, y = canvas.where(window)
    angle = site.plan.heading(floats([block.left, block.top]), rng.choice((0.0, np.pi / 2)))
    across = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle)) + canvas.patchy[window.at] * np.float32(0.3)
    rows = rng.uniform(0.02, 0.12) * np.sin(across * np.float32(2 * np.pi / rng.uniform(0.9, 4)))
    tracks = rng.uniform(0.0, 0.2) * (np.abs(np.mod(across, np.float32(rng.uniform(12, 24))) - 6) < 0.7)
    texture = canvas.texture(window, rng.uniform(0.04, 0.1), rng.uniform(0.05, 0.2)) * (1 + rows - tracks)
    canvas.lay(window, site.of("crops", 0.15)[:, None, None] * texture.astype(np.float32), AGRICULTURAL)
    return site.trees(18, 0.1, (1.5, 3.5), Block(block.left, block.top - 1, block.right, block.top + 1))


def wood(site: Site) -> Solids:
    """Closed crowns of one or two kinds of trees."""
    rng, canvas = site.canvas.rng, site.canvas
    canvas.paint(site.ground(site.block), site.of("trees") * np.float32(0.55), FOREST, fine=0.25, patchy=0.1)
    kinds = [site.of("trees", 0.15) for _ in range(2)]
    radius = rng.uniform(1.8, 4.2)
    mixed = rng.random()
    return [
        make_tree(rng, site.plan.place(p), radius, kinds[int(rng.random() < mixed)])
        for p in site.points(radius * 1.6, site.block.shrunk(radius * 0.5))
    ]


def bare(site: Site) -> Solids:
    """Bare soil: building sites, pits, fallow ground with tracks of machines."""
    rng, block, canvas = site.canvas.rng, site.block, site.canvas
    window = canvas.window(site.ground(block))
    if window is None:
        return []
    heaps = proc.hillshade(
        canvas.patchy * np.float32(rng.uniform(0.5, 3)), np.arctan2(canvas.to_sun[0], -canvas.to_sun[1]),
        canvas.elevation,
    )  # fmt: skip
    texture = canvas.texture(window, 0.1, rng.uniform(0.1, 0.25)) * (0.5 + 0.5 * np.minimum(heaps[window.at], 1.8))
    canvas.lay(window, site.of("soils", 0.15)[:, None, None] * floats(texture), BARREN)
    for _ in range(int(rng.integers(0, 4))):
        ends = floats([[rng.uniform(block.left, block.right), rng.uniform(block.top, block.bottom)] for _ in "ab"])
        across = floats([-(ends[1] - ends[0])[1], (ends[1] - ends[0])[0]])
        across *= np.float32(1.2 / max(float(np.hypot(*across)), 1.0))
        track = np.stack([ends[0] - across, ends[1] - across, ends[1] + across, ends[0] + across])
        canvas.paint([site.plan.place(track)], site.of("soils", 0.2), BARREN, fine=0.15)
    return site.trees(12, rng.uniform(0, 0.15), (0.8, 1.8))
