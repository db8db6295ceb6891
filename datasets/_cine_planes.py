"""Where and when the frames of a clip are taken: the planes of a stack, and the moments of breath and beat."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._anatomy import Bend, Moment, Solid
from vfmadapt.datasets._cine_parts import LABEL


@dataclass(frozen=True)
class View:
    """Pixel size and origin (x, y) in mm, the moments of the frames, mm and seconds between them."""

    pixel: float
    origin: tuple[float, float]
    moments: tuple[Moment, ...]
    step: float | None
    seconds: float | None
    thickness: float


def _stack(rng: np.random.Generator, frames: int, size: int) -> View:
    """Slices 1.25 to 7.5 mm apart around the lesion at z = 0; whole bodies, or a part at twice their resolution."""
    step = float(rng.choice([1.25, 2.5, 3.0, 5.0, 5.0, 5.0, 7.5]))
    whole = rng.random() < 0.6
    width = float(rng.uniform(330, 460) if whole else np.exp(rng.uniform(np.log(130), np.log(330))))
    aside = rng.normal(0, 8 if whole else 40, 2)
    first = -step * (frames - 1) * float(rng.uniform(0.25, 0.75))
    moments = tuple(Moment(z=first + step * i) for i in range(frames))
    origin = (float(aside[0]) - width / 2, float(aside[1]) - width / 2)
    return View(width / size, origin, moments, step, None, thickness=step)


def _close_up(rng: np.random.Generator, frames: int, size: int, solids: Sequence[Solid], bend: Bend) -> View:
    """Slices 2.5 to 6 mm apart that begin and mostly end beyond a lesion, three to six times as wide as it."""
    first, *more = [solid for solid in solids if solid.label == LABEL["lesion"]]
    wide = max(solid.radii[0] for solid in (first, *more)) * 2
    width = max(float(wide * np.exp(rng.uniform(np.log(3), np.log(6)))), 50.0)
    step = float(rng.choice([2.5, 3.0, 4.0, 5.0, 5.0, 5.0, 6.0]))
    x, y, z = first.centre
    bent = bend.plane((1, 1), (x, y), 1.0, z)
    aside = rng.normal(0, 0.06 * width, 2)
    origin = [float(2 * at - there.item() + off - width / 2) for at, there, off in
              zip((x, y), (bent.x, bent.y), aside, strict=True)]  # fmt: skip
    low = z - step * (frames - 1) * float(rng.uniform(0.35, 0.65))
    moments = tuple(Moment(z=low + step * i) for i in range(frames))
    return View(width / size, (origin[0], origin[1]), moments, step, None, thickness=step)


def _breathing(rng: np.random.Generator, frames: int, size: int) -> View:
    """3 to 8 frames a second of breathing, now and then a deeper or a held breath."""
    seconds, period = float(rng.uniform(0.12, 0.33)), float(rng.uniform(3, 5.5))
    times = np.arange(frames) * seconds + rng.uniform(0, period)
    depth = 1 + 0.25 * np.sin(times * 0.7 + rng.uniform(0, 6)) * rng.uniform(0, 1)
    breath = np.abs(np.sin(np.pi * times / period)) ** rng.uniform(1.5, 4) * depth
    beat = 0.5 - 0.5 * np.cos(2 * np.pi * times / rng.uniform(0.7, 1.1))
    width = float(rng.uniform(270, 400))
    origin = (float(rng.normal(0, 15)) - width / 2, float(rng.normal(-10, 25)) - width / 2)
    return View(width / size, origin, _moments(breath, beat), None, seconds, thickness=7.0)


def _beating(rng: np.random.Generator, frames: int, size: int) -> View:
    """One to two beats at 20 to 50 frames a second while the breath is held, or nearly so."""
    seconds = float(rng.uniform(0.02, 0.05))
    breath = np.cumsum(rng.normal(0, 0.03, frames)) + 0.2 * np.sin(np.arange(frames) * rng.uniform(0, 0.2))
    width = float(rng.uniform(150, 330))
    origin = (float(rng.normal(10, 8)) - width / 2, float(rng.normal(0, 8)) - width / 2)
    return View(width / size, origin, _moments(breath, _beat(rng, frames, seconds)), None, seconds, thickness=8.0)


def _sector(rng: np.random.Generator, frames: int, size: int) -> View:
    """The probe at the top, 160 to 200 mm deep."""
    seconds = float(rng.uniform(0.02, 0.05))
    breath = np.cumsum(rng.normal(0, 0.06, frames))
    depth = float(rng.uniform(160, 200))
    return View(
        depth / size, (-depth / 2, 0.0), _moments(breath, _beat(rng, frames, seconds)), None, seconds, thickness=0.0
    )


def _beat(rng: np.random.Generator, frames: int, seconds: float) -> NDArray[np.float64]:
    """How far the ventricles are emptied: within a third of the beat, filled again in the rest."""
    period, systole = float(rng.uniform(0.6, 1.1)), float(rng.uniform(0.3, 0.42))
    phase = (np.arange(frames) * seconds / period + rng.uniform()) % 1
    emptying = 0.5 - 0.5 * np.cos(np.pi * phase / systole)
    filling = 0.5 + 0.5 * np.cos(np.pi * np.minimum((phase - systole) / (0.75 - systole), 1))
    return np.where(phase < systole, emptying, filling)


def _moments(breath: NDArray[np.floating], beat: NDArray[np.floating]) -> tuple[Moment, ...]:
    return tuple(Moment(breath=float(b), beat=float(c)) for b, c in zip(breath, beat, strict=True))


def _organs(rng: np.random.Generator, frames: int, size: int) -> View:
    """Whole bodies in slices of 3 to 8 mm, evenly over 120 to 150 mm of the abdomen, wherever the first may lie."""
    width, step = float(rng.uniform(340, 420)), float(rng.uniform(120, 150)) / frames
    first = -step * ((frames - 1) / 2 + float(rng.uniform(-0.5, 0.5)))
    moments = tuple(Moment(z=first + step * i) for i in range(frames))
    aside, thick = rng.normal(0, 8, 2), min(float(rng.uniform(3, 8)), step)
    return View(width / size, (float(aside[0]) - width / 2, float(aside[1]) - width / 2), moments, step, None, thick)


def _leaving(rng: np.random.Generator, frames: int, size: int, solids: Sequence[Solid]) -> View:
    """A breath or two that also move the plane through the body, 12 to 60 mm: as far as it takes to leave a lesion."""
    period = float(rng.uniform(3, 5.5))
    seconds = float(np.clip(period * rng.uniform(1.1, 1.9) / frames, 0.1, 0.6))
    times = np.arange(frames) * seconds + rng.uniform(0, period)
    breath = np.abs(np.sin(np.pi * times / period)) ** rng.uniform(1, 2.5)
    far = max(abs(s.centre[2]) + s.radii[2] for s in solids if s.label == LABEL["lesion"])
    travel = float(rng.choice([-1, 1]) * np.clip(far * rng.uniform(1.1, 1.6), 12, 60))
    moments = tuple(Moment(z=travel * float(b), breath=0.5 * float(b)) for b in breath)
    width = float(rng.uniform(270, 400))
    origin = (float(rng.normal(0, 15)) - width / 2, float(rng.normal(20, 20)) - width / 2)
    return View(width / size, origin, moments, None, seconds, thickness=7.0)


def _arrival(rng: np.random.Generator, frames: int, size: int) -> View:
    """13 to 22 seconds of shallow breathing, the time that contrast agent takes from the heart to the organs."""
    seconds = float(np.clip(rng.uniform(13, 22) / frames, 0.3, 2.0))
    times = np.arange(frames) * seconds + rng.uniform(0, 4)
    breath = float(rng.uniform(0.1, 0.6)) * np.sin(np.pi * times / rng.uniform(3, 5.5)) ** 2
    width = float(rng.uniform(270, 400))
    origin = (float(rng.normal(0, 15)) - width / 2, float(rng.normal(20, 20)) - width / 2)
    return View(width / size, origin, _moments(breath, np.zeros(frames)), None, seconds, thickness=7.0)


def _first_pass(rng: np.random.Generator, frames: int, size: int) -> View:
    """One frame per beat, always in the same part of it, of a breath that is held for half of the time."""
    seconds = float(np.clip(rng.uniform(13, 22) / frames, 0.5, 2.0))
    free = np.maximum(np.linspace(-1, 1, frames) + rng.uniform(-0.5, 0.5), 0)
    breath = np.cumsum(rng.normal(0, 0.05, frames)) + free * np.sin(np.arange(frames) * seconds * 1.6)
    beat = float(rng.uniform(0, 0.9)) + rng.normal(0, 0.03, frames)
    width = float(rng.uniform(150, 330))
    origin = (float(rng.normal(10, 8)) - width / 2, float(rng.normal(0, 8)) - width / 2)
    return View(width / size, origin, _moments(breath, beat), None, seconds, thickness=8.0)


_VIEWS = {
    "ct": _stack, "mr": _breathing, "cardiac": _beating, "echo": _sector, "organs_ct": _organs, "organs_mr": _organs,
    "bolus": _arrival, "perfusion": _first_pass, "shadow": _sector,
}  # fmt: skip


def view_of(style: str, rng: np.random.Generator, frames: int, size: int, solids: Sequence[Solid], bend: Bend) -> View:
    """The view that a style asks for; in two styles it depends on where the lesion lies."""
    if style == "lesion":
        return _close_up(rng, frames, size, solids, bend)
    return _leaving(rng, frames, size, solids) if style == "mr_through" else _VIEWS[style](rng, frames, size)
