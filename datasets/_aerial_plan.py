"""Plans of aerial scenes: land cut into blocks by streets, tracks or bare boundaries, then turned and bent."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vfmadapt.datasets._aerial_canvas import Points, floats, turned


@dataclass(frozen=True)
class Block:
    """A rectangle of the plan, in metres before it is turned and bent."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Extent along u."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Extent along v."""
        return self.bottom - self.top

    def shrunk(self, by: float) -> "Block":
        """The same rectangle less a border."""
        return Block(self.left + by, self.top + by, self.right - by, self.bottom - by)

    def outline(self) -> Points:
        """Points along the border, some metres apart, so that the sides can bend."""
        across = np.linspace(self.left, self.right, max(2, int(self.width / 6)), dtype=np.float32)
        down = np.linspace(self.top, self.bottom, max(2, int(self.height / 6)), dtype=np.float32)
        sides = [
            np.stack([across, np.full_like(across, self.top)], 1),
            np.stack([np.full_like(down, self.right), down], 1),
            np.stack([across[::-1], np.full_like(across, self.bottom)], 1),
            np.stack([np.full_like(down, self.left), down[::-1]], 1),
        ]
        return np.concatenate(sides)


@dataclass(frozen=True)
class Street:
    """A straight street of the plan from one point to another, both (u, v)."""

    start: Points
    end: Points
    width: float
    level: int

    @property
    def length(self) -> float:
        """From end to end."""
        return float(np.hypot(*(self.end - self.start)))

    def at(self, along: float, aside: float) -> Points:
        """(u, v) of a point so far along the street and so far to its side."""
        direction = (self.end - self.start) / np.float32(self.length)
        side = floats([-direction[1], direction[0]])
        return np.asarray(self.start + direction * np.float32(along) + side * np.float32(aside))

    def band(self, start: float, end: float, left: float, right: float) -> Points:
        """Outline of the part between two places along the street and two to its side."""
        count = max(2, int((end - start) / 6))
        along = np.linspace(start, end, count)
        there = [self.at(place, left) for place in along]
        back = [self.at(place, right) for place in along[::-1]]
        return np.stack(there + back)


@dataclass
class Plan:
    """Blocks and streets, and where they come to lie.

    `angle`: by which the plan is turned; `bend`: metres by which its lines leave the straight, `wave` metres long.
    """

    angle: float
    bend: float
    wave: float
    phase: tuple[float, float]
    blocks: list[Block] = field(default_factory=list)
    streets: list[Street] = field(default_factory=list)

    def place(self, points: Points) -> Points:
        """(u, v) of the plan -> (x, y) of the tile."""
        u, v = points[..., 0], points[..., 1]
        bent = np.stack(
            [
                u + self.bend * np.sin(v * (2 * np.pi / self.wave) + self.phase[0]),
                v + self.bend * np.sin(u * (2 * np.pi / self.wave) + self.phase[1]),
            ],
            -1,
        )
        return turned(bent.astype(np.float32), self.angle)

    def heading(self, point: Points, along: float = 0.0) -> float:
        """Direction on the tile of the plan's direction `along` (radians from u) at a point."""
        step = floats([np.cos(along), np.sin(along)])
        change = self.place(point + step) - self.place(point - step)
        return float(np.arctan2(change[1], change[0]))


def draw_plan(rng: np.random.Generator, reach: float, *, block: float, widths: Sequence[float], straight: bool) -> Plan:
    """Cut a square of half side `reach` until no side of a block is longer than about `block` metres.

    Args:
        rng: source of randomness.
        reach: half the side.
        block: metres.
        widths: of the streets of the first cuts, in metres; the last is that of all later ones. 0: a mere boundary.
        straight: no bends.
    """
    wave = rng.uniform(1.2, 3) * reach
    bend = 0.0 if straight else rng.uniform(0.01, 0.035) * wave  # steeper, and right angles would be lost
    plan = Plan(rng.uniform(0, np.pi), bend, wave, (rng.uniform(0, 6.3), rng.uniform(0, 6.3)))
    off = rng.uniform(-0.2, 0.2, 2) * reach
    far = reach * 1.15
    _cut(rng, plan, Block(-far + off[0], -far + off[1], far + off[0], far + off[1]), block, widths, 0)
    return plan


def _cut(rng: np.random.Generator, plan: Plan, part: Block, block: float, widths: Sequence[float], level: int) -> None:
    longer = max(part.width, part.height)
    if longer < block * rng.uniform(0.8, 1.4):
        plan.blocks.append(part)
        return
    width = widths[min(level // 2, len(widths) - 1)]
    share = rng.uniform(0.36, 0.64)
    if part.width >= part.height:
        middle = part.left + share * part.width
        ends = ((middle, part.top - 1), (middle, part.bottom + 1))  # a metre into the streets that it meets
        halves = (
            Block(part.left, part.top, middle - width / 2, part.bottom),
            Block(middle + width / 2, part.top, part.right, part.bottom),
        )
    else:
        middle = part.top + share * part.height
        ends = ((part.left - 1, middle), (part.right + 1, middle))
        halves = (
            Block(part.left, part.top, part.right, middle - width / 2),
            Block(part.left, middle + width / 2, part.right, part.bottom),
        )
    plan.streets.append(Street(floats(ends[0]), floats(ends[1]), width, level // 2))
    for half in halves:
        _cut(rng, plan, half, block, widths, level + 1)
