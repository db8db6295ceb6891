"""A procedural room from a seed: things on a floor between walls, lit by a lamp, with the depth of every pixel."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vfmadapt.datasets._procedural import Field, Size, power_noise
from vfmadapt.datasets._rooms_solids import FAR, Points, Solid, rotation
from vfmadapt.datasets._tiles import tile_seed
from vfmadapt.datasets._value_tiles import ValueJob

VERSION = 1
"""Of what a seed gives; another one whenever the pictures change."""

_TEXELS = 256
_TALLEST = 2.6  # metres of a room


@dataclass(frozen=True)
class Room:
    """`image` uint8 RGB (H, W, 3), `depth` float32 (H, W), metres along the optical axis."""

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]


def render_room(seed: int, *, size: Size = (128, 192)) -> Room:
    """Render the room of a seed: the same arguments give the same pixels."""
    rng = np.random.default_rng([VERSION, seed])
    deep, wide = rng.uniform(2.5, 7), rng.uniform(2, 5)
    eye = np.array([rng.uniform(-0.3, 0.3) * wide, -rng.uniform(0.5, 1.7), 0], dtype=np.float32)
    solids = [*_room(rng, deep, wide), *_things(rng, deep, wide)]
    origin_turn = rotation(rng.normal(0, 0.25), -rng.uniform(0.0, 0.4), rng.normal(0, 0.03))
    rays = _rays(size, rng.uniform(45, 75)) @ origin_turn.T
    depth, hit = _nearest(solids, eye, rays)
    lamp = np.array([rng.uniform(-wide, wide), -_TALLEST * rng.uniform(0.7, 0.98), rng.uniform(-0.5, deep)], np.float32)
    light = _lit(rng, solids, eye + rays * depth[:, None], hit, lamp)
    light *= 0.6 / np.percentile(light, 85) * rng.normal(1, 0.05, 3).astype(np.float32)
    light += rng.normal(0, rng.uniform(0.003, 0.015), light.shape).astype(np.float32)
    shown = np.clip(light, 0, 1) ** np.float32(1 / 2.2)
    return Room(np.rint(shown * 255).astype(np.uint8).reshape(*size, 3), depth.reshape(size))


def write_tile(job: ValueJob, split: str, index: int) -> None:
    """Render and write one tile."""
    room = render_room(tile_seed(split, index, job.seed), size=(job.size * 2 // 3, job.size))
    job.write(split, index, room.image, room.depth)


def _rays(size: Size, fov: float) -> Points:
    """Directions (H W, 3) of unit length along the optical axis."""
    height, width = size
    focal = width / 2 / np.tan(np.deg2rad(fov) / 2)
    x, y = ((np.arange(n) + 0.5 - n / 2) / focal for n in (width, height))
    return np.stack([*np.meshgrid(x, y), np.ones((height, width))], -1).reshape(-1, 3).astype(np.float32)


def _room(rng: np.random.Generator, deep: float, wide: float) -> Iterator[Solid]:
    """Walls, and a floor at y = 0; the eye stands at z = 0, a metre before the wall behind it."""
    half, middle = np.array([wide, _TALLEST / 2, (deep + 1) / 2]), np.array([0, -_TALLEST / 2, (deep - 1) / 2])
    level = np.eye(3)
    yield _solid(rng, "room", middle, level, half)
    yield _solid(rng, "box", middle * [0, 0, 1] + [0, 0.05, 0], level, half * [1, 0, 1] + [0, 0.05, 0])


def _things(rng: np.random.Generator, deep: float, wide: float) -> Iterator[Solid]:
    """Furniture along the walls, and things of every shape on the floor; all of them ahead of the eye."""
    for _ in range(int(rng.integers(2, 6))):
        half = rng.uniform([0.2, 0.2, 0.15], [0.8, 1.0, 0.4])
        x = rng.choice([-1, 1]) * (wide - half[0]) if rng.random() < 0.5 else rng.uniform(-wide, wide)
        z = rng.uniform(0.5, 1) * deep if abs(x) == wide - half[0] else deep - half[2]
        yield _solid(rng, "box", (x, -half[1], z), rotation(rng.normal(0, 0.05)), half)
    for _ in range(int(rng.integers(5, 14))):
        place = np.array([rng.normal(0, 0.4 * wide), 0.0, rng.uniform(0.35, 0.9) * deep])
        if rng.random() < 0.25:
            yield from _table(rng, place)
            continue
        kind = rng.choice(["box", "ellipsoid", "cylinder"])
        half = rng.uniform(0.04, 0.4, 3)
        if kind == "cylinder":
            half[2] = half[0]
        tilted = rng.random() < 0.5
        turn = rotation(rng.uniform(0, np.pi), *(rng.uniform(0, np.pi, 2) if tilted else (0.0, 0.0)))
        place[1] = -(np.abs(turn) @ half)[1] - (rng.uniform(0, 0.5) if rng.random() < 0.3 else 0)
        yield _solid(rng, kind, place, turn, half)


def _table(rng: np.random.Generator, place: Points) -> Iterator[Solid]:
    """A board on four legs, and things on it."""
    tall, turn = rng.uniform(0.4, 0.9), rotation(rng.uniform(0, np.pi))
    half = np.array([rng.uniform(0.25, 0.7), 0.02, rng.uniform(0.2, 0.4)])
    yield _solid(rng, "box", place - np.array([0, tall, 0]), turn, half)
    for x, z in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        corner = turn @ (half * [0.92 * x, 0, 0.92 * z])
        yield _solid(rng, "box", place + corner - np.array([0, tall / 2, 0]), turn, (0.025, tall / 2, 0.025))
    for _ in range(int(rng.integers(0, 4))):
        size = rng.uniform(0.03, 0.18, 3)
        at = turn @ (half * [rng.uniform(-0.8, 0.8), 0, rng.uniform(-0.8, 0.8)])
        yield _solid(rng, rng.choice(["box", "ellipsoid"]), place + at - np.array([0, tall + size[1], 0]), turn, size)


def _solid(rng: np.random.Generator, kind: str, centre: ArrayLike, turn: ArrayLike, half: ArrayLike) -> Solid:
    middle, axes, size = (np.asarray(v, dtype=np.float32) for v in (centre, turn, half))
    scale = float(np.exp(rng.uniform(np.log(0.05), np.log(0.6))))
    return Solid(kind, middle, axes, size, _colour(rng), int(rng.integers(4)), scale)  # type: ignore[arg-type]  # one of the kinds


def _colour(rng: np.random.Generator) -> Points:
    """From grey to vivid, dark to light."""
    grey = rng.uniform(0.05, 0.8)
    return np.asarray(np.clip(grey * np.exp(rng.normal(0, rng.choice([0.05, 0.5]), 3)), 0.02, 0.95), dtype=np.float32)


def _nearest(solids: list[Solid], origin: Points, rays: Points) -> tuple[Field, NDArray[np.int64]]:
    """Depth (n,) of what rays meet first, and which solid that is."""
    depth, hit = np.full(len(rays), FAR, dtype=np.float32), np.zeros(len(rays), dtype=np.int64)
    for index, solid in enumerate(solids):
        found = solid.meet(origin, rays)
        nearer = found < depth
        depth[nearer], hit[nearer] = found[nearer], index
    return depth, hit


def _lit(
    rng: np.random.Generator, solids: list[Solid], points: Points, hit: NDArray[np.int64], lamp: Points
) -> NDArray[np.float32]:
    """Light (n, 3) from points on solids: a lamp with its shadows, and what comes from all sides."""
    noise = np.stack([power_noise(rng, (_TEXELS, _TEXELS), e, outer=o) for e, o in ((1.0, 40), (1.8, 120))])
    ambient, to_lamp = rng.uniform(0.25, 0.6), lamp - points
    away = np.linalg.norm(to_lamp, axis=1)
    normals, colour = np.zeros_like(points), np.zeros_like(points)
    for index, solid in enumerate(solids):
        mine = hit == index
        if mine.any():
            normals[mine] = solid.normals(points[mine])
            colour[mine] = solid.colour * _texture(solid, points[mine], noise)[:, None]
    facing = np.maximum((normals * to_lamp).sum(1) / away, 0)
    start = points + normals * np.float32(0.01)
    shade = np.ones(len(points), dtype=bool)
    for solid in solids[2:]:  # walls and floor throw no shadow
        shade &= solid.meet(start, to_lamp) > 1
    upward = 0.75 - 0.25 * normals[:, 1]  # y points down: what faces the ceiling gets more
    strength = ambient * upward / 4 + facing * shade / np.maximum(away, 0.5) ** 2
    return np.asarray(colour * strength[:, None], dtype=np.float32)


def _texture(solid: Solid, points: Points, noise: Field) -> Field:
    """Brightness (n,) around 1: noise, on top of it stripes, checks or nothing."""
    inside = (points - solid.centre) @ solid.turn / np.float32(solid.scale)
    u, v = inside[:, 0] + inside[:, 2] * np.float32(0.7), inside[:, 1] + inside[:, 2] * np.float32(0.3)
    column, row = ((c * 24).astype(np.int64) % _TEXELS for c in (u, v))
    grain = 1 + np.float32(0.12) * noise[0, row, column] + np.float32(0.15) * noise[1, row, column]
    if solid.pattern == 1:
        grain = grain * np.where(np.floor(u * 2) % 2 == 0, 1.0, 0.6)
    elif solid.pattern == 2:
        grain = grain * np.where((np.floor(u * 2) + np.floor(v * 2)) % 2 == 0, 1.0, 0.55)
    return np.asarray(np.maximum(grain, 0.1), dtype=np.float32)
