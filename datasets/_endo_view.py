"""What an endoscope sees of a lumen: cast rays, light that falls off with the square of distance, highlights, blur."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._endo_lumen import CLEAR, Lumen, Points
from vfmadapt.datasets._endo_path import Pose
from vfmadapt.datasets._procedural import Field, warp

LIGHTS = ((-2.6, 0.4, -0.5), (2.6, 0.4, -0.5))
"""Places of the two lamps in the camera's coordinates, millimetres."""

_SHORTEST = 0.25  # millimetres that a ray goes on at least: thinner than any crest
_BOLD = 0.7  # share of the clear room that a ray may go: the centre line leans, too
_SMEARS = 7  # pictures that a motion blur averages


@dataclass(frozen=True)
class Lens:
    """A pinhole camera of (H, W) pixels and a horizontal field of view in degrees."""

    size: tuple[int, int]
    fov: float

    @property
    def focal(self) -> float:
        """Focal length, pixels."""
        return float(self.size[1] / 2 / np.tan(np.deg2rad(self.fov) / 2))

    @property
    def matrix(self) -> NDArray[np.float64]:
        """Intrinsics (3, 3) in pixels, the centre of the first pixel being (0, 0)."""
        height, width = self.size
        return np.array([[self.focal, 0, (width - 1) / 2], [0, self.focal, (height - 1) / 2], [0, 0, 1]])

    def rays(self, finer: int = 1) -> Points:
        """Directions (H f W f, 3) through a grid of pixels `finer` times as dense, of unit length along the axis."""
        height, width = self.size
        x = ((np.arange(width * finer) + 0.5) / finer - width / 2) / self.focal
        y = ((np.arange(height * finer) + 0.5) / finer - height / 2) / self.focal
        grid = np.stack([*np.meshgrid(x, y), np.ones((len(y), len(x)))], -1)
        return grid.reshape(-1, 3).astype(np.float32)


@dataclass(frozen=True)
class Look:
    """What a camera and its lamps add: width of the lamps' beam, sharpness and strength of highlights, noise."""

    beam: float
    sharpness: float
    shine: float
    noise: float
    shutter: float
    warmth: tuple[float, float, float]


def draw_look(rng: np.random.Generator) -> Look:
    """Draw a camera."""
    return Look(
        beam=float(rng.uniform(0.4, 1.6)),
        sharpness=float(rng.uniform(100, 300)),
        shine=float(rng.uniform(0.5, 1.3)),
        noise=float(rng.uniform(0.004, 0.012)),
        shutter=float(rng.uniform(0.04, 0.22)),
        warmth=(float(rng.uniform(0.95, 1.05)), 1.0, float(rng.uniform(0.9, 1.1))),
    )


def cast(lumen: Lumen, pose: Pose, rays: Points, start: Field | None = None) -> Field:
    """Depths (n,) along the optical axis at which rays of a camera meet the wall, millimetres.

    `start`: depths, known to lie before the wall, from which to look.
    """
    origin, ways = _world(pose, rays)
    reach = np.linalg.norm(ways, axis=1)
    depth = np.zeros(len(rays), dtype=np.float32) if start is None else start.copy()
    before, going = np.zeros_like(depth), np.arange(len(rays))
    while going.size:
        points = origin + ways[going] * depth[going, None]
        clear = lumen.room(points, table=lumen.clear) * np.float32(_BOLD)
        near = clear < _SHORTEST
        met = np.zeros(going.size, dtype=bool)
        met[near] = lumen.room(points[near], table=lumen.radius) <= 0
        going, clear = going[~met], clear[~met]
        before[going] = depth[going]
        depth[going] += np.clip(clear, np.float32(_SHORTEST), np.float32(CLEAR * _BOLD)) / reach[going]
    inside, outside = (lumen.room(origin + ways * d[:, None], table=lumen.radius) for d in (before, depth))
    share = np.clip(inside / np.maximum(inside - outside, np.float32(1e-6)), 0, 1)
    return np.asarray(before + share * (depth - before), dtype=np.float32)


def view(lumen: Lumen, pose: Pose, later: Pose, lens: Lens, look: Look) -> tuple[NDArray[np.float32], Field]:
    """Linear radiance (H, W, 3) and depth (H, W) in millimetres; `later` is the pose when the shutter closes.

    Radiance is that of four rays per pixel, smeared by the motion during the exposure; depth that of its centre.
    """
    height, width = lens.size
    depth = cast(lumen, pose, lens.rays()).reshape(height, width)
    from scipy.ndimage import minimum_filter

    nearest = np.repeat(np.repeat(minimum_filter(depth, 3), 2, 0), 2, 1) * np.float32(0.9)
    rays = lens.rays(2)
    fine = cast(lumen, pose, rays, nearest.ravel())
    light = _shade(lumen, pose, rays, fine, look).reshape(height, 2, width, 2, 3).mean((1, 3))
    return _smeared(light, depth, pose, later, lens), depth


def _world(pose: Pose, rays: Points) -> tuple[Points, Points]:
    return pose[:3, 3].astype(np.float32), rays @ pose[:3, :3].T.astype(np.float32)


def _shade(lumen: Lumen, pose: Pose, rays: Points, depth: Field, look: Look) -> NDArray[np.float32]:
    """Light (n, 3) that comes back along rays: scattered by the tissue, and mirrored by the wet surface."""
    origin, ways = _world(pose, rays)
    points = origin + ways * depth[:, None]
    inward = _inward(lumen, points)
    wet = _unit(inward + lumen.unevenness(points))
    to_eye = _unit(-ways)
    scattered, mirrored = np.zeros(len(rays), np.float32), np.zeros(len(rays), np.float32)
    axis = pose[:3, 2].astype(np.float32)
    for lamp in LIGHTS:
        to_lamp = (pose[:3, :3] @ np.array(lamp)).astype(np.float32) + origin - points
        away = np.linalg.norm(to_lamp, axis=1)
        to_lamp /= away[:, None]
        strength = np.maximum(-(to_lamp @ axis), 0.02) ** np.float32(look.beam) / (away * away)
        facing = (to_lamp * inward).sum(1)
        scattered += strength * np.maximum((facing + 0.15) / 1.15, 0.01)  # light that entered beside comes out here
        mirrored += (
            strength
            * np.maximum((_unit(to_lamp + to_eye) * wet).sum(1), 0) ** np.float32(look.sharpness)
            * (facing > 0)
        )
    albedo, gloss = lumen.at(points, lumen.albedo), lumen.at(points, lumen.gloss)
    light = albedo * scattered[:, None] + (np.float32(look.shine) * gloss * mirrored)[:, None]
    return np.asarray(light * np.asarray(look.warmth, dtype=np.float32))


def _inward(lumen: Lumen, points: Points, step: float = 0.3) -> Points:
    """Unit normals (n, 3) of the wall, towards the inside."""
    sides = []
    for axis in np.eye(3, dtype=np.float32) * np.float32(step):
        sides.append(lumen.room(points + axis, table=lumen.radius) - lumen.room(points - axis, table=lumen.radius))
    return _unit(np.stack(sides, 1))


def _unit(vectors: Points) -> Points:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6))


def _smeared(light: NDArray[np.float32], depth: Field, pose: Pose, later: Pose, lens: Lens) -> NDArray[np.float32]:
    """Motion blur: light averaged along the way that each pixel's point goes while the shutter is open."""
    columns, rows = motion(depth, np.linalg.inv(later) @ pose, lens.matrix)
    total = np.zeros_like(light)
    for share in np.linspace(-0.5, 0.5, _SMEARS):
        for band in range(3):
            total[..., band] += warp(light[..., band], rows * np.float32(share), columns * np.float32(share))
    return np.asarray(total / _SMEARS, dtype=np.float32)


def motion(depth: Field, move: Pose, matrix: NDArray[np.float64]) -> tuple[Field, Field]:
    """How far (columns, rows) the points of a depth map (H, W) go in the picture when `move` is applied to them."""
    height, width = depth.shape
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    points = np.linalg.inv(matrix) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)]) * depth.ravel()
    u, v, w = matrix @ (move[:3, :3] @ points + move[:3, 3:])
    w = np.maximum(w, 1e-3)
    return ((u / w).reshape(x.shape) - x).astype(np.float32), ((v / w).reshape(x.shape) - y).astype(np.float32)
