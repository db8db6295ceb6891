"""A procedural radar scene from a seed: land as an airborne X-band radar sees it, uncalibrated, in two polarisations.

Pixels of about 1.5 m. What tells the classes is what a radar of that resolution shows of them: crowns and houses that
are bright towards the sensor and throw shadows, rows of crops, swell. Brightness tells little, since the gain of each
scene is another. Needs numpy, scipy and pillow only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._procedural import Field, Size

VERSION = 2
"""Version of the generator: another number, other pixels."""

NAMES = ("open", "cropland", "forest", "water", "built-up")
OPEN, CROPLAND, FOREST, WATER, BUILT = range(len(NAMES))

# mean backscatter of VV and VH in dB and how much it varies from scene to scene
_LEVELS = np.array([(-12.5, -19.5), (-11.0, -17.5), (-10.0, -15.5), (-15.0, -23.0), (-9.5, -16.5)], dtype=np.float32)
_OF_SCENE = np.array([1.2, 1.2, 0.8, 2.0, 1.0], dtype=np.float32)
_GAIN = 2.5  # dB, of a scene and polarisation: products for the eye are not calibrated
_ACROSS = 2.0  # dB, that the antenna's pattern changes across a scene
_PARCELS = 2.0  # dB between the parcels of cropland: bare, rough, crops of several heights
_LOOKS = 6.0
_FLOOR = -27.0  # dB: noise of the instrument
_SHOWN = np.array(
    [(-28, 3), (-34, -3), (-2, 17)], dtype=np.float32
)  # dB of VV, VH and VV / VH that are black and white


@dataclass(frozen=True)
class RadarScene:
    """uint8 image (H, W, 3): VV, VH and their ratio in dB, stretched; uint8 labels (H, W) by `NAMES`."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def render_scene(seed: int, *, size: Size = (256, 256)) -> RadarScene:
    """Render the scene of a seed: the same arguments give the same pixels."""
    rng = np.random.default_rng([VERSION, seed])
    height = proc.power_noise(rng, size, 2.2, outer=rng.uniform(120, 300))
    towards = int(rng.choice((-1, 1)))  # the side from which the sensor looks: -1 left, 1 right
    street = rng.uniform(0, np.pi)
    labels, parcels = _land(rng, size, height)
    decibel = _LEVELS[labels] + (rng.normal(0, 1, len(NAMES)).astype(np.float32) * _OF_SCENE)[labels][..., None]
    both = 0.5 * proc.power_noise(rng, size, 0.9, outer=10) + 0.8 * proc.power_noise(rng, size, 2.0, outer=80)
    for label, relief in (
        (CROPLAND, _crops(rng, size, parcels)),
        (FOREST, _crowns(rng, size, towards)),
        (WATER, _swell(rng, size)),
        (BUILT, _houses(rng, size, street, towards)),
    ):
        both += (labels == label) * relief
    slope = -towards * np.gradient(height, axis=1) * rng.uniform(0, 60)
    both += (labels != WATER) * np.clip(slope, -4, 5)
    both += np.linspace(-1, 1, size[1], dtype=np.float32) * rng.normal(0, _ACROSS / 2)
    decibel += both[..., None] * np.array([1.0, 0.8], dtype=np.float32)
    power = np.asarray(10 ** (decibel / 10) + np.float32(10 ** (_FLOOR / 10)), dtype=np.float32)
    seen = 10 * np.log10(_speckled(rng, power)) + rng.normal(0, _GAIN, 2).astype(np.float32)
    bands = np.dstack([seen[..., 0], seen[..., 1], seen[..., 0] - seen[..., 1]])
    shown = (bands - _SHOWN[:, 0]) / (_SHOWN[:, 1] - _SHOWN[:, 0])
    return RadarScene(np.asarray(np.clip(shown, 0, 1) * 255 + 0.5, dtype=np.uint8), labels)


def _land(rng: np.random.Generator, size: Size, height: Field) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Labels (H, W) and the number of each pixel's parcel: woods on hills, water in valleys, towns on open land."""
    labels = np.full(size, OPEN, dtype=np.uint8)
    u, v = proc.coordinates(size, rng.uniform(0, np.pi))
    width = rng.uniform(24, 60)
    parcels, border = proc.parcels(rng, u, v + 4 * proc.power_noise(rng, size, 2.5, outer=160), width, 2.2 * width)
    farmed = rng.random(int(parcels.max()) + 1) < rng.uniform(0.3, 0.8)
    labels[farmed[parcels] & (border > 1)] = CROPLAND
    wooded = proc.power_noise(rng, size, 2.0, outer=rng.uniform(80, 200)) + 0.5 * height
    labels[wooded > proc.quantile(wooded, rng.uniform(0.5, 0.95))] = FOREST
    for _ in range(rng.integers(0, 4)):
        labels[_town(rng, size)] = BUILT
    low = proc.quantile(height, rng.uniform(-0.1, 0.3))
    labels[height < low] = WATER
    if rng.random() < 0.4:
        river = proc.draw_lines(size, [proc.walk(rng, size, step=10, turn=0.25)], [rng.uniform(5, 14)])
        labels[river > 0.5] = WATER
    return labels, parcels


def _town(rng: np.random.Generator, size: Size) -> NDArray[np.bool_]:
    """A built-up area with a ragged edge."""
    y, x = (rng.uniform(0, n) for n in size)
    radius = rng.uniform(30, 80)
    rows, columns = np.ogrid[: size[0], : size[1]]
    distance = np.hypot(rows - y, columns - x) / radius
    return np.asarray(distance + 0.3 * proc.power_noise(rng, size, 2.0, outer=60) < 1)


def _crops(rng: np.random.Generator, size: Size, parcels: NDArray[np.int32]) -> Field:
    """Cropland in dB around 0: each parcel its level, and rows or lanes in a direction of its own."""
    count = int(parcels.max()) + 1
    level = rng.normal(0, _PARCELS, count).astype(np.float32)
    angle, period = rng.uniform(0, np.pi, count), rng.uniform(5, 11, count)
    strength = rng.uniform(0.8, 3.0, count).astype(np.float32)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    across = columns * np.sin(angle).astype(np.float32)[parcels] + rows * np.cos(angle).astype(np.float32)[parcels]
    wave = np.sin(across * (2 * np.pi / period).astype(np.float32)[parcels])
    return np.asarray(level[parcels] + strength[parcels] * wave, dtype=np.float32)


def _crowns(rng: np.random.Generator, size: Size, towards: int) -> Field:
    """Forest in dB around 0: domes of several heights, bright towards the sensor, dark behind."""
    u, v = proc.coordinates(size)
    number, near, _ = proc.cells(rng, u, v, rng.uniform(6, 12))
    tall = rng.uniform(0.4, 1.3, int(number.max()) + 1).astype(np.float32)
    canopy = proc.blur(tall[number] * np.maximum(1 - 1.6 * near**2, 0), 0.8)
    return np.asarray(np.clip(-towards * np.gradient(canopy, axis=1) * 22, -6, 6), dtype=np.float32)


def _swell(rng: np.random.Generator, size: Size) -> Field:
    """Water in dB around 0: waves across one direction under gusts, at times calm."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(9, 24)
    u, _ = proc.coordinates(size, angle)
    bent = u + period * 0.5 * proc.power_noise(rng, size, 2.2, outer=90, anisotropy=2, angle=angle + np.pi / 2)
    gusts = proc.power_noise(rng, size, 2.0, outer=110)
    strength = rng.uniform(0.0, 2.5) * proc.smoothstep(gusts, -1.5, 1.0)
    wave = strength * np.sin(bent * np.float32(2 * np.pi / period))
    return np.asarray(rng.uniform(-2, 3) + gusts + wave, dtype=np.float32)


def _houses(rng: np.random.Generator, size: Size, street: float, towards: int) -> Field:
    """Towns in dB around 0: rows of houses, whose walls to the sensor are the brightest, each with its shadow."""
    u, v = proc.coordinates(size, street)
    depth = rng.uniform(12, 22)
    lot, border = proc.parcels(rng, u, v, depth, depth * rng.uniform(0.8, 2))
    count = int(lot.max()) + 1
    built, wall = rng.random(count) < 0.8, rng.gamma(6.0, 1.8, count).astype(np.float32)
    house = (border > rng.uniform(2, 4)) & built[lot]
    front = house & ~np.roll(house, -2 * towards, axis=1)
    shadow = ~house & np.roll(house, -towards * int(rng.integers(4, 9)), axis=1)
    roofs = rng.normal(0, 1.5, count).astype(np.float32)[lot]
    return np.asarray(house * roofs + front * wall[lot] - shadow * np.float32(7), dtype=np.float32)


def _speckled(rng: np.random.Generator, power: NDArray[np.float32]) -> NDArray[np.float32]:
    """Power (H, W, 2) with multiplicative gamma noise, a little correlated as resampled products have it."""
    speckle = rng.gamma(_LOOKS, 1 / _LOOKS, power.shape)
    blurred = np.stack([proc.blur((power[..., i] * speckle[..., i]).astype(np.float32), 0.45) for i in (0, 1)], -1)
    return np.asarray(np.maximum(blurred, 1e-5), dtype=np.float32)
