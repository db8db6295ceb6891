"""Solids of rooms, and where rays meet them; lengths in metres, x to the right, y down, z ahead."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._procedural import Field

Points = NDArray[np.float32]
FAR = np.float32(1e6)


@dataclass(frozen=True)
class Solid:
    """A box, an ellipsoid, or a cylinder along its own y; a room is a box that is seen from inside.

    `turn` (3, 3) has its axes in columns, `half` is half its size along them; `colour` is linear RGB, `pattern` picks
    how it is textured, `scale` is the size of the texture in metres.
    """

    kind: Literal["box", "ellipsoid", "cylinder", "room"]
    centre: Points
    turn: Points
    half: Points
    colour: Points
    pattern: int
    scale: float

    def local(self, points: Points) -> Points:
        """Points (n, 3) in its own axes, those of its surface within -1..1."""
        return np.asarray((points - self.centre) @ self.turn / self.half)

    def meet(self, origin: Points, ways: Points) -> Field:
        """Distances (n,), in lengths of `ways` (n, 3), at which rays from (3,) or (n, 3) meet it; `FAR` where not."""
        start, way = self.local(origin), ways @ self.turn / self.half
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.kind in ("box", "room"):
                near, far = _slabs(start, way)
                return far if self.kind == "room" else np.where((near < far) & (near > 0), near, FAR)
            if self.kind == "ellipsoid":
                return _first(_quadric(start, way), None, start, way)
            return _cylinder(start, way)

    def normals(self, points: Points) -> Points:
        """Unit normals (n, 3) at points of the surface; those of a room point inwards."""
        inside = self.local(points)
        if self.kind == "ellipsoid":
            own = inside
        elif self.kind == "cylinder":
            flat = np.abs(inside[:, 1:2]) > 1 - 1e-3
            own = np.where(flat, inside * [0, 1, 0], inside * [1, 0, 1])
        else:
            own = np.sign(inside) * (np.abs(inside) == np.abs(inside).max(1, keepdims=True))
            own = -own if self.kind == "room" else own
        world = (own / self.half) @ self.turn.T
        return np.asarray(world / np.maximum(np.linalg.norm(world, axis=1, keepdims=True), 1e-9), dtype=np.float32)


def _slabs(start: Points, way: Points) -> tuple[Field, Field]:
    """Where rays enter and leave the cube -1..1."""
    one, two = (-1 - start) / way, (1 - start) / way
    enters, leaves = np.minimum(one, two), np.maximum(one, two)
    return np.nan_to_num(enters, nan=-float(FAR)).max(-1), np.nan_to_num(leaves, nan=float(FAR)).min(-1)


def _quadric(start: Points, way: Points) -> tuple[Field, Field]:
    """Where rays enter and leave the unit sphere of the axes given; NaN where they miss it."""
    a, b, c = (way * way).sum(-1), (start * way).sum(-1), (start * start).sum(-1) - 1
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _first(met: tuple[Field, Field], within: Field | float | None, start: Points, way: Points) -> Field:
    """The nearer of two distances that is ahead and, with `within`, at most that far along y from the middle."""
    near, far = met
    found = np.full(near.shape, FAR, dtype=np.float32)
    for distance in (far, near):
        fits = distance > 0
        if within is not None:
            fits &= np.abs(start[..., 1] + distance * way[..., 1]) <= within
        found = np.where(fits, distance, found).astype(np.float32)
    return found


def _cylinder(start: Points, way: Points) -> Field:
    """Of the cylinder of radius 1 and half length 1 along y: its side or one of its ends."""
    side = _first(_quadric(start[..., [0, 2]], way[..., [0, 2]]), 1.0, start, way)
    for end in (-1, 1):
        distance = (end - start[..., 1]) / way[..., 1]
        x, z = (start[..., i] + distance * way[..., i] for i in (0, 2))
        side = np.where((distance > 0) & (x * x + z * z <= 1), np.minimum(side, distance), side)
    return np.asarray(side, dtype=np.float32)


def rotation(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Points:
    """Turned about y, then the new x, then the new z; radians."""
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(about_y @ about_x @ about_z, dtype=np.float32)
