"""The inside of a hollow organ as tables over (length, angle): a bent tube with folds, vessels and a blind end."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._procedural import Field, blur, draw_lines, power_noise, smoothstep, walk

ROWS, COLUMNS = 1000, 640
"""Of the tables; products of 2 and 5, so that noise made by an FFT of this size closes around the tube."""

STEP = 0.2  # millimetres of length per row; as much per column around a tube of 20 mm radius
LENGTH = ROWS * STEP

CLEAR = 3.0  # millimetres around a point in which `Lumen.clear` looks for wall

_GRAINS = 48  # side of the block of unevenness that repeats in space, of half a millimetre each

Points = NDArray[np.float32]


@dataclass(frozen=True)
class Lumen:
    """Tables (ROWS, COLUMNS) over z in millimetres and the angle around the centre line.

    `radius`: of the wall, millimetres; `clear`: its least value within `CLEAR` millimetres; `albedo`: (..., 3) linear
    RGB; `gloss`: strength of highlights; `centre`: (ROWS, 2) x and y of the centre line; `grain`: (_GRAINS cubed, 3),
    by how much the wet surface turns its normals; in space, because a table would stretch on steep folds.
    """

    radius: Field
    clear: Field
    albedo: NDArray[np.float32]
    gloss: Field
    centre: NDArray[np.float32]
    grain: NDArray[np.float32]

    def room(self, points: Points, *, table: Field) -> Field:
        """How far points (n, 3) lie inside the wall of a table, measured towards it within their section; mm."""
        x, y, z = points.T
        centre = self._centre(z)
        dx, dy = x - centre[:, 0], y - centre[:, 1]
        wall = sample(table, z, np.arctan2(dy, dx))
        return np.asarray(wall - np.hypot(dx, dy), dtype=np.float32)

    def at(self, points: Points, table: NDArray[np.float32]) -> NDArray[np.float32]:
        """A table's values (n, ...) where points (n, 3) lie on the wall."""
        x, y, z = points.T
        centre = self._centre(z)
        return sample(table, z, np.arctan2(y - centre[:, 1], x - centre[:, 0]))

    def unevenness(self, points: Points) -> Points:
        """What to add to the normals (n, 3) at points (n, 3)."""
        from scipy.ndimage import map_coordinates

        places = (points * np.float32(2)).T
        turned = [map_coordinates(self.grain[..., i], places, order=1, mode="grid-wrap") for i in range(3)]
        return np.asarray(np.stack(turned, 1), dtype=np.float32)

    def middle(self, z: float) -> NDArray[np.float64]:
        """The point of the centre line at length z."""
        x, y = self._centre(np.array([z], dtype=np.float32))[0]
        return np.array([x, y, z], dtype=np.float64)

    def _centre(self, z: Field) -> NDArray[np.float32]:
        row = np.clip(z / np.float32(STEP), 0, ROWS - 1.001)
        low = row.astype(np.int32)
        share = (row - low)[:, None]
        return np.asarray(self.centre[low] * (1 - share) + self.centre[low + 1] * share)


def sample(table: NDArray[np.float32], z: Field, angle: Field) -> NDArray[np.float32]:
    """Values (n, ...) of a table, bilinear; the first and last row go on outside, columns close around the tube."""
    row = np.clip(z / np.float32(STEP), 0, ROWS - 1.001)
    column = angle * np.float32(COLUMNS / (2 * np.pi)) + np.float32(COLUMNS)
    top, left = row.astype(np.int32), column.astype(np.int32)
    down, right = row - top, column - left
    left, beside = left % COLUMNS, (left + 1) % COLUMNS
    flat, first = table.reshape(ROWS * COLUMNS, *table.shape[2:]), top * COLUMNS
    if table.ndim == 3:
        down, right = down[:, None], right[:, None]
    above = flat[first + left] * (1 - right) + flat[first + beside] * right
    below = flat[first + COLUMNS + left] * (1 - right) + flat[first + COLUMNS + beside] * right
    return np.asarray(above * (1 - down) + below * down)


def make_lumen(rng: np.random.Generator) -> Lumen:
    """Draw a tube of 14 to 24 mm radius; its length runs from z = 0 to the blind end at `LENGTH`."""
    z = (np.arange(ROWS, dtype=np.float32) * np.float32(STEP))[:, None]
    angle = np.linspace(0, 2 * np.pi, COLUMNS, endpoint=False, dtype=np.float32)[None, :]
    size = float(rng.uniform(14, 24))
    smooth = _wall(rng, z, angle, size)
    end = 1 - smoothstep(np.asarray(z), LENGTH - 1.6 * size, LENGTH) ** 2
    radius = (smooth * np.sqrt(np.maximum(end, 0))).astype(np.float32)
    return Lumen(
        radius=radius,
        clear=_clear(radius),
        albedo=_albedo(rng),
        gloss=np.exp(power_noise(rng, (ROWS, COLUMNS), 1.8, outer=120) * np.float32(0.6)).astype(np.float32),
        centre=_centre_line(rng),
        grain=_grain(rng) * np.float32(rng.uniform(0.1, 0.22)),
    )


def _clear(radius: Field) -> Field:
    from scipy.ndimage import minimum_filter

    reach = 2 * round(CLEAR / STEP) + 1
    return np.asarray(minimum_filter(radius, (reach, 2 * reach), mode=("nearest", "wrap")))


def _grain(rng: np.random.Generator) -> NDArray[np.float32]:
    """Smooth vectors of unit variance that repeat after `_GRAINS` cells in each direction."""
    from scipy.ndimage import gaussian_filter

    drawn = rng.standard_normal((_GRAINS, _GRAINS, _GRAINS, 3), dtype=np.float32)
    smooth = gaussian_filter(drawn, (1.1, 1.1, 1.1, 0), mode="wrap")
    return np.asarray(smooth / smooth.std())


def _centre_line(rng: np.random.Generator) -> NDArray[np.float32]:
    """Bends of two wavelengths in both directions; slopes stay below about 0.9."""
    z = np.arange(ROWS) * STEP
    axes = []
    for _ in range(2):
        parts = [(rng.uniform(6, 15), rng.uniform(130, 220)), (rng.uniform(0.5, 2.5), rng.uniform(50, 90))]
        axes.append(sum(a * np.sin(2 * np.pi * (z / wave + rng.random())) for a, wave in parts))
    return np.stack(axes, 1).astype(np.float32)


def _wall(rng: np.random.Generator, z: Field, angle: Field, size: float) -> Field:
    """Radius of the wall: three bands that flatten it, folds that half encircle it, unevenness, polyps."""
    turned = rng.uniform(0, 2 * np.pi) + 0.4 * np.sin(2 * np.pi * z / rng.uniform(60, 140))
    base = size * (1 + rng.uniform(0.03, 0.12) * np.cos(3 * (angle - turned)))
    base = base + power_noise(rng, (ROWS, COLUMNS), 2.4, outer=110, inner=30) * np.float32(rng.uniform(0.2, 0.6))
    raised = np.zeros((ROWS, COLUMNS), dtype=np.float32)
    place = float(rng.uniform(0, 10))
    while place < LENGTH:
        raised = np.maximum(raised, _fold(rng, z, angle, place, size))
        place += float(rng.uniform(0.55, 1.5)) * size
    for _ in range(int(rng.integers(0, 4))):
        raised = np.maximum(raised, _polyp(rng, z, angle, size))
    return np.asarray(base - raised, dtype=np.float32)


def _fold(rng: np.random.Generator, z: Field, angle: Field, place: float, size: float) -> Field:
    """A ridge around part of the tube, rounded at its crest, up to 0.45 of the radius high."""
    facing, extent = rng.uniform(0, 2 * np.pi), rng.uniform(-0.9, 0.3)
    share = smoothstep(np.asarray(np.cos(angle - facing), dtype=np.float32), extent - 0.5, extent + 0.5)
    wobble = sum(rng.normal(0, 1.6) / k * np.sin(k * angle + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3))
    width = rng.uniform(1.2, 2.6)
    away = (z - place - wobble) / width
    profile = np.exp(-(np.abs(away) ** rng.uniform(1.6, 2.6)) / 2)
    return np.asarray(rng.uniform(0.15, 0.45) * size * share * profile, dtype=np.float32)


def _polyp(rng: np.random.Generator, z: Field, angle: Field, size: float) -> Field:
    """A dome of 2 to 5 mm on the wall."""
    width, place, facing = rng.uniform(2, 5), rng.uniform(60, LENGTH - 30), rng.uniform(0, 2 * np.pi)
    around = np.abs((angle - facing + np.pi) % (2 * np.pi) - np.pi) * size
    return np.asarray(width * np.sqrt(np.maximum(1 - (np.hypot(z - place, around) / width) ** 2, 0)), dtype=np.float32)


def _albedo(rng: np.random.Generator) -> NDArray[np.float32]:
    """Mucosa from pale pink to red, with redder patches, two layers of vessels and traces of yellow mucus."""
    base = np.array([rng.uniform(0.6, 0.85), rng.uniform(0.16, 0.29), rng.uniform(0.11, 0.21)])
    patches = power_noise(rng, (ROWS, COLUMNS), 1.6, outer=150) * rng.uniform(0.05, 0.12)
    grain = power_noise(rng, (ROWS, COLUMNS), 0.8, outer=20) * rng.uniform(0.03, 0.07)
    redness = patches + _vessels(rng, count=14, width=(1.2, 3.2), depth=rng.uniform(0.3, 0.9))
    redness += _vessels(rng, count=50, width=(0.7, 1.4), depth=rng.uniform(0.3, 0.8))
    absorbed = redness[..., None] * np.array([0.45, 1.3, 1.1]) + grain[..., None]
    colour = base * np.exp(-absorbed)
    mucus = smoothstep(power_noise(rng, (ROWS, COLUMNS), 1.8, outer=90), 1.7, 2.3) * np.float32(rng.uniform(0, 0.7))
    colour += mucus[..., None] * (np.array([0.75, 0.62, 0.3]) - colour)
    return np.clip(colour, 0.02, 0.95).astype(np.float32)


def _vessels(rng: np.random.Generator, *, count: int, width: tuple[float, float], depth: float) -> Field:
    """Wandering lines that close around the tube, thicker and fainter ones among them; 0 without, `depth` on one."""
    lines: list[NDArray[np.float32]] = []
    widths: list[float] = []
    for _ in range(count):
        start = (float(rng.uniform(0, COLUMNS)), float(rng.uniform(0, ROWS)))
        line = walk(rng, (ROWS // 5, COLUMNS // 5), step=8, turn=0.45, start=start)
        thick = float(rng.uniform(*width))
        for shift in (-COLUMNS, 0, COLUMNS):
            lines.append(line + np.array([shift, 0], dtype=np.float32))
            widths.append(thick)
    drawn = blur(draw_lines((ROWS, COLUMNS), lines, widths), 0.7)
    faint = smoothstep(power_noise(rng, (ROWS, COLUMNS), 1.8, outer=150), -0.8, 0.8)
    return np.asarray(drawn * faint * np.float32(depth), dtype=np.float32)
