"""Anatomy that is drawn: solids in millimetres, cut by a plane at a moment of breath and beat.

x runs to the right of the picture, y down, z through the planes. A scene is a list of solids, painted in order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._procedural import Field

Point = tuple[float, float, float]
Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Moment:
    """When and where a frame is taken: the plane's z in mm, breath 0 (out) to 1 (in), beat 0 (filled) to 1 (empty)."""

    z: float = 0.0
    breath: float = 0.0
    beat: float = 0.0


@dataclass(frozen=True)
class Solid:
    """A lobed ellipsoid of one tissue.

    `radii` in mm, the third inf for what runs through all planes; `angle` in radians. `lobes`: (order, share of the
    radius, phase, turn in radians per mm of z). `lean`: mm in x and y per mm of z. `breath`: its shift at full breath,
    `beat`: its shift in x and y at full beat, `squeeze`: the share of its radii that it loses then. `edge`: mm from
    outside to inside. `label` None: it belongs to what it lies in; `stencil`: other solids can be confined to it.
    `within`: the stencil that it is confined to. `offset` and `texture`: brightness beside the tissue's, and its
    deviation, in units of `paint`'s contrast.
    """

    tissue: str
    centre: Point
    radii: Point
    angle: float = 0.0
    lobes: tuple[tuple[int, float, float, float], ...] = ()
    lean: tuple[float, float] = (0.0, 0.0)
    breath: Point = (0.0, 0.0, 0.0)
    beat: tuple[float, float] = (0.0, 0.0)
    squeeze: float = 0.0
    edge: float = 1.0
    offset: float = 0.0
    texture: float = 0.0
    label: int | None = 0
    stencil: str | None = None
    within: str | None = None

    def cut(self, moment: Moment, z: float) -> tuple[float, float, float, float] | None:
        """Centre and radii (x, y, rx, ry) in the plane z, None where the plane misses it."""
        depth = z - self.centre[2] - self.breath[2] * moment.breath
        height = 1.0 if np.isinf(self.radii[2]) else 1 - (depth / self.radii[2]) ** 2
        if height <= 0.02:  # a sliver thinner than a tenth of the solid
            return None
        size = height**0.5 * (1 - self.squeeze * moment.beat)
        x = self.centre[0] + self.lean[0] * depth + self.breath[0] * moment.breath + self.beat[0] * moment.beat
        y = self.centre[1] + self.lean[1] * depth + self.breath[1] * moment.breath + self.beat[1] * moment.beat
        return x, y, self.radii[0] * size, self.radii[1] * size

    @property
    def reach(self) -> float:
        """The largest share of its radii at which it can lie."""
        return 1 + sum(abs(lobe[1]) for lobe in self.lobes)


@dataclass(frozen=True)
class Plane:
    """Pixels of a frame: tissue coordinates x and y (H, W) of each, `origin` and `pixel` (mm) of the even grid.

    Tissue lies at most `shift` mm from where the even grid has it.
    """

    x: Field
    y: Field
    origin: tuple[float, float]
    pixel: float
    shift: float

    def window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """Rows and columns that hold all within `reach` mm of a point."""
        far = reach + self.shift + 2 * self.pixel
        left, top = ((at - far - start) / self.pixel for at, start in zip((x, y), self.origin, strict=True))
        span = 2 * far / self.pixel
        rows, columns = self.x.shape
        row, column = (int(np.clip(v, 0, n)) for v, n in ((top, rows), (left, columns)))
        last_row, last_column = (int(np.clip(v + span + 1, 0, n)) for v, n in ((top, rows), (left, columns)))
        return slice(row, last_row), slice(column, last_column)


@dataclass
class Picture:
    """What is painted: brightness (H, W), labels (H, W), and the shares of stencils."""

    brightness: Field
    labels: Labels
    stencils: dict[str, Field] = field(default_factory=dict)


def paint(
    solids: Sequence[Solid],
    palette: Mapping[str, float],
    plane: Plane,
    moment: Moment,
    *,
    contrast: float,
    texture: Field,
    thickness: float = 0.0,
) -> Picture:
    """Solids on air, later ones over earlier ones; a pixel's label is that of the last solid that fills half of it.

    Args:
        solids: in order.
        palette: brightness by tissue, "air" included.
        plane: where the pixels lie.
        moment: when.
        contrast: brightness of one unit of a solid's offset and texture.
        texture: noise of deviation 1, (H, W).
        thickness: of the slice, in mm: what is in part of it shows in part.
    """
    shape = plane.x.shape
    picture = Picture(np.full(shape, palette["air"], np.float32), np.zeros(shape, np.uint8))
    depths = moment.z + thickness * np.array([-0.33, 0.0, 0.33] if thickness else [0.0])
    for solid in solids:
        cuts = [cut for z in depths if (cut := solid.cut(moment, float(z))) is not None]
        if not cuts:
            continue
        reach = max(max(c[2:]) for c in cuts) * solid.reach + solid.edge
        at = plane.window(cuts[0][0], cuts[0][1], reach + float(np.hypot(*solid.lean)) * thickness)
        if at[0].start >= at[0].stop or at[1].start >= at[1].stop:
            continue
        share = sum(_share(solid, cut, plane.x[at], plane.y[at], moment.z) for cut in cuts) / np.float32(len(depths))
        if solid.within is not None:
            share = share * picture.stencils[solid.within][at]
        value = palette[solid.tissue] + contrast * solid.offset
        wanted = np.float32(value) + np.float32(contrast * solid.texture) * texture[at]
        picture.brightness[at] += share * (wanted - picture.brightness[at])
        if solid.label is not None:
            picture.labels[at][share > 0.5] = solid.label
        if solid.stencil is not None:
            picture.stencils[solid.stencil] = np.zeros(shape, np.float32)
            picture.stencils[solid.stencil][at] = share
    return picture


def _share(solid: Solid, cut: tuple[float, float, float, float], x: Field, y: Field, z: float) -> Field:
    """How much of each pixel the solid fills, 0 to 1, in one plane."""
    cx, cy, rx, ry = cut
    cos, sin = np.float32(np.cos(solid.angle)), np.float32(np.sin(solid.angle))
    dx, dy = x - np.float32(cx), y - np.float32(cy)
    a, b = (dx * cos + dy * sin) / np.float32(rx), (dy * cos - dx * sin) / np.float32(ry)
    radius = np.sqrt(a * a + b * b)
    limit: Field = np.ones_like(radius)
    if solid.lobes:
        turn = np.arctan2(b, a)
        for order, amplitude, phase, twist in solid.lobes:
            limit += np.float32(amplitude) * np.cos(np.float32(order) * turn + np.float32(phase + twist * z))
    distance = (limit - radius) * np.float32(min(rx, ry))
    return np.asarray(np.clip(distance / np.float32(solid.edge) + np.float32(0.5), 0, 1), dtype=np.float32)


def lobes(
    rng: np.random.Generator, strength: float, *, orders: Sequence[int] = (2, 3, 4, 5), twist: float = 0.02
) -> tuple[tuple[int, float, float, float], ...]:
    """Random lobes, higher orders weaker; `twist`: deviation of their turn in radians per mm."""
    return tuple(
        (k, float(rng.normal(0, strength / k)), float(rng.uniform(0, 2 * np.pi)), float(rng.normal(0, twist)))
        for k in orders
    )


@dataclass(frozen=True)
class Bend:
    """A smooth displacement of tissue, so that no outline is an ellipse and neighbours shift together between planes.

    Waves of (wavelength in mm, direction, phase, phase per mm of z, amplitude in mm in x, and in y).
    """

    waves: tuple[tuple[float, float, float, float, float, float], ...]

    @classmethod
    def random(cls, rng: np.random.Generator, amplitude: float, *, waves: int = 6, turn: float = 0.012) -> "Bend":
        """Waves of 90 to 260 mm that add up to about `amplitude` mm; `turn`: deviation of phases per mm of z."""
        drawn = []
        for _ in range(waves):
            length = float(np.exp(rng.uniform(np.log(90), np.log(260))))
            size = amplitude * length / 260  # longer waves move tissue further, else they would fold it
            drawn.append(
                (length, rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi), rng.normal(0, turn),
                 rng.normal(0, size), rng.normal(0, size))
            )  # fmt: skip
        return cls(tuple(tuple(map(float, wave)) for wave in drawn))  # type: ignore[misc]

    @property
    def reach(self) -> float:
        """The largest displacement in mm."""
        return float(sum(np.hypot(w[4], w[5]) for w in self.waves))

    def plane(self, size: tuple[int, int], origin: tuple[float, float], pixel: float, z: float) -> Plane:
        """The plane at z of H x W pixels of `pixel` mm whose first pixel's centre is `origin` (x, y)."""
        x = (origin[0] + pixel * np.arange(size[1], dtype=np.float32))[None, :]
        y = (origin[1] + pixel * np.arange(size[0], dtype=np.float32))[:, None]
        to_x, to_y = np.zeros((2, *size), np.float32)
        for length, angle, phase, turn, over, down in self.waves:
            k = 2 * np.pi / length
            along, across = x * np.float32(k * np.cos(angle)), y * np.float32(k * np.sin(angle)) + phase + turn * z
            wave = np.sin(along) * np.cos(across) + np.cos(along) * np.sin(across)  # sin of their sum, of fewer sines
            to_x += np.float32(over) * wave
            to_y += np.float32(down) * wave
        return Plane(x + to_x, y + to_y, origin, pixel, self.reach)
