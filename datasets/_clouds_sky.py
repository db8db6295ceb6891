"""Clouds of the procedural scenes: optical depth, two-stream reflectance, lit tops, projected shadows, labels.

Optical depth tau is drawn as a power-law field; reflectance and transmittance follow the two-stream formula for
conservative scattering, R = a tau / (1 + a tau) with a = (1 - g) / 2 = 0.075 and asymmetry g = 0.85.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._clouds_surface import Stack, Sun
from vfmadapt.datasets._procedural import Field, Size

CLEAR, THICK, THIN, SHADOW, IGNORE = 0, 1, 2, 3, 255

THIN_FROM = 0.10
"""Cloud reflectance at which a veil starts to be visible over ordinary ground: the border of clear and thin."""
THICK_FROM = 0.25
"""Cloud reflectance at which the ground is all but hidden (tau about 4.5): the border of thin and thick."""
SHADOW_FROM = 0.50
"""Share of the direct sunlight that must be missing for a shadow."""
RIM_FROM = 0.15
"""Cloud reflectance from which the blurred rim of a thick cloud counts as part of it; below, nobody can say."""
SMALLEST = 64
"""Pixels of the smallest region that is labelled by itself."""
SEEN_CLOUD, SEEN_SHADOW = 0.05, 0.04
"""Changes of the stored value (of about 0..1) that can just be seen; shadows are found in darker, quieter ground."""

_TWO_STREAM = 0.075
# Skylight as a share of the light on open ground, per band (Rayleigh): it lights the shadows.
_SKYLIGHT = np.asarray((0.30, 0.22, 0.16, 0.09, 0.04, 0.02), dtype=np.float32)[:, None, None]
# Cloud reflectance relative to blue: droplets absorb a little, ice a lot, beyond 1.5 um.
_DROPLETS = np.asarray((1.0, 1.0, 1.0, 0.98, 0.80, 0.62), dtype=np.float32)[:, None, None]
_ICE = np.asarray((1.0, 0.98, 0.96, 0.93, 0.50, 0.38), dtype=np.float32)[:, None, None]


@dataclass(frozen=True)
class Layer:
    """A cloud layer: optical depth on the scene's canvas, how far its shadow falls, and what it is made of."""

    tau: Field
    shift: tuple[float, float]  # (rows, columns) from cloud to shadow, pixels
    ice: bool


Regime = Callable[[np.random.Generator, Size], Field]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _grow(field: Field, cover: float, peak: float, power: float = 1.0) -> Field:
    """Optical depth that rises from 0 at the quantile 1 - cover to about `peak` where the field is highest."""
    level = proc.quantile(field, 1 - cover)
    top = max(proc.quantile(field, 0.98), level + 0.4)
    rise = np.maximum((field - np.float32(level)) / np.float32(top - level), 0)
    return np.asarray(np.float32(peak) * rise ** np.float32(power), dtype=np.float32)


def _wisps(rng: np.random.Generator, field: Field, strength: float) -> Field:
    """Tear a field by a turbulent displacement."""
    size = (field.shape[0], field.shape[1])
    rows, columns = (proc.power_noise(rng, size, 1.8, outer=60) * np.float32(strength) for _ in range(2))
    return proc.warp(field, rows, columns)


def _cumulus(rng: np.random.Generator, size: Size) -> Field:
    outer, inner = _log_uniform(rng, 80, 300), rng.uniform(1, 4)
    noise = proc.power_noise(rng, size, rng.uniform(1.6, 2.1), outer=outer, inner=inner)
    return _grow(noise, rng.uniform(0.10, 0.36), _log_uniform(rng, 30, 90), rng.uniform(0.35, 0.7))


def _streets(rng: np.random.Generator, size: Size) -> Field:
    angle, spacing = rng.uniform(0, np.pi), _log_uniform(rng, 55, 140)
    _, v = proc.coordinates(size, angle)
    bend = proc.power_noise(rng, size, 2.5, outer=200) * np.float32(0.25 * spacing)
    rows = np.cos((v + bend) * np.float32(2 * np.pi / spacing) + np.float32(rng.uniform(0, 6)))
    noise = proc.power_noise(rng, size, 1.7, outer=spacing, anisotropy=2, angle=angle)
    return _grow(
        noise + np.float32(rng.uniform(0.5, 1.2)) * rows, rng.uniform(0.1, 0.4), _log_uniform(rng, 30, 80), 0.5
    )


def _cellular(rng: np.random.Generator, size: Size) -> Field:
    """Stratocumulus: closed cells inside a deck that ends somewhere."""
    scale = _log_uniform(rng, 24, 60)
    u, v = proc.coordinates(size, rng.uniform(0, np.pi))
    noise = proc.power_noise(rng, size, 1.7, outer=scale)
    _, first, _ = proc.cells(rng, u + noise * np.float32(0.18 * scale), v * np.float32(rng.uniform(1, 1.6)), scale)
    deck = proc.power_noise(rng, size, 2.0, outer=250)
    return _grow(1.1 * deck + 0.45 * noise - 1.3 * first, rng.uniform(0.2, 0.6), _log_uniform(rng, 25, 60), 0.5)


def _fractal(rng: np.random.Generator, size: Size) -> Field:
    noise = proc.power_noise(
        rng, size, rng.uniform(1.5, 2.0), outer=_log_uniform(rng, 120, 400), inner=rng.uniform(1, 3)
    )
    torn = _wisps(rng, noise, rng.uniform(0, 8))
    return _grow(torn, rng.uniform(0.15, 0.6), _log_uniform(rng, 25, 70), rng.uniform(0.35, 0.75))


def _ripples(rng: np.random.Generator, size: Size) -> Field:
    """Altocumulus: small blobs or rolls within a larger sheet."""
    length, stretch, angle = _log_uniform(rng, 20, 36), rng.uniform(1, 3), rng.uniform(0, np.pi)
    blobs = proc.power_noise(rng, size, 3.0, outer=length, inner=length / 8, anisotropy=stretch, angle=angle)
    sheet = proc.power_noise(rng, size, 2.0, outer=200)
    peak = rng.uniform(2.4, 3.6) if rng.random() < 0.5 else _log_uniform(rng, 25, 50)  # all thin, or nearly all thick
    return _grow(sheet + np.float32(rng.uniform(0.3, 0.7)) * blobs, rng.uniform(0.2, 0.55), peak, 0.7)


def _cirrus(rng: np.random.Generator, size: Size) -> Field:
    outer, stretch, angle = _log_uniform(rng, 120, 300), _log_uniform(rng, 2, 8), rng.uniform(0, np.pi)
    noise = proc.power_noise(rng, size, rng.uniform(1.6, 2.1), outer=outer, inner=1.0, anisotropy=stretch, angle=angle)
    torn = _wisps(rng, noise, rng.uniform(2, 14))
    return _grow(torn, rng.uniform(0.3, 0.75), _log_uniform(rng, 2.6, 3.8), rng.uniform(0.25, 0.5))


def _veil(rng: np.random.Generator, size: Size) -> Field:
    """Fog and smooth stratus, half transparent."""
    outer, inner = _log_uniform(rng, 120, 400), rng.uniform(0, 4)
    noise = proc.power_noise(rng, size, rng.uniform(1.8, 2.5), outer=outer, inner=inner)
    return _grow(noise, rng.uniform(0.3, 0.75), _log_uniform(rng, 2.6, 3.8), rng.uniform(0.25, 0.5))


def _plume(rng: np.random.Generator, size: Size) -> Field:
    """One great soft cloud with fibres at its rim."""
    angle = rng.uniform(0, np.pi)
    body = proc.power_noise(rng, size, 2.4, outer=300, anisotropy=rng.uniform(1, 4), angle=angle)
    fibre = proc.power_noise(rng, size, 1.5, outer=60, anisotropy=rng.uniform(1, 6), angle=angle)
    torn = _wisps(rng, body + np.float32(rng.uniform(0.1, 0.4)) * fibre, rng.uniform(0, 8))
    return _grow(torn, rng.uniform(0.15, 0.5), _log_uniform(rng, 20, 50), 0.6)


def _overcast(rng: np.random.Generator, size: Size) -> Field:
    noise = proc.power_noise(rng, size, rng.uniform(1.5, 2.0), outer=_log_uniform(rng, 60, 200))
    return _grow(noise, rng.uniform(0.7, 0.9), _log_uniform(rng, 25, 60), 0.6)


def _popcorn(rng: np.random.Generator, size: Size) -> Field:
    noise = proc.power_noise(rng, size, 2.2, outer=_log_uniform(rng, 30, 60), inner=2.0)
    where = proc.power_noise(rng, size, 2.0, outer=150)
    mixed = noise + np.float32(rng.uniform(0.2, 1.0)) * where
    return _grow(mixed, rng.uniform(0.08, 0.25), _log_uniform(rng, 30, 90), 0.5)


# regime: (function, weight, is it ice, lowest and highest shift of its shadow in pixels)
REGIMES: Mapping[str, tuple[Regime, float, bool, tuple[float, float]]] = {
    "cumulus": (_cumulus, 0.32, False, (20, 60)),
    "streets": (_streets, 0.06, False, (18, 40)),
    "cellular": (_cellular, 0.06, False, (10, 40)),
    "fractal": (_fractal, 0.16, False, (20, 60)),
    "ripples": (_ripples, 0.04, False, (15, 70)),
    "cirrus": (_cirrus, 0.19, True, (40, 90)),
    "veil": (_veil, 0.17, False, (5, 20)),
    "plume": (_plume, 0.10, False, (20, 60)),
    "overcast": (_overcast, 0.02, False, (8, 40)),
    "popcorn": (_popcorn, 0.05, False, (14, 30)),
}
"""Each cloudy scene has one of these; a second, high layer of cirrus or a veil lies over some."""

CLOUDLESS = 0.04
"""Share of scenes without cloud."""


def draw_layers(rng: np.random.Generator, size: Size, sun: Sun) -> list[Layer]:
    """The cloud layers of a scene on a canvas that reaches as far beyond the image as shadows come from.

    Each layer's `tau` is (H + |rows|, W + |columns|), rounded up: see `project`.
    """
    if rng.random() < CLOUDLESS:
        return []
    names = list(REGIMES)
    weights = np.asarray([REGIMES[name][1] for name in names])
    chosen = [names[rng.choice(len(names), p=weights / weights.sum())]]
    if chosen[0] not in ("cirrus", "veil", "overcast") and rng.random() < 0.25:
        chosen.append("cirrus" if rng.random() < 0.6 else "veil")
    layers = []
    for name in chosen:
        regime, _, ice, (low, high) = REGIMES[name]
        length = _log_uniform(rng, low, high)
        shift = (float(np.cos(sun.azimuth) * length), float(-np.sin(sun.azimuth) * length))  # away from the sun
        canvas = (size[0] + int(abs(shift[0])) + 2, size[1] + int(abs(shift[1])) + 2)
        layers.append(Layer(regime(rng, canvas), shift, ice))
    return layers


def project(layer: Layer, size: Size) -> tuple[Field, Field]:
    """Optical depth above each pixel, and between each pixel and the sun: two (H, W) crops of the canvas."""
    extra = (layer.tau.shape[0] - size[0], layer.tau.shape[1] - size[1])
    top = extra[0] - 1 if layer.shift[0] > 0 else 0
    left = extra[1] - 1 if layer.shift[1] > 0 else 0
    rows, columns = round(layer.shift[0]), round(layer.shift[1])
    above = layer.tau[top : top + size[0], left : left + size[1]]
    towards = layer.tau[top - rows :, left - columns :][: size[0], : size[1]]
    return above, towards


def _lit(tau: Field, sun: Sun, strength: float) -> Field:
    """Brightness of the cloud tops, about 1: slopes of sqrt(tau), as height, that face the sun are brighter."""
    height = proc.blur(np.sqrt(tau), 1.0)
    light = proc.hillshade(height, sun.azimuth, sun.elevation, strength)
    return np.asarray(0.55 + 0.45 * np.minimum(light, 2.0), dtype=np.float32)


@dataclass(frozen=True)
class Sky:
    """A scene under its clouds.

    `cloud`: reflectance of all clouds above a pixel; `missing`: share of the direct sunlight that clouds keep from it;
    both (H, W). `open`, `shaded`, `image`: the surface in full sun, under shadows, seen through the clouds; (6, H, W).
    """

    cloud: Field
    missing: Field
    open: Stack
    shaded: Stack
    image: Stack


def cover(rng: np.random.Generator, surface: Stack, layers: list[Layer], sun: Sun) -> Sky:
    """Shade the surface (6, H, W), then lay the clouds over it, lowest first."""
    size = (surface.shape[1], surface.shape[2])
    pairs = [project(layer, size) for layer in layers]
    light = np.ones(size, dtype=np.float32)
    for layer, (_, towards) in zip(layers, pairs, strict=True):
        depth = proc.blur(towards, 0.7 + 0.02 * float(np.hypot(*layer.shift)))  # the sun is a disc, cloud sides scatter
        light *= 1 - np.float32(0.95) * _reflectance(np.float32(5) * depth)
    skylight = _SKYLIGHT * np.float32(rng.uniform(0.2, 0.5))
    image = shaded = surface * (skylight + (1 - skylight) * light)
    cloud = np.zeros(size, dtype=np.float32)
    for layer, (tau, _) in zip(layers, pairs, strict=True):
        grey = _reflectance(tau)
        lit = _lit(tau, sun, rng.uniform(0.2, 1.2)) * np.float32(rng.uniform(0.9, 1.15))
        image = (grey * lit) * (_ICE if layer.ice else _DROPLETS) + image * ((1 - grey) ** 2 / (1 - 0.5 * grey))
        cloud = 1 - (1 - cloud) * (1 - grey)
    return Sky(cloud, 1 - light, surface, shaded, np.asarray(image, dtype=np.float32))


def _reflectance(tau: Field) -> Field:
    scaled = np.float32(_TWO_STREAM) * tau
    return np.asarray(scaled / (1 + scaled), dtype=np.float32)


def label(sky: Sky, saturated: NDArray[np.bool_], seen_cloud: Field, seen_shadow: Field) -> NDArray[np.uint8]:
    """Labels (H, W): cloud where there is enough of it, shadow where no cloud hides it.

    The narrow bands of doubt around each threshold are ignored, and so is what the sensor does not show.

    Args:
        sky: the scene.
        saturated: where the sensor stores its brightest value, so that cloud hides the ground though it be thin (H, W).
        seen_cloud: by how much the clouds change the picture, in output units (H, W).
        seen_shadow: by how much the shadows change it.
    """
    cloud, missing = proc.blur(sky.cloud, 1.3), proc.blur(sky.missing, 1.3)
    body = proc.blur(cloud, 2.0)  # a gap of a few pixels inside a thick cloud belongs to it
    hidden = proc.blur(saturated.astype(np.float32), 1.3) > 0.5
    labels = np.where(missing > SHADOW_FROM, np.uint8(SHADOW), np.uint8(CLEAR))
    labels[cloud > THIN_FROM] = THIN
    labels[((body > THICK_FROM) | hidden) & (cloud > THIN_FROM)] = THICK
    rim = _rim(labels)
    labels[rim] = np.where(cloud[rim] > RIM_FROM, THICK, IGNORE)
    labels = proc.remove_specks(labels, 4, SMALLEST)
    doubt = (np.abs(cloud / THIN_FROM - 1) < 0.12) | ((np.abs(body / THICK_FROM - 1) < 0.05) & ~hidden)
    doubt |= (np.abs(missing / SHADOW_FROM - 1) < 0.1) & (cloud < THIN_FROM)
    doubt |= (labels == SHADOW) & (proc.blur(seen_shadow, 2.0) < SEEN_SHADOW)
    doubt |= ((labels == THIN) | (labels == THICK)) & (proc.blur(seen_cloud, 2.0) < SEEN_CLOUD)
    labels[doubt] = IGNORE
    return labels


def _rim(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Thin cloud in strips narrower than 5 pixels beside thick cloud: the blurred edge of that cloud, no thin cloud."""
    from scipy.ndimage import maximum_filter, minimum_filter

    thin = (labels == THIN).astype(np.uint8)
    broad = maximum_filter(minimum_filter(thin, 5), 5)
    near_thick = maximum_filter((labels == THICK).astype(np.uint8), 9)
    return np.asarray((thin > broad) & (near_thick > 0))
