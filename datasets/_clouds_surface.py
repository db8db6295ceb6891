"""Land covers of the procedural scenes: textures, relief, and how covers share a scene."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._clouds_spectra import BANDS, SPECTRA
from vfmadapt.datasets._procedural import Field, Size


@dataclass(frozen=True)
class Sun:
    """Direction towards the sun: azimuth clockwise from north, elevation above the horizon; radians."""

    azimuth: float
    elevation: float


Stack = NDArray[np.float32]  # (6, H, W)
Cover = Callable[[np.random.Generator, Size, Sun], Stack]


def _spectrum(rng: np.random.Generator, *names: str) -> Stack:
    """One of the named spectra, varied: (6, 1, 1)."""
    base = np.asarray(SPECTRA[names[rng.integers(len(names))]], dtype=np.float32)
    varied = base * np.float32(rng.lognormal(0, 0.15)) * rng.lognormal(0, 0.07, len(BANDS)).astype(np.float32)
    return np.asarray(varied[:, None, None], dtype=np.float32)


def _blend(first: Stack, second: Stack, share: Field | float) -> Stack:
    return np.asarray(first + (second - first) * np.float32(share), dtype=np.float32)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _grain(rng: np.random.Generator, size: Size, amount: float, outer: float = 8.0, exponent: float = 0.8) -> Field:
    """Multiplicative texture around 1."""
    noise = proc.power_noise(rng, size, exponent, outer=outer)
    return np.asarray(np.maximum(1 + np.float32(amount) * noise, 0.2), dtype=np.float32)


def _mountains(rng: np.random.Generator, size: Size, scale: float) -> Field:
    """Height of ridges and valleys, 0..about 1: ridged noise on a smooth base."""
    base = proc.power_noise(rng, size, 2.2, outer=scale)
    crest = proc.ridged(proc.power_noise(rng, size, 1.9, outer=scale * 0.6, inner=1.0), 0.8)
    return np.asarray(0.22 * base + 0.35 * crest * (1 + 0.4 * base) + 0.35, dtype=np.float32)


def _hills(rng: np.random.Generator, size: Size, sun: Sun, strength: float) -> Field:
    scale = _log_uniform(rng, 40, 160)
    return proc.hillshade(_mountains(rng, size, scale), sun.azimuth, sun.elevation, strength * scale / 6)


def _clearings(rng: np.random.Generator, size: Size) -> Field:
    """Felled parcels, straight-edged, in clusters."""
    u, v = proc.coordinates(size, rng.uniform(0, np.pi))
    side = _log_uniform(rng, 5, 25)
    number, _ = proc.parcels(rng, u, v, side, side * rng.uniform(1, 3))
    felled = (rng.random(int(number.max()) + 1) < rng.uniform(0.1, 0.5)).astype(np.float32)
    return felled[number] * proc.smoothstep(proc.power_noise(rng, size, 2.2, outer=100), 0.6, 0.7)


def _woods(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    patches = proc.smoothstep(proc.power_noise(rng, size, 1.3, outer=_log_uniform(rng, 20, 120)), -1.5, 1.5)
    stack = _blend(
        _spectrum(rng, "forest", "dark_forest"),
        _spectrum(rng, "forest", "grass", "marsh"),
        patches * rng.uniform(0.2, 0.9),
    )
    stack *= _grain(rng, size, rng.uniform(0.02, 0.14), outer=rng.uniform(3, 12))
    if rng.random() < 0.5:
        stack *= 0.25 + 0.75 * np.minimum(_hills(rng, size, sun, rng.uniform(0.1, 0.7)), 2.0)
    if rng.random() < 0.3:
        stack = _blend(stack, _spectrum(rng, "soil", "dry_grass", "red_soil", "young_crop"), _clearings(rng, size))
    return stack


def _fields(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    u, v = proc.coordinates(size, rng.uniform(0, np.pi))
    if rng.random() < 0.7:
        v = v + proc.power_noise(rng, size, 2.5, outer=120) * np.float32(rng.uniform(1, 12))
    width = _log_uniform(rng, 5, 32)
    number, border = proc.parcels(rng, u, v, width, width * _log_uniform(rng, 1, 5))
    dominant = ("crop", "young_crop", "grass") if rng.random() < 0.6 else ("soil", "stubble", "dry_grass", "red_soil")
    names = rng.choice(("crop", "young_crop", "soil", "stubble", "wet_soil", "dry_grass", "grass"), 3).tolist()
    table = np.stack(
        [_spectrum(rng, *dominant)[:, 0, 0] for _ in range(5)] + [_spectrum(rng, n)[:, 0, 0] for n in names], 1
    )
    of_parcel = rng.integers(0, table.shape[1], int(number.max()) + 1)
    if rng.random() < 0.5:  # nearly one crop: a calm pattern
        of_parcel = np.where(rng.random(len(of_parcel)) < 0.7, 0, of_parcel)
    tone = rng.lognormal(0, rng.uniform(0.03, 0.15), len(of_parcel)).astype(np.float32)
    stack = np.take(table, of_parcel[number], axis=1) * tone[number]
    rows = 1 + np.float32(rng.uniform(0, 0.06)) * np.sin(v * np.float32(2 * np.pi / rng.uniform(2.5, 6)))
    stack *= rows * _grain(rng, size, rng.uniform(0.02, 0.08), outer=20)
    edge = 1 - proc.smoothstep(border, 0.2, rng.uniform(0.8, 1.6))
    return _blend(stack, _spectrum(rng, "soil", "stubble", "forest", "wet_soil", "grass"), edge * rng.uniform(0.2, 0.9))


def _soils(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    mottle = proc.smoothstep(proc.power_noise(rng, size, 1.3, outer=_log_uniform(rng, 30, 150)), -1.6, 1.6)
    stack = _blend(
        _spectrum(rng, "red_soil", "soil", "stubble"),
        _spectrum(rng, "soil", "dry_grass", "red_soil", "sand"),
        mottle * rng.uniform(0.1, 0.6),
    )
    valley = proc.ridged(
        proc.power_noise(rng, size, 2.0, outer=_log_uniform(rng, 60, 200), inner=1.5), rng.uniform(1.5, 4)
    )
    stack = _blend(
        stack, _spectrum(rng, "forest", "grass", "marsh"), proc.smoothstep(valley, 0.2, 0.9) * rng.uniform(0.1, 0.9)
    )
    bush = proc.smoothstep(proc.power_noise(rng, size, 0.9, outer=rng.uniform(6, 20)), 0.8, 2.2)
    stack = _blend(stack, _spectrum(rng, "forest", "grass", "dark_rock"), bush * rng.uniform(0.0, 0.7))
    return np.asarray(stack * _grain(rng, size, rng.uniform(0.02, 0.1)), dtype=np.float32)


def _desert(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    patches = proc.smoothstep(proc.power_noise(rng, size, 1.7, outer=_log_uniform(rng, 60, 250)), -1.5, 1.5)
    stack = _blend(
        _spectrum(rng, "sand", "pale_sand", "red_soil", "brown_rock"),
        _spectrum(rng, "sand", "gravel", "red_soil"),
        patches * rng.uniform(0.1, 0.6),
    )
    if rng.random() < 0.45:
        wavelength, angle = _log_uniform(rng, 8, 40), rng.uniform(0, np.pi)
        dune = proc.power_noise(rng, size, 2.4, outer=wavelength, inner=1.5, anisotropy=rng.uniform(2, 8), angle=angle)
        dune = proc.ridged(dune, 0.7) if rng.random() < 0.5 else 0.4 * dune
        stack *= 0.4 + 0.6 * np.minimum(
            proc.hillshade(dune, sun.azimuth, sun.elevation, wavelength * rng.uniform(0.05, 0.2)), 2
        )
    else:
        stack *= 0.5 + 0.5 * np.minimum(_hills(rng, size, sun, rng.uniform(0.02, 0.5)), 2)
        wadi = proc.ridged(proc.power_noise(rng, size, 2.0, outer=120, inner=1.0), rng.uniform(4, 9))
        stack *= 1 + wadi * np.float32(rng.uniform(-0.3, 0.3))
    return np.asarray(stack * _grain(rng, size, rng.uniform(0.01, 0.08)), dtype=np.float32)


def _ranges(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    scale = _log_uniform(rng, 50, 220)
    height = _mountains(rng, size, scale)
    lower = _spectrum(rng, "soil", "forest", "dry_grass", "brown_rock", "gravel")
    stack = _blend(
        lower, _spectrum(rng, "rock", "brown_rock", "dark_rock", "gravel"), proc.smoothstep(height, 0.2, 0.6)
    )
    stack *= _grain(rng, size, rng.uniform(0.04, 0.14), outer=16, exponent=1.0)
    if rng.random() < 0.3:
        line = proc.quantile(height, rng.uniform(0.3, 0.95))
        cover = proc.smoothstep(
            height + 0.06 * proc.power_noise(rng, size, 1.0, outer=20), line, line + rng.uniform(0.03, 0.15)
        )
        stack = _blend(stack, _spectrum(rng, "snow", "old_snow"), cover)
    light = proc.hillshade(height, sun.azimuth, sun.elevation, _log_uniform(rng, 0.2, 0.9) * scale / 6)
    return np.asarray(stack * (0.2 + 0.8 * np.minimum(light, 2.2)), dtype=np.float32)


def _waters(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    first = _spectrum(rng, "deep_water", "water", "turbid_water", "green_water")
    currents = proc.power_noise(rng, size, 2.6, outer=300, anisotropy=rng.uniform(1.5, 5), angle=rng.uniform(0, np.pi))
    other = _blend(first, _spectrum(rng, "deep_water", "water", "turbid_water", "green_water"), rng.uniform(0, 0.5))
    stack = _blend(first, other, proc.smoothstep(currents, -2.0, 2.0))
    if rng.random() < 0.15:  # sun glint: grey in every band, brightening evenly towards one side
        u, _ = proc.coordinates(size, rng.uniform(0, np.pi))
        glint = rng.uniform(0.02, 0.15) * (0.5 + 0.5 * np.tanh(u / 200))
        stack = stack + glint.astype(np.float32) * _grain(rng, size, 0.06)
    waves = proc.power_noise(rng, size, 0.8, outer=12, anisotropy=2.5, angle=rng.uniform(0, np.pi))
    return np.maximum(stack * (1 + np.float32(rng.uniform(0.0, 0.06)) * waves), 0.001).astype(np.float32)


def _town(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    u, v = proc.coordinates(size, rng.uniform(0, np.pi))
    block = _log_uniform(rng, 3, 10)
    number, border = proc.parcels(rng, u, v, block, block * rng.uniform(1, 2.5))
    names = rng.choice(
        ("concrete", "asphalt", "red_roof", "blue_roof", "bright_roof", "grass", "soil", "concrete"), 7
    ).tolist()
    table = np.stack([_spectrum(rng, name)[:, 0, 0] for name in [*names, "concrete"]], 1)
    kinds = rng.integers(0, table.shape[1], int(number.max()) + 1)
    tone = rng.lognormal(0, 0.3, len(kinds)).astype(np.float32)
    stack = np.take(table, kinds[number], axis=1) * tone[number]
    stack = _blend(_spectrum(rng, "asphalt", "concrete"), stack, proc.smoothstep(border, 0.3, 1.2))
    _, street = proc.parcels(rng, u, v, block * rng.uniform(4, 8), block * rng.uniform(5, 12))
    stack = _blend(_spectrum(rng, "asphalt", "concrete", "forest"), stack, proc.smoothstep(street, 0.5, 1.8))
    return np.asarray(stack * _grain(rng, size, 0.06), dtype=np.float32)


def _snows(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    scale = _log_uniform(rng, 50, 200)
    height = _mountains(rng, size, scale)
    mix = proc.smoothstep(proc.power_noise(rng, size, 1.7, outer=120), -1.5, 1.5)
    stack = _blend(_spectrum(rng, "snow"), _spectrum(rng, "old_snow", "ice", "snow"), mix)
    light = proc.hillshade(height, sun.azimuth, sun.elevation, _log_uniform(rng, 0.1, 1.2) * scale / 6)
    stack *= 0.35 + 0.65 * np.minimum(light, 1.6)
    steep = proc.smoothstep(
        np.abs(light - 1) + 0.2 * proc.power_noise(rng, size, 1.0, outer=10), rng.uniform(0.5, 0.9), 1.2
    )
    return _blend(stack, _spectrum(rng, "dark_rock", "rock"), steep)


def _pans(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    """Salt or clay flats: flooded up to a sharp shore, crusted in polygons."""
    shore = proc.smoothstep(proc.power_noise(rng, size, 2.6, outer=_log_uniform(rng, 60, 200)), 0.6, 0.66)
    stack = _blend(_spectrum(rng, "salt", "pale_sand"), _spectrum(rng, "sand", "soil", "turbid_water"), shore)
    u, v = proc.coordinates(size)
    _, first, second = proc.cells(rng, u, v, _log_uniform(rng, 6, 24))
    stack = stack * (1 - np.float32(rng.uniform(0.05, 0.3)) * (1 - proc.smoothstep(second - first, 0.02, 0.25)))
    return np.asarray(stack * _grain(rng, size, rng.uniform(0.02, 0.08), outer=30, exponent=1.2), dtype=np.float32)


def _marshes(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    stack = _blend(_woods(rng, size, sun), _spectrum(rng, "marsh", "grass", "dry_grass"), rng.uniform(0.2, 0.9))
    pond = proc.power_noise(rng, size, 2.5, outer=_log_uniform(rng, 20, 80))
    return _blend(stack, _spectrum(rng, "water", "turbid_water", "green_water"), proc.smoothstep(pond, 0.9, 1.1))


# cover: (function, how often it is the base of a scene, how often it is laid into one)
COVERS: Mapping[str, tuple[Cover, float, float]] = {
    "woods": (_woods, 0.20, 0.18),
    "fields": (_fields, 0.18, 0.17),
    "soils": (_soils, 0.12, 0.12),
    "desert": (_desert, 0.13, 0.08),
    "ranges": (_ranges, 0.13, 0.06),
    "waters": (_waters, 0.07, 0.07),
    "town": (_town, 0.04, 0.05),
    "snows": (_snows, 0.01, 0.03),
    "pans": (_pans, 0.02, 0.03),
    "marshes": (_marshes, 0.02, 0.02),
}


def _lay(rng: np.random.Generator, stack: Stack, name: str, sun: Sun) -> Stack:
    """Lay a cover into part of a scene; water gets a beach now and then."""
    size = (stack.shape[1], stack.shape[2])
    shape = proc.power_noise(rng, size, rng.uniform(2.2, 3.0), outer=_log_uniform(rng, 80, 300))
    level = proc.quantile(shape, 1 - rng.uniform(0.08, 0.5))
    soft = 0.02 if name == "waters" else _log_uniform(rng, 0.02, 0.12)  # land has sharper borders than cloud
    if name == "waters" and rng.random() < 0.5:
        beach = proc.smoothstep(shape, level - 0.12, level - 0.04)
        stack = _blend(stack, _spectrum(rng, "sand", "pale_sand", "soil"), beach)
    return _blend(stack, COVERS[name][0](rng, size, sun), proc.smoothstep(shape, level, level + soft))


def _decorate(rng: np.random.Generator, stack: Stack, base: str) -> Stack:
    """Roads, rivers, villages and burnt ground on top of the covers."""
    size = (stack.shape[1], stack.shape[2])
    if rng.random() < 0.06:
        shape = proc.power_noise(rng, size, 1.8, outer=60)
        burnt = proc.smoothstep(shape, proc.quantile(shape, 0.9), 3.0) > 0.01
        stack = _blend(
            stack, _spectrum(rng, "burnt", "dark_rock"), proc.blur(burnt.astype(np.float32), 0.7) * rng.uniform(0.4, 1)
        )
    if base in ("waters", "snows"):
        return stack
    if rng.random() < 0.3:
        river = proc.draw_lines(size, [proc.walk(rng, size, step=5, turn=0.3)], [_log_uniform(rng, 1.5, 9)])
        stack = _blend(stack, _spectrum(rng, "water", "turbid_water", "green_water", "sand"), river)
    if rng.random() < 0.55:
        lines = [
            proc.walk(rng, size, step=_log_uniform(rng, 6, 60), turn=rng.uniform(0.02, 0.35))
            for _ in range(rng.integers(1, 5))
        ]
        roads = proc.draw_lines(size, lines, rng.uniform(0.5, 2.2, len(lines)).tolist())
        stack = _blend(
            stack, _spectrum(rng, "concrete", "stubble", "asphalt", "pale_sand"), roads * rng.uniform(0.4, 0.95)
        )
        if rng.random() < 0.5:  # houses along the first road
            centres = np.repeat(lines[0][rng.integers(0, len(lines[0]), 40)], 3, 0) + rng.normal(0, 5, (120, 2))
            half = rng.uniform(0.5, 2.2, (120, 1, 2))
            corners = centres[:, None] + half * np.asarray([[-1, -1], [1, -1], [1, 1], [-1, 1]])
            roofs = proc.draw_polygons(size, list(corners.astype(np.float32)), rng.uniform(0.3, 1, 120).tolist())
            stack = _blend(stack, _spectrum(rng, "bright_roof", "concrete", "red_roof", "blue_roof"), roofs)
    return stack


def render_surface(rng: np.random.Generator, size: Size, sun: Sun) -> Stack:
    """Cloud-free surface reflectance (6, H, W) of a random mixture of covers, relief shading included."""
    names = list(COVERS)
    base_weights = np.asarray([COVERS[name][1] for name in names])
    laid_weights = np.asarray([COVERS[name][2] for name in names])
    base = names[rng.choice(len(names), p=base_weights / base_weights.sum())]
    stack = np.broadcast_to(COVERS[base][0](rng, size, sun), (len(BANDS), *size)).astype(np.float32)
    for _ in range(int(rng.choice(3, p=(0.55, 0.35, 0.1)))):
        stack = _lay(rng, stack, names[rng.choice(len(names), p=laid_weights / laid_weights.sum())], sun)
    stack = _decorate(rng, stack, base)
    return np.clip(stack, 0.002, 1.1, out=stack)
