"""Relief of a map sheet: ground with valleys, contour lines, hachures."""

import numpy as np

from vfmadapt.datasets._maps_curves import Points, lattice
from vfmadapt.datasets._maps_plates import Plates
from vfmadapt.datasets._procedural import Field, blur, coordinates, draw_lines, power_noise, smoothstep


def make_ground(plates: Plates, river: Points | None) -> None:
    """Hills, and a valley where the river will be, so that contour lines accompany it."""
    from scipy.ndimage import distance_transform_edt

    rng = plates.rng
    ground = power_noise(rng, plates.size, rng.uniform(2.6, 3.4), outer=rng.uniform(120, 300))
    if river is not None:
        away = distance_transform_edt(draw_lines(plates.size, [river], [1.0]) < 0.5).astype(np.float32)
        ground = ground * smoothstep(away, 0, 120) + np.minimum(away, 160) / np.float32(rng.uniform(30, 80))
    plates.height = blur(np.asarray(ground, dtype=np.float32), 3)


def _isolines(ground: Field, interval: float, width: float) -> Field:
    """Coverage of the contour lines of multiples of `interval`, `width` pixels wide, none where it is flat."""
    down, right = np.gradient(ground)
    slope = np.hypot(down, right) + np.float32(1e-4)
    level = ground / np.float32(interval)
    away = np.abs(level - np.round(level)) * np.float32(interval) / slope
    return np.asarray(np.clip(width / 2 + 0.5 - away, 0, 1) * (slope > 2e-3), dtype=np.float32)


def draw_contours(plates: Plates) -> None:
    """Contour lines in brown, every fifth one thicker or every second one broken."""
    rng, ground = plates.rng, plates.height
    interval = float(np.ptp(ground)) / rng.uniform(4, 16)
    width = float(rng.uniform(0.7, 1.3))
    if rng.random() < 0.4:
        u, v = coordinates(plates.size, 0.4)
        gaps = ((u // 9 + v // 9) % 2 > 0).astype(np.float32)
        plates.draw("brown", _isolines(ground + np.float32(interval / 2), interval * 2, width + 0.2) * gaps)
        plates.draw("brown", _isolines(ground, interval * 2, width))
    else:
        plates.draw("brown", _isolines(ground, interval, width))
        plates.draw("brown", _isolines(ground, interval * 5, width + 0.9))


def draw_hachures(plates: Plates) -> None:
    """Strokes down the steeper slopes, the thicker the steeper."""
    rng = plates.rng
    down, across = np.gradient(blur(plates.height, 4))
    slope = np.stack([across, down], axis=-1)
    steep = np.hypot(slope[..., 0], slope[..., 1])
    places = lattice(rng, plates.size, float(rng.uniform(3.5, 5)), float(rng.uniform(6, 9)), 0.0, 0.8)
    x, y = np.clip(places.astype(int), 0, np.asarray(plates.size[::-1]) - 1).T
    half = slope[y, x] / np.maximum(steep[y, x], 1e-6)[:, None] * np.float32(rng.uniform(3, 4.5))
    levels = np.quantile(steep, (0.55, 0.8, 1))
    for low, high, width in zip(levels[:-1], levels[1:], (0.6, 1.4), strict=True):
        chosen = np.flatnonzero((steep[y, x] > low) & (steep[y, x] <= high))
        plates.lines("brown", [np.stack([places[i] - half[i], places[i] + half[i]]) for i in chosen], width)
