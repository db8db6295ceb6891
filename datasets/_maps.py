"""Procedural map sheets for pretraining: contours, relief, hachures, roads, rivers, tints, grids, lettering, paper."""

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._procedural import (
    Field,
    Size,
    blur,
    cells,
    coordinates,
    draw_lines,
    draw_polygons,
    hillshade,
    parcels,
    power_noise,
    smoothstep,
    walk,
)

Picture = NDArray[np.uint8]
Rgb = NDArray[np.float32]


class _Sheet:
    """A sheet being printed: ink darkens the paper."""

    def __init__(self, rng: np.random.Generator, size: Size) -> None:
        self.rng, self.size = rng, size
        base = np.array([rng.uniform(0.82, 1.0), rng.uniform(0.8, 0.98), rng.uniform(0.65, 0.97)], dtype=np.float32)
        self.rgb: Rgb = np.broadcast_to(base, (*size, 3)).astype(np.float32)

    def ink(self, low: tuple[float, float, float], high: tuple[float, float, float]) -> Rgb:
        """A colour between two."""
        return self.rng.uniform(low, high).astype(np.float32)

    def print(self, cover: Field, colour: Rgb, strength: float = 1.0) -> None:
        """Lay `colour` over the sheet where `cover` (H, W) is 1."""
        self.rgb += (np.clip(cover, 0, 1) * np.float32(strength))[..., None] * (colour - self.rgb)


def _isolines(height: Field, interval: float, width: float) -> Field:
    """Coverage of level lines at multiples of `interval`, `width` pixels wide."""
    down, right = np.gradient(height)
    slope = np.hypot(down, right) + np.float32(1e-4)
    level = height / np.float32(interval)
    distance = np.abs(level - np.round(level)) * np.float32(interval) / slope
    return np.clip(np.float32(width / 2 + 0.5) - distance, 0, 1).astype(np.float32)


def _relief(sheet: _Sheet, height: Field) -> None:
    rng = sheet.rng
    colour = sheet.ink((0.35, 0.2, 0.1), (0.75, 0.5, 0.35)) if rng.random() < 0.8 else sheet.ink((0.1,) * 3, (0.4,) * 3)
    interval = rng.uniform(0.12, 0.4)
    if rng.random() < 0.35:
        shade = hillshade(height, float(rng.uniform(0, 6.28)), 0.8, float(rng.uniform(8, 30)))
        sheet.rgb *= (1 - np.float32(0.5) * (1 - np.clip(shade, 0, 1)))[..., None]
    if rng.random() < 0.3:  # hypsometric tints
        steps = np.clip(np.floor(height / np.float32(interval * 3)), -4, 4) / 4
        low, high = sheet.ink((0.5, 0.7, 0.4), (0.8, 0.9, 0.7)), sheet.ink((0.6, 0.4, 0.2), (0.95, 0.8, 0.6))
        sheet.rgb = sheet.rgb * np.float32(0.4) + np.float32(0.6) * (low + (steps[..., None] + 1) / 2 * (high - low))
    if rng.random() < 0.75:
        sheet.print(_isolines(height, interval, rng.uniform(0.6, 1.4)), colour, rng.uniform(0.5, 1))
        sheet.print(_isolines(height, interval * 5, rng.uniform(1.4, 2.4)), colour)
    else:  # hachures: strokes down the slope, denser where it is steep
        down, right = np.gradient(blur(height, 3))
        angle, steep = np.arctan2(down, right), np.hypot(down, right)
        y, x = np.mgrid[: sheet.size[0], : sheet.size[1]].astype(np.float32)
        stripes = np.sin((x * -np.sin(angle) + y * np.cos(angle)) * rng.uniform(1.2, 2.2))
        sheet.print(smoothstep(stripes, 0.3, 0.8) * smoothstep(steep, 0.01, 0.06), colour, rng.uniform(0.5, 1))


def _tints(sheet: _Sheet, height: Field) -> None:
    rng, size = sheet.rng, sheet.size
    inks = [
        ((0.6, 0.8, 0.5), (0.85, 0.95, 0.75)),  # woods
        ((0.9, 0.85, 0.6), (1.0, 0.95, 0.8)),  # open ground
        ((0.9, 0.7, 0.65), (1.0, 0.9, 0.85)),  # settlement
    ]
    u, v = coordinates(size, float(rng.uniform(0, 3.14)))
    for low, high in inks:
        if rng.random() < 0.5:
            area = smoothstep(power_noise(rng, size, 2, outer=rng.uniform(50, 160)), rng.uniform(0, 1), 1.05)
            area = (area > 0.5).astype(np.float32)
            sheet.print(area, sheet.ink(low, high), rng.uniform(0.5, 1))
            if rng.random() < 0.4:  # trees or marsh: small signs on the tint
                _, near, _ = cells(rng, u, v, rng.uniform(7, 14))
                sheet.print((near < 0.18) * area, sheet.ink((0.1, 0.3, 0.1), (0.4, 0.6, 0.3)))
    if rng.random() < 0.3:
        number, border = parcels(rng, u, v, rng.uniform(15, 40), rng.uniform(20, 80))
        colours = rng.uniform(0.75, 1.0, (int(number.max()) + 1, 3)).astype(np.float32)
        sheet.rgb *= colours[number]
        sheet.print((border < 0.8).astype(np.float32), sheet.ink((0.2,) * 3, (0.5,) * 3))
    if rng.random() < 0.6:
        water = (height < np.quantile(height[::8, ::8], rng.uniform(0.05, 0.4))).astype(np.float32)
        blue = sheet.ink((0.5, 0.7, 0.8), (0.8, 0.93, 1.0))
        sheet.print(water, blue)
        shore = np.clip(blur(water, 1.0) * (1 - blur(water, 1.0)) * 4, 0, 1)
        sheet.print(shore, sheet.ink((0.1, 0.25, 0.5), (0.3, 0.5, 0.8)))


def _lines(sheet: _Sheet) -> None:
    rng, size = sheet.rng, sheet.size
    for _ in range(rng.integers(0, 4)):
        river = walk(rng, size, step=9, turn=0.35)
        sheet.print(draw_lines(size, [river], [rng.uniform(1, 4)]), sheet.ink((0.2, 0.4, 0.65), (0.5, 0.7, 0.95)))
    for _ in range(rng.integers(1, 6)):
        road, width = walk(rng, size, step=20, turn=rng.uniform(0.05, 0.25)), rng.uniform(2.5, 6)
        style = rng.integers(4)
        dark = sheet.ink((0.0,) * 3, (0.35,) * 3)
        if style == 0:  # cased road
            sheet.print(draw_lines(size, [road], [width]), dark)
            sheet.print(draw_lines(size, [road], [width - 1.7]), sheet.ink((0.8, 0.3, 0.2), (1.0, 1.0, 0.9)))
        elif style == 1:
            sheet.print(draw_lines(size, [road], [rng.uniform(0.8, 2)]), dark)
        else:  # broken line (track, border), or a railway's ticks
            along = _resample(road, 2.0)
            period, share = int(rng.integers(4, 10)), 2
            dashes = [along[i : i + max(2, period // share)] for i in range(0, len(along) - period, period)]
            if style == 3:
                sheet.print(draw_lines(size, [road], [0.9]), dark)
            sheet.print(draw_lines(size, dashes, [rng.uniform(1, 2.5)] * len(dashes)), dark)


def _resample(points: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """Points every `step` pixels along a polyline."""
    lengths = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    at = np.arange(0, lengths[-1], step)
    return np.stack([np.interp(at, lengths, points[:, i]) for i in (0, 1)], axis=1).astype(np.float32)


def _buildings(sheet: _Sheet) -> None:
    rng, size = sheet.rng, sheet.size
    centre = rng.uniform(0, 1, 2) * size[::-1]
    shapes = []
    turn = rng.uniform(0, 1.57)
    for _ in range(rng.integers(10, 120)):
        at = centre + rng.normal(0, min(size) * 0.18, 2)
        w, h = rng.uniform(2, 8, 2)
        corners = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2 * rng.uniform(0.8, 1.6)
        a = turn + rng.choice([0, 0.1, -0.1])
        shapes.append((corners @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + at).astype(np.float32))
    sheet.print(draw_polygons(size, shapes), sheet.ink((0.0, 0.0, 0.0), (0.6, 0.3, 0.3)))


def _lettering(sheet: _Sheet) -> None:
    """Words of made-up glyphs, 2 to 5 short strokes each, upright or along a slant."""
    rng, size = sheet.rng, sheet.size
    for _ in range(rng.integers(1, 9)):
        height = float(rng.choice([5, 6, 7, 8, 10, 14, 20]))
        slant = float(rng.choice([0, 0, 0, rng.uniform(-0.8, 0.8)]))
        at = rng.uniform(0, 1, 2) * size[::-1]
        gap, lines = rng.uniform(0.75, 1.4), []
        alphabet = [
            [rng.choice([0.0, 0.3, 0.6], (2, 2)) * [1, 1.6] for _ in range(rng.integers(2, 5))] for _ in range(12)
        ]
        turn = np.array([[np.cos(slant), np.sin(slant)], [-np.sin(slant), np.cos(slant)]])
        for place in range(rng.integers(3, 11)):
            for stroke in alphabet[rng.integers(12)]:
                lines.append(((stroke * height + [place * gap * height * 0.8, 0]) @ turn + at).astype(np.float32))
        black = rng.random() < 0.8
        colour = sheet.ink((0.0,) * 3, (0.25,) * 3) if black else sheet.ink((0.0, 0.1, 0.4), (0.5, 0.4, 0.8))
        sheet.print(draw_lines(size, lines, [max(1.0, height * rng.uniform(0.08, 0.16))] * len(lines)), colour)


def _paper(sheet: _Sheet) -> Rgb:
    """Scan: grid lines, fold, stains, misregistered channels, blur and grain."""
    rng, size = sheet.rng, sheet.size
    if rng.random() < 0.4:
        u, v = coordinates(size, float(rng.normal(0, 0.03)))
        step, offset = rng.uniform(50, 120), rng.uniform(0, 100, 2)
        grid = np.minimum(np.abs((u + offset[0]) % step), np.abs((v + offset[1]) % step)) < 1
        sheet.print(grid.astype(np.float32), sheet.ink((0.0, 0.0, 0.1), (0.4, 0.4, 0.6)), 0.7)
    stain = power_noise(rng, size, 2.5, outer=200) * np.float32(rng.uniform(0, 0.06))
    fibre = power_noise(rng, size, 0.8, outer=8) * np.float32(rng.uniform(0.003, 0.03))
    rgb = sheet.rgb * (1 + (stain + fibre)[..., None] * np.array([0.8, 1.0, 1.3], dtype=np.float32))
    if rng.random() < 0.3:
        rgb[..., 0] = np.roll(rgb[..., 0], int(rng.integers(-1, 2)), axis=int(rng.integers(2)))
    sigma = float(rng.uniform(0, 1.0))
    return np.stack([blur(np.ascontiguousarray(rgb[..., c]), sigma) for c in range(3)], axis=2)


def render_map(seed: int, *, size: Size = (256, 256)) -> Picture:
    """One piece of a map sheet drawn by `seed`: uint8 RGB (H, W, 3)."""
    rng = np.random.default_rng([seed, 2])  # 2: the stream of maps
    sheet = _Sheet(rng, size)
    height = power_noise(rng, size, rng.uniform(2.4, 3.4), outer=rng.uniform(80, 300))
    _tints(sheet, height)
    if rng.random() < 0.8:
        _relief(sheet, height)
    if rng.random() < 0.6:
        _buildings(sheet)
    _lines(sheet)
    _lettering(sheet)
    rgb = _paper(sheet)
    if rng.random() < 0.15:  # an old black-and-white sheet
        rgb = np.repeat(rgb.mean(axis=2, keepdims=True), 3, axis=2)
    return np.asarray(np.clip(rgb, 0, 1) * 255 + 0.5, dtype=np.uint8)
