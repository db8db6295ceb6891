"""A procedural radar scene from a seed: land, relief, C-band backscatter in two polarisations, speckle.

Levels are typical of Sentinel-1 ground-range products at 10 m (decibel); speckle is that of 4.4 looks. Needs numpy,
scipy and pillow only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._procedural import Field, Size

VERSION = 1
"""Version of the generator: another number, other pixels."""

NAMES = ("open", "cropland", "forest", "water", "built-up")
OPEN, CROPLAND, FOREST, WATER, BUILT = range(len(NAMES))

# mean backscatter of VV and VH in dB; how much it varies from scene to scene; how much from place to place
_LEVELS = np.array([(-13.0, -20.0), (-11.5, -18.0), (-8.8, -14.2), (-18.5, -26.0), (-6.0, -13.5)], dtype=np.float32)
_OF_SCENE = np.array([1.0, 1.2, 0.6, 2.0, 0.8], dtype=np.float32)
_TEXTURE = np.array([0.9, 0.5, 1.1, 0.4, 2.4], dtype=np.float32)
_PARCELS = 2.2  # dB between the parcels of cropland: bare, rough, crops of several heights
_LOOKS = 4.4
_FLOOR = -25.0  # dB: noise of the instrument, which drowns calm water in VH
_SHOWN = np.array([(-25, 0), (-32, -5), (0, 15)], dtype=np.float32)  # dB of VV, VH and VV / VH that are black and white


@dataclass(frozen=True)
class RadarScene:
    """uint8 image (H, W, 3): VV, VH and their ratio in dB, stretched; uint8 labels (H, W) by `NAMES`."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def render_scene(seed: int, *, size: Size = (256, 256)) -> RadarScene:
    """Render the scene of a seed: the same arguments give the same pixels."""
    rng = np.random.default_rng([VERSION, seed])
    height = proc.power_noise(rng, size, 2.2, outer=rng.uniform(80, 260))
    labels, parcels = _land(rng, size, height)
    decibel = _LEVELS[labels] + (rng.normal(0, 1, len(NAMES)).astype(np.float32) * _OF_SCENE)[labels][..., None]
    field_level = rng.normal(0, _PARCELS, int(parcels.max()) + 1).astype(np.float32)
    cropland = (labels == CROPLAND)[..., None]
    decibel += cropland * field_level[parcels][..., None] * np.array([1.0, 1.3], dtype=np.float32)
    decibel += _TEXTURE[labels][..., None] * proc.power_noise(rng, size, 0.9, outer=10)[..., None]
    decibel += _rough_water(rng, labels)[..., None] * np.array([1.0, 0.4], dtype=np.float32)
    decibel[..., 0] += _bright_walls(rng, labels)
    decibel += _relief(rng, height, labels)[..., None]
    power = np.asarray(10 ** (decibel / 10) + np.float32(10 ** (_FLOOR / 10)), dtype=np.float32)
    seen = 10 * np.log10(_speckled(rng, power))
    bands = np.dstack([seen[..., 0], seen[..., 1], seen[..., 0] - seen[..., 1]])
    shown = (bands - _SHOWN[:, 0]) / (_SHOWN[:, 1] - _SHOWN[:, 0])
    return RadarScene(np.asarray(np.clip(shown, 0, 1) * 255 + 0.5, dtype=np.uint8), labels)


def _land(rng: np.random.Generator, size: Size, height: Field) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Labels (H, W) and the number of each pixel's parcel: woods on hills, water in valleys, towns on open land."""
    labels = np.full(size, OPEN, dtype=np.uint8)
    u, v = proc.coordinates(size, rng.uniform(0, np.pi))
    width = rng.uniform(8, 26)
    parcels, border = proc.parcels(rng, u, v + 4 * proc.power_noise(rng, size, 2.5, outer=120), width, 2.2 * width)
    farmed = proc.power_noise(rng, size, 2.4, outer=140) - 0.4 * height
    labels[(farmed > proc.quantile(farmed, rng.uniform(0.2, 0.75))) & (border > 0.6)] = CROPLAND
    wooded = proc.power_noise(rng, size, 1.8, outer=rng.uniform(40, 120)) + 0.7 * height
    labels[wooded > proc.quantile(wooded, rng.uniform(0.5, 0.95))] = FOREST
    for _ in range(rng.integers(0, 4)):
        labels[_town(rng, size)] = BUILT
    low = proc.quantile(height, rng.uniform(-0.1, 0.25))
    labels[height < low] = WATER
    if rng.random() < 0.5:
        river = proc.draw_lines(size, [proc.walk(rng, size, step=6, turn=0.25)], [rng.uniform(1.5, 5)])
        labels[river > 0.5] = WATER
    return labels, parcels


def _town(rng: np.random.Generator, size: Size) -> NDArray[np.bool_]:
    """A built-up area with a ragged edge."""
    y, x = (rng.uniform(0, n) for n in size)
    radius = rng.uniform(10, 45)
    rows, columns = np.ogrid[: size[0], : size[1]]
    distance = np.hypot(rows - y, columns - x) / radius
    return np.asarray(distance + 0.35 * proc.power_noise(rng, size, 1.6, outer=24) < 1)


def _rough_water(rng: np.random.Generator, labels: NDArray[np.uint8]) -> Field:
    """What wind adds to water, in dB: gusts of a strength that the scene has."""
    gusts = proc.power_noise(rng, labels.shape, 2.0, outer=90, anisotropy=3, angle=rng.uniform(0, np.pi))
    return np.asarray((labels == WATER) * (rng.uniform(0, 6) + 1.2 * gusts), dtype=np.float32)


def _bright_walls(rng: np.random.Generator, labels: NDArray[np.uint8]) -> Field:
    """What VV gains, in dB, where walls and ground form corners that face the sensor: few pixels, very bright."""
    corner = (rng.random(labels.shape) < 0.06) & (labels == BUILT)
    return np.asarray(corner * rng.gamma(2.0, 4.0, labels.shape), dtype=np.float32)


def _relief(rng: np.random.Generator, height: Field, labels: NDArray[np.uint8]) -> Field:
    """What slopes change, in dB, by their tilt to the sensor, which looks from one side or the other; water is flat."""
    slope = np.gradient(height, axis=1) * rng.choice((-1, 1)) * rng.uniform(0, 60)
    return np.asarray((labels != WATER) * np.clip(slope, -4, 6), dtype=np.float32)


def _speckled(rng: np.random.Generator, power: NDArray[np.float32]) -> NDArray[np.float32]:
    """Power (H, W, 2) with multiplicative gamma noise, a little correlated as resampled products have it."""
    speckle = rng.gamma(_LOOKS, 1 / _LOOKS, power.shape)
    blurred = np.stack([proc.blur((power[..., i] * speckle[..., i]).astype(np.float32), 0.45) for i in (0, 1)], -1)
    return np.asarray(np.maximum(blurred, 1e-5), dtype=np.float32)
