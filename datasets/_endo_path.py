"""How an endoscope moves: through the tube, its tip circling, so that neighbouring frames differ by a known turn.

Cameras look along +z, x to the right, y down; a pose is the 4 x 4 matrix from camera to world, millimetres.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._endo_lumen import Lumen

TURN = (6.3, 8.5)
"""Degrees between the optical axes of neighbouring frames; below 6 a focal length could hardly be observed."""

_DENSE = 0.02  # of a frame's usual way, the step in which frames are looked for

Pose = NDArray[np.float64]


@dataclass(frozen=True)
class Path:
    """A smooth course of the tip through a lumen; `at(u)` is its pose at parameter u, about one per frame."""

    lumen: Lumen
    start: float
    speed: float
    aside: float
    tilt: tuple[float, float, float]
    turning: float
    phases: NDArray[np.float64]

    def at(self, u: float) -> Pose:
        """Pose at a time."""
        z = self.start + self.speed * u
        offset = self.aside * np.array([np.sin(0.31 * u + self.phases[0]), np.cos(0.23 * u + self.phases[1]), 0])
        ahead = self.lumen.middle(z + 4) - self.lumen.middle(z - 4)
        mean, swing, rate = self.tilt
        angle = np.deg2rad(mean + swing * np.sin(rate * u + self.phases[2]))
        around = self.turning * u + self.phases[3]
        roll = 0.25 * np.sin(0.17 * u + self.phases[4])
        side = np.array([np.cos(around), np.sin(around), 0]) * np.sin(angle)
        forward = _frame(ahead / np.linalg.norm(ahead), 0.0) @ (side + np.array([0, 0, np.cos(angle)]))
        pose = np.eye(4)
        pose[:3, :3] = _frame(forward, roll)
        pose[:3, 3] = self.lumen.middle(z) + offset
        return pose

    def frames(self, rng: np.random.Generator, count: int) -> list[float]:
        """Parameters of frames whose optical axes lie `TURN` degrees apart, each from the next."""
        found = [0.0]
        while len(found) < count:
            wanted, u = np.deg2rad(rng.uniform(*TURN)), found[-1]
            here = self.at(u)[:3, 2]
            while np.arccos(np.clip(here @ self.at(u)[:3, 2], -1, 1)) < wanted:
                u += _DENSE
            found.append(u)
        return found


def make_path(rng: np.random.Generator, lumen: Lumen) -> Path:
    """Draw a course: in or out, its tip circling about the tube's axis at 16 to 26 degrees."""
    inward = rng.random() < 0.5
    return Path(
        lumen=lumen,
        start=float(rng.uniform(50, 75) if inward else rng.uniform(90, 120)),
        speed=float((1 if inward else -1) * rng.uniform(0.8, 2.2)),
        aside=float(rng.uniform(1, 4)),
        tilt=(float(rng.uniform(16, 26)), 3.0, float(rng.uniform(0.05, 0.15))),
        turning=float(rng.choice([-1, 1]) * 0.36),
        phases=rng.uniform(0, 2 * np.pi, 5),
    )


def relative(target: Pose, source: Pose) -> Pose:
    """The matrix that takes points from the target's camera to the source's."""
    return np.asarray(np.linalg.inv(source) @ target)


def _frame(forward: NDArray[np.float64], roll: float) -> NDArray[np.float64]:
    """A rotation whose third column is `forward`, a unit vector that is not along y, turned by `roll` about it."""
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    cos, sin = np.cos(roll), np.sin(roll)
    return np.stack([cos * right + sin * down, cos * down - sin * right, forward], 1)
