"""`solids_synthetic`: procedural rooms with boxes, balls and columns; label, exact depth and intrinsics of every pixel.

For learning several things of one picture at once. A scene is drawn and cast when it is asked for, which takes some
hundredths of a second; splits come from ranges of seeds of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.contracts import ClassSpec, DataSpec, UserError
from vfmadapt.datasets._solids import Points, Thing, ball, column, crate, hall

Labels = NDArray[np.int64]

VERSION = 1
"""Of what a seed gives; another one whenever the pictures change."""

BANDS = ("red", "green", "blue")
CLASSES = (
    ClassSpec("floor", (140, 110, 80)),
    ClassSpec("wall", (200, 200, 210)),
    ClassSpec("box", (220, 90, 60)),
    ClassSpec("ball", (70, 160, 90)),
    ClassSpec("column", (80, 110, 210)),
)
FLOOR, WALL, BOX, BALL, COLUMN = range(5)
SPLITS = {"train": 0, "val": 1_000_000, "test": 2_000_000}
"""First seed of each split."""

# (mean, std) of red, green, blue over the first 40 training scenes of seed 9; frozen with VERSION 1.
_MEAN, _STD = (0.285, 0.352, 0.339), (0.157, 0.165, 0.194)


@dataclass(frozen=True)
class Room:
    """What is in a room, the height of the camera above its floor and its tilt, and where the lamp is."""

    things: tuple[Thing, ...]
    above: float
    tilt: float
    lamp: Points


@dataclass(frozen=True)
class _Scenes:
    """One split; index -> {"image", "mask", "depth", "valid", "intrinsics", "id", "bands"}."""

    name: str
    count: int
    seed: int
    size: tuple[int, int]
    fov: float

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, SPLITS[self.name] + index])
        focal = self.size[1] / 2 / np.tan(np.deg2rad(self.fov) / 2)
        image, label, depth = render(rng, draw_room(rng), self.size, focal)
        height, width = self.size
        matrix = [[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]]
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "mask": torch.from_numpy(label.astype(np.int64)),
            "depth": torch.from_numpy(depth),
            "valid": torch.ones(self.size, dtype=torch.bool),
            "intrinsics": torch.tensor(matrix, dtype=torch.float32),
            "id": f"{self.name}/{index:05d}",
            "bands": BANDS,
        }


class SolidsSynthetic:
    """Data source of generated rooms.

    Args:
        train, val, test: number of scenes of each split.
        size: (H, W) in pixels.
        fov: horizontal field of view, degrees.
        seed: another seed, other scenes.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        *,
        train: int = 400,
        val: int = 8,
        test: int = 40,
        size: Sequence[int] = (128, 128),
        fov: float = 65.0,
        seed: int = 0,
    ) -> None:
        if len(size) != 2 or min(size) < 16 or not 20 <= fov <= 120 or min(train, val, test, seed) < 0:
            raise UserError(
                f"solids_synthetic: size={[*size]} is (H, W), each at least 16, fov={fov} 20 to 120 degrees, "
                f"seed={seed} and the numbers of scenes at least 0"
            )
        self._counts = {"train": train, "val": val, "test": test}
        self._seed, self._size, self._fov = seed, (int(size[0]), int(size[1])), fov

    @property
    def spec(self) -> DataSpec:
        """Bands, classes and statistics; the depth beside the labels is in metres."""
        return DataSpec(f"solids_synthetic@{VERSION}", BANDS, CLASSES, _MEAN, _STD)

    def prepare(self) -> None:
        """Nothing to do: scenes are cast when they are asked for."""

    def split(self, name: str) -> _Scenes:
        """The scenes of "train", "val" or "test"; raises UserError for another name."""
        if name not in SPLITS:
            raise UserError(f"solids_synthetic has no split {name!r}: choose one of {', '.join(SPLITS)}")
        return _Scenes(name, self._counts[name], self._seed, self._size, self._fov)


def draw_room(rng: np.random.Generator) -> Room:
    """Draw a room and what stands in it."""
    above, wide, far, high = (rng.uniform(*bounds) for bounds in ((1.1, 1.9), (1.6, 3.5), (4.0, 8.0), (0.8, 1.6)))
    near, beyond = np.array([-wide, -high, -1], dtype=np.float32), np.array([wide, above, far], dtype=np.float32)
    things = [Thing(WALL, _colours(rng), rng.uniform(0.5, 4), hall(near, beyond))]
    for _ in range(int(rng.integers(3, 8))):
        x, z = rng.uniform(-wide * 0.85, wide * 0.85), rng.uniform(1.6, far - 0.5)
        foot, kind = np.array([x, above, z], dtype=np.float32), int(rng.choice([BOX, BALL, COLUMN]))
        things.append(Thing(kind, _colours(rng), rng.uniform(1, 12), _solid(rng, kind, foot)))
    lamp = np.array([rng.uniform(-wide, wide) * 0.7, -high * 0.8, rng.uniform(0.3, far * 0.7)], dtype=np.float32)
    return Room(tuple(things), float(above), float(rng.uniform(0.05, 0.3)), lamp)


def _solid(rng: np.random.Generator, kind: int, foot: Points) -> Any:
    if kind == BOX:
        half = rng.uniform(0.12, 0.5, 3).astype(np.float32)
        return crate(foot - np.array([0, half[1], 0], dtype=np.float32), half, rng.uniform(0, np.pi))
    radius = rng.uniform(0.12, 0.42)
    if kind == BALL:
        return ball(foot - np.array([0, radius, 0], dtype=np.float32), radius)
    return column(foot, radius * 0.6, rng.uniform(0.4, 1.8))


def _colours(rng: np.random.Generator) -> Points:
    """Two related colours (2, 3)."""
    base = rng.uniform(0.15, 0.9, 3)
    return np.clip([base, base * rng.uniform(0.6, 0.95)], 0, 1).astype(np.float32)


def render(rng: np.random.Generator, room: Room, size: tuple[int, int], focal: float) -> tuple[Points, Labels, Points]:
    """Image (H, W, 3) in 0..1, labels (H, W) and depths (H, W) in metres along the optical axis."""
    height, width = size
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    flat = np.stack([(x - (width - 1) / 2) / focal, (y - (height - 1) / 2) / focal, np.ones(size)], -1)
    cos, sin = np.cos(room.tilt), np.sin(room.tilt)
    down = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])  # the camera looks down by the tilt
    rays = (flat.reshape(-1, 3) @ down.T).astype(np.float32)
    way, normal, which = _first(room, np.zeros(3, np.float32), rays)
    points = rays * way[:, None]
    label = np.array([thing.label for thing in room.things])[which]
    label[(which == 0) & (normal[:, 1] < -0.5)] = FLOOR
    to_lamp = room.lamp - points
    away = np.linalg.norm(to_lamp, axis=1, keepdims=True)
    facing = np.maximum((to_lamp / away * normal).sum(1), 0)
    blocked, _, _ = _first(room, points + normal * np.float32(2e-3), to_lamp)
    light = 0.35 + 0.9 * facing * (blocked > 1) / (0.5 + 0.12 * away[:, 0] ** 2)
    surface = _surface(room, points, which, label)
    noisy = surface * light[:, None] + rng.normal(0, 0.01, surface.shape)
    image = np.clip(noisy, 0, 1).astype(np.float32).reshape(height, width, 3)
    return image, label.reshape(size), way.reshape(size)


def _first(room: Room, origin: Points, rays: Points) -> tuple[Points, Points, Labels]:
    """Of each ray the way to the first thing, its normal, and which thing it is."""
    hits = [thing.meet(origin, rays) for thing in room.things]
    ways = np.stack([way for way, _ in hits])
    which, rows = ways.argmin(0), np.arange(len(rays))
    return ways[which, rows], np.stack([normal for _, normal in hits])[which, rows], which


def _surface(room: Room, points: Points, which: Labels, label: Labels) -> Points:
    """Colour (n, 3) of the things without light: each striped along an axis that its place decides."""
    stripes = np.array([thing.stripes for thing in room.things], dtype=np.float32)[which]
    along = np.where(label == FLOOR, points[:, 2], points[:, 0] + points[:, 2])
    across = np.where(label == FLOOR, points[:, 0], points[:, 1])
    wave = np.sin(2 * np.pi * stripes * along) * np.sin(2 * np.pi * stripes * across)
    share = (0.5 + 0.5 * np.tanh(4 * wave))[:, None]
    one, two = (np.stack([thing.colours[i] for thing in room.things])[which] for i in (0, 1))
    floor = np.where(label[:, None] == FLOOR, np.array([0.8, 0.9, 1.1], dtype=np.float32), 1)
    return ((1 - share) * one + share * two) * floor
