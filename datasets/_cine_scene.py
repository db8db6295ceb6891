"""One generated clip: a body, its motion, and a scanner, drawn by a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._anatomy import Bend, Moment, Solid, paint
from vfmadapt.datasets._cine_parts import LABEL, NAMES
from vfmadapt.datasets._cine_sensors import (
    CtSensor,
    EchoSensor,
    MrSensor,
    Palette,
    ct_palette,
    echo_palette,
    mr_palette,
)
from vfmadapt.datasets._cine_trunk import abdomen, trunk
from vfmadapt.datasets._cine_views import apical, lengthwise, short_axis
from vfmadapt.datasets._procedural import power_noise

VERSION = 2
ORGANS_VERSION = 3
STYLES = ("ct", "mr", "cardiac", "echo", "lesion")
ORGAN_STYLES = ("organs_ct", "organs_mr")
CLASS_NAMES = NAMES

_BODIES = {
    "ct": trunk, "mr": lengthwise, "cardiac": short_axis, "echo": apical, "lesion": trunk, "organs_ct": abdomen,
    "organs_mr": abdomen,
}  # fmt: skip
_CT_STYLES = ("ct", "lesion", "organs_ct")


@dataclass(frozen=True)
class Cine:
    """A clip: grey values uint8 (T, H, W), labels uint8 (T, H, W), mm between slices (None in time), rows and columns.

    `seconds`: between frames, None of a stack of slices.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    spacing: tuple[float | None, float, float]
    seconds: float | None


@dataclass(frozen=True)
class _View:
    """Pixel size and origin (x, y) in mm, the moments of the frames, mm and seconds between them."""

    pixel: float
    origin: tuple[float, float]
    moments: tuple[Moment, ...]
    step: float | None
    seconds: float | None
    thickness: float


def render_clip(seed: int, *, style: str, frames: int, size: int = 256) -> Cine:
    """Draw frames of size x size pixels in a style of `STYLES` or `ORGAN_STYLES`; equal arguments, equal clips."""
    version = ORGANS_VERSION if style in ORGAN_STYLES else VERSION
    rng = np.random.default_rng([seed, (*STYLES, *ORGAN_STYLES).index(style), version])
    solids = _BODIES[style](rng)
    palette, bend = _palette(style, rng), Bend.random(rng, float(rng.uniform(3, 9)))
    view = _close_up(rng, frames, size, solids, bend) if style == "lesion" else _VIEWS[style](rng, frames, size)
    sensor = _sensor(style, rng, size, view.pixel)
    texture = power_noise(rng, (size, size), 1.3, outer=24)
    turn, mirror = (
        (int(rng.integers(4)), rng.random() < 0.3) if style in ("ct", "lesion") and rng.random() < 0.5 else (0, False)
    )
    image, labels = np.empty((2, frames, size, size), np.uint8)
    for index, moment in enumerate(view.moments):
        plane = bend.plane((size, size), view.origin, view.pixel, moment.z)
        picture = paint(
            solids,
            palette.values,
            plane,
            moment,
            contrast=palette.contrast,
            texture=texture,
            thickness=view.thickness,
        )
        shown = sensor(picture.brightness, plane.x, plane.y)
        if isinstance(sensor, EchoSensor):
            picture.labels[~sensor.inside] = 0
        for kept, values in ((image, shown * 255 + 0.5), (labels, picture.labels)):
            turned = np.rot90(values, turn)
            kept[index] = turned[:, ::-1] if mirror else turned
    return Cine(image, labels, (view.step, view.pixel, view.pixel), view.seconds)


def _palette(style: str, rng: np.random.Generator) -> Palette:
    if style == "echo":
        return echo_palette(rng)
    return ct_palette(rng) if style in _CT_STYLES else mr_palette(rng)


def _sensor(style: str, rng: np.random.Generator, size: int, pixel: float) -> CtSensor | MrSensor | EchoSensor:
    if style == "echo":
        return EchoSensor(rng, (size, size), pixel)
    return (CtSensor if style in _CT_STYLES else MrSensor)(rng, (size, size))


def _stack(rng: np.random.Generator, frames: int, size: int) -> _View:
    """Slices 1.25 to 7.5 mm apart around the lesion at z = 0; whole bodies, or a part at twice their resolution."""
    step = float(rng.choice([1.25, 2.5, 3.0, 5.0, 5.0, 5.0, 7.5]))
    whole = rng.random() < 0.6
    width = float(rng.uniform(330, 460) if whole else np.exp(rng.uniform(np.log(130), np.log(330))))
    aside = rng.normal(0, 8 if whole else 40, 2)
    first = -step * (frames - 1) * float(rng.uniform(0.25, 0.75))
    moments = tuple(Moment(z=first + step * i) for i in range(frames))
    origin = (float(aside[0]) - width / 2, float(aside[1]) - width / 2)
    return _View(width / size, origin, moments, step, None, thickness=step)


def _close_up(rng: np.random.Generator, frames: int, size: int, solids: Sequence[Solid], bend: Bend) -> _View:
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
    return _View(width / size, (origin[0], origin[1]), moments, step, None, thickness=step)


def _breathing(rng: np.random.Generator, frames: int, size: int) -> _View:
    """3 to 8 frames a second of breathing, now and then a deeper or a held breath."""
    seconds, period = float(rng.uniform(0.12, 0.33)), float(rng.uniform(3, 5.5))
    times = np.arange(frames) * seconds + rng.uniform(0, period)
    depth = 1 + 0.25 * np.sin(times * 0.7 + rng.uniform(0, 6)) * rng.uniform(0, 1)
    breath = np.abs(np.sin(np.pi * times / period)) ** rng.uniform(1.5, 4) * depth
    beat = 0.5 - 0.5 * np.cos(2 * np.pi * times / rng.uniform(0.7, 1.1))
    width = float(rng.uniform(270, 400))
    origin = (float(rng.normal(0, 15)) - width / 2, float(rng.normal(-10, 25)) - width / 2)
    return _View(width / size, origin, _moments(breath, beat), None, seconds, thickness=7.0)


def _beating(rng: np.random.Generator, frames: int, size: int) -> _View:
    """One to two beats at 20 to 50 frames a second while the breath is held, or nearly so."""
    seconds = float(rng.uniform(0.02, 0.05))
    breath = np.cumsum(rng.normal(0, 0.03, frames)) + 0.2 * np.sin(np.arange(frames) * rng.uniform(0, 0.2))
    width = float(rng.uniform(150, 330))
    origin = (float(rng.normal(10, 8)) - width / 2, float(rng.normal(0, 8)) - width / 2)
    return _View(width / size, origin, _moments(breath, _beat(rng, frames, seconds)), None, seconds, thickness=8.0)


def _sector(rng: np.random.Generator, frames: int, size: int) -> _View:
    """The probe at the top, 160 to 200 mm deep."""
    seconds = float(rng.uniform(0.02, 0.05))
    breath = np.cumsum(rng.normal(0, 0.06, frames))
    depth = float(rng.uniform(160, 200))
    return _View(
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


def _organs(rng: np.random.Generator, frames: int, size: int) -> _View:
    """Whole bodies in slices of 3 to 8 mm, evenly over 120 to 150 mm of the abdomen, wherever the first may lie."""
    width, step = float(rng.uniform(340, 420)), float(rng.uniform(120, 150)) / frames
    first = -step * ((frames - 1) / 2 + float(rng.uniform(-0.5, 0.5)))
    moments = tuple(Moment(z=first + step * i) for i in range(frames))
    aside, thick = rng.normal(0, 8, 2), min(float(rng.uniform(3, 8)), step)
    return _View(width / size, (float(aside[0]) - width / 2, float(aside[1]) - width / 2), moments, step, None, thick)


_VIEWS = {
    "ct": _stack, "mr": _breathing, "cardiac": _beating, "echo": _sector, "organs_ct": _organs, "organs_mr": _organs,
}  # fmt: skip
