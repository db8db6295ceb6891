"""Rays that meet the things of a room. Metres; x to the right, y down, z ahead."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._procedural import Field

Points = NDArray[np.float32]
Hit = tuple[Field, Points]
"""Distance along each ray in its own lengths, inf where it misses, and the surface's unit normal there."""

_FARTHEST = np.float32(np.inf)


@dataclass(frozen=True)
class Thing:
    """A solid: the label it has, its two colours and how fine it is striped, and where rays meet it."""

    label: int
    colours: Points
    stripes: float
    meet: Callable[[Points, Points], Hit]


def hall(low: Points, high: Points) -> Callable[[Points, Points], Hit]:
    """The inside of a box."""

    def meet(origin: Points, rays: Points) -> Hit:
        with np.errstate(divide="ignore"):
            ways = np.where(rays > 0, (high - origin) / rays, (low - origin) / rays)
        ways[~np.isfinite(ways)] = _FARTHEST
        axis = ways.argmin(1)
        normal = np.zeros_like(rays)
        rows = np.arange(len(rays))
        normal[rows, axis] = -np.sign(rays[rows, axis])
        return ways[rows, axis], normal

    return meet


def crate(middle: Points, half: Points, turn: float) -> Callable[[Points, Points], Hit]:
    """A box of half sizes `half`, turned about the vertical."""
    cos, sin = np.cos(turn), np.sin(turn)
    to_own = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=np.float32)

    def meet(origin: Points, rays: Points) -> Hit:
        start, ways = (origin - middle) @ to_own.T, rays @ to_own.T
        with np.errstate(divide="ignore", invalid="ignore"):
            one, two = (-half - start) / ways, (half - start) / ways
        near, far = np.fmin(one, two), np.fmax(one, two)
        axis, enter = near.argmax(1), near.max(1)
        hits = (enter < far.min(1)) & (enter > 1e-4)
        rows = np.arange(len(rays))
        normal = np.zeros_like(rays)
        normal[rows, axis] = -np.sign(ways[rows, axis])
        return np.where(hits, enter, _FARTHEST).astype(np.float32), normal @ to_own

    return meet


def ball(middle: Points, radius: float) -> Callable[[Points, Points], Hit]:
    """A sphere."""

    def meet(origin: Points, rays: Points) -> Hit:
        start = origin - middle
        a, b = (rays * rays).sum(1), (rays * start).sum(1)
        c = (start * start).sum(-1) - np.float32(radius**2)
        way = _nearest(a, b, c)
        points = start + rays * np.where(np.isfinite(way), way, 0)[:, None]
        return way, points / np.float32(radius)

    return meet


def column(foot: Points, radius: float, height: float) -> Callable[[Points, Points], Hit]:
    """An upright cylinder with a flat top, standing at `foot`."""

    def meet(origin: Points, rays: Points) -> Hit:
        start = np.broadcast_to(origin - foot, rays.shape)
        a = (rays[:, [0, 2]] ** 2).sum(1)
        b = (rays[:, [0, 2]] * start[:, [0, 2]]).sum(1)
        c = (start[:, [0, 2]] ** 2).sum(1) - np.float32(radius**2)
        side = _nearest(np.maximum(a, np.float32(1e-9)), b, c)
        level = start[:, 1] + rays[:, 1] * np.where(np.isfinite(side), side, 0)
        side = np.where((level <= 0) & (level >= -height), side, _FARTHEST)
        with np.errstate(divide="ignore", invalid="ignore"):
            top = (-height - start[:, 1]) / rays[:, 1]
        on_top = start[:, [0, 2]] + rays[:, [0, 2]] * np.where(np.isfinite(top), top, 0)[:, None]
        covered = (top > 1e-4) & ((on_top**2).sum(1) <= radius**2)
        top = np.where(covered, top, _FARTHEST)
        way = np.minimum(side, top).astype(np.float32)
        normal = (start + rays * np.where(np.isfinite(way), way, 0)[:, None]) / np.float32(radius)
        normal[:, 1] = 0
        normal[top < side] = (0, -1, 0)
        return way, normal.astype(np.float32)

    return meet


def _nearest(a: Field, b: Field, c: Field) -> Field:
    """The smaller positive root of a t^2 + 2 b t + c, inf where there is none."""
    inside = b * b - a * c
    way = (-b - np.sqrt(np.maximum(inside, 0))) / a
    return np.where((inside > 0) & (way > 1e-4), way, _FARTHEST).astype(np.float32)
