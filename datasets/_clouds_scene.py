"""A procedural satellite scene from a seed: surface, clouds, sensor. Needs numpy, scipy and pillow only."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets import _clouds_sky as sky
from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._clouds_sensor import TRAIN_PRESETS, Preset, draw_sensor
from vfmadapt.datasets._clouds_spectra import BANDS
from vfmadapt.datasets._clouds_surface import Sun, render_surface
from vfmadapt.datasets._procedural import Size

VERSION = 1
"""Version of the generator: another number, other pixels."""

NODATA_SHARE = 0.15
"""Share of scenes that lie on the edge of a swath."""


@dataclass(frozen=True)
class Scene:
    """A labelled scene.

    Args:
        bands: float32 (6, H, W), reflectance-like, about 0..1; 0 where not valid.
        label: uint8 (H, W): 0 clear, 1 thick cloud, 2 thin cloud, 3 shadow, 255 ignore (also where not valid).
        valid: bool (H, W).
        names: of the bands, in order.
        preset: name of the sensor family.
        sun: direction towards the sun.
        shifts: for each cloud layer, (rows, columns) in pixels from a cloud to its shadow.
        pixel_size: metres.
    """

    bands: NDArray[np.float32]
    label: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    names: tuple[str, ...]
    preset: str
    sun: Sun
    shifts: tuple[tuple[float, float], ...]
    pixel_size: float


def _swath(rng: np.random.Generator, size: Size) -> NDArray[np.bool_]:
    """Valid pixels (H, W); some scenes lose a wedge to the edge of a rotated swath."""
    if rng.random() >= NODATA_SHARE:
        return np.ones(size, dtype=bool)
    u, _ = proc.coordinates(size, rng.uniform(0, 2 * np.pi))
    return np.asarray(u < proc.quantile(u, rng.uniform(0.6, 0.97)))


def render_scene(seed: int, *, size: Size = (256, 256), preset: Preset | None = None) -> Scene:
    """Render the scene of a seed: the same arguments give the same pixels.

    Args:
        seed: any number >= 0.
        size: (H, W) in pixels.
        preset: sensor family; by default one of the training families, drawn by the seed.
    """
    rng = np.random.default_rng([VERSION, seed])
    family = preset if preset is not None else TRAIN_PRESETS[rng.integers(len(TRAIN_PRESETS))]
    sun = Sun(rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(28, 70)))
    pixel_size = float(rng.choice((10, 15, 16, 20, 30)))
    surface = render_surface(rng, size, sun)
    layers = sky.draw_layers(rng, size, sun)
    seen = sky.cover(rng, surface, layers, sun)
    sensor = draw_sensor(rng, family, surface)
    bands = sensor.sense(rng, seen.image)
    seen_cloud, seen_shadow = sensor.change(seen.image, seen.shaded), sensor.change(seen.shaded, seen.open)
    label = sky.label(seen, sensor.saturates(seen.image), seen_cloud, seen_shadow)
    valid = _swath(rng, size)
    label[~valid] = sky.IGNORE
    bands[:, ~valid] = 0
    shifts = tuple(layer.shift for layer in layers)
    return Scene(bands, label, valid, BANDS, family.name, sun, shifts, pixel_size)
