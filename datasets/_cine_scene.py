"""One generated clip: a body, its motion, and a scanner, drawn by a seed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._anatomy import Bend, paint
from vfmadapt.datasets._cine_parts import NAMES
from vfmadapt.datasets._cine_planes import view_of
from vfmadapt.datasets._cine_sensors import (
    CtSensor,
    EchoSensor,
    MrSensor,
    Occluder,
    Palette,
    bolus,
    ct_palette,
    echo_palette,
    mr_palette,
)
from vfmadapt.datasets._cine_trunk import abdomen, trunk
from vfmadapt.datasets._cine_views import apical, lengthwise, perfused, short_axis
from vfmadapt.datasets._procedural import power_noise

VERSION = 2
ORGANS_VERSION = 3
STYLES = ("ct", "mr", "cardiac", "echo", "lesion")
ORGAN_STYLES = ("organs_ct", "organs_mr")
EVENT_STYLES = ("mr_through", "bolus", "perfusion", "shadow")
"""In which structures leave and come back, change their brightness, or are hidden."""

CLASS_NAMES = NAMES

_BODIES = {
    "ct": trunk, "mr": lengthwise, "cardiac": short_axis, "echo": apical, "lesion": trunk, "organs_ct": abdomen,
    "organs_mr": abdomen, "mr_through": lengthwise, "bolus": lengthwise, "perfusion": perfused, "shadow": apical,
}  # fmt: skip
_CT_STYLES = ("ct", "lesion", "organs_ct")
_ECHO_STYLES = ("echo", "shadow")


@dataclass(frozen=True)
class Cine:
    """A clip: grey values uint8 (T, H, W), labels uint8 (T, H, W), mm between slices (None in time), rows and columns.

    `seconds`: between frames, None of a stack of slices.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    spacing: tuple[float | None, float, float]
    seconds: float | None


def render_clip(seed: int, *, style: str, frames: int, size: int = 256) -> Cine:
    """Draw frames of size x size pixels in a style of `STYLES`, `ORGAN_STYLES` or `EVENT_STYLES`.

    Equal arguments give equal clips.
    """
    version = ORGANS_VERSION if style in ORGAN_STYLES else VERSION
    rng = np.random.default_rng([seed, (*STYLES, *ORGAN_STYLES, *EVENT_STYLES).index(style), version])
    solids = _BODIES[style](rng)
    palette, bend = _palette(style, rng), Bend.random(rng, float(rng.uniform(3, 9)))
    view = view_of(style, rng, frames, size, solids, bend)
    if style in ("bolus", "perfusion"):
        palette = bolus(palette, rng, frames, view.seconds or 1.0)
    sensor = _sensor(style, rng, frames, size, view.pixel)
    texture = power_noise(rng, (size, size), 1.3, outer=24)
    turn, mirror = (
        (int(rng.integers(4)), rng.random() < 0.3) if style in ("ct", "lesion") and rng.random() < 0.5 else (0, False)
    )
    image, labels = np.empty((2, frames, size, size), np.uint8)
    for index, moment in enumerate(view.moments):
        plane = bend.plane((size, size), view.origin, view.pixel, moment.z)
        picture = paint(
            solids,
            palette.at(index),
            plane,
            moment,
            contrast=palette.contrast,
            texture=texture,
            thickness=view.thickness,
        )
        shown = sensor(picture.brightness, plane.x, plane.y)
        if isinstance(sensor, EchoSensor):
            picture.labels[~sensor.visible(index)] = 0
        for kept, values in ((image, shown * 255 + 0.5), (labels, picture.labels)):
            turned = np.rot90(values, turn)
            kept[index] = turned[:, ::-1] if mirror else turned
    return Cine(image, labels, (view.step, view.pixel, view.pixel), view.seconds)


def _palette(style: str, rng: np.random.Generator) -> Palette:
    if style in _ECHO_STYLES:
        return echo_palette(rng)
    return ct_palette(rng) if style in _CT_STYLES else mr_palette(rng)


def _sensor(
    style: str, rng: np.random.Generator, frames: int, size: int, pixel: float
) -> CtSensor | MrSensor | EchoSensor:
    if style in _ECHO_STYLES:
        occluder = Occluder.random(rng, frames) if style == "shadow" else None
        return EchoSensor(rng, (size, size), pixel, occluder)
    return (CtSensor if style in _CT_STYLES else MrSensor)(rng, (size, size))
