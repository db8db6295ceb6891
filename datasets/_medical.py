"""Procedural medical pictures for pretraining: CT-like and MR-like slices, ultrasound sectors, endoscopic views.

Not anatomy: smooth organs, bright rims, speckle, folds and highlights of the kinds that such pictures have.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._procedural import Field, Size, blur, power_noise, ridged, smoothstep, warp

Picture = NDArray[np.uint8]


def _picture(image: NDArray[np.floating]) -> Picture:
    """Values 0..1, (H, W) or (H, W, 3) -> uint8 RGB (H, W, 3)."""
    rgb = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def _blob(
    rng: np.random.Generator, size: Size, centre: tuple[float, float], radii: tuple[float, float], rough: float
) -> Field:
    """Signed distance-like field of a warped ellipse: 1 at the centre, 0 at the border, in units of the radius."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    dx, dy = x - centre[0], y - centre[1]
    a, b = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    wobble = power_noise(rng, size, 2.2, outer=rng.uniform(30, 90)) * np.float32(rough)
    return np.asarray(1 - np.sqrt((a / radii[0]) ** 2 + (b / radii[1]) ** 2) + wobble, dtype=np.float32)


def _body(rng: np.random.Generator, size: Size) -> tuple[Field, NDArray[np.float32]]:
    """A trunk or head across most of the picture: its field and centre."""
    height, width = size
    centre = (width * rng.uniform(0.4, 0.6), height * rng.uniform(0.4, 0.6))
    radius = min(size) * rng.uniform(0.36, 0.62)
    field = _blob(rng, size, centre, (radius, radius * rng.uniform(0.65, 1.0)), 0.02)
    return field, np.asarray(centre, dtype=np.float32)


def _slice(rng: np.random.Generator, size: Size, levels: tuple[float, float], rim: float) -> tuple[Field, Field]:
    """Body with organs of grey values in `levels` and a rim of brightness `rim` -> (image, body mask)."""
    field, centre = _body(rng, size)
    body = smoothstep(field, 0.0, 0.04)
    image = body * np.float32(rng.uniform(*levels))
    layer = float(rng.uniform(0.03, 0.14))
    image = np.where(field > layer, rng.uniform(*levels), image).astype(np.float32) * body
    spread = min(size) * 0.36
    for _ in range(rng.integers(6, 18)):
        at = centre + rng.normal(0, 0.5, 2) * spread
        radius = spread * rng.uniform(0.08, 0.5)
        organ = _blob(
            rng, size, (float(at[0]), float(at[1])), (radius, radius * rng.uniform(0.4, 1.0)), rng.uniform(0.02, 0.2)
        )
        share = smoothstep(organ, 0.0, rng.uniform(0.03, 0.3)) * smoothstep(field, layer, layer + 0.05)
        value = rng.uniform(*levels) + power_noise(rng, size, rng.uniform(1, 2)) * np.float32(rng.uniform(0, 0.05))
        image = image + share * (value - image)
        if rng.random() < 0.35:  # a wall around the organ
            image += ridged(organ, rng.uniform(8, 25)) * np.float32(rim * rng.uniform(0.2, 0.7)) * (field > layer)
    return np.asarray(image, dtype=np.float32), np.asarray(body, dtype=np.float32)


def computed_tomography(rng: np.random.Generator, size: Size) -> Picture:
    """Axial slice: dark air, grey organs with little contrast, white bone, streaks and noise."""
    image, body = _slice(rng, size, (0.25, 0.6), 0.3)
    height, width = size
    for _ in range(rng.integers(2, 12)):
        at = (width * rng.uniform(0.2, 0.8), height * rng.uniform(0.2, 0.8))
        bone = _blob(rng, size, at, (rng.uniform(4, 22), rng.uniform(3, 12)), 0.1)
        shell = ridged(bone - np.float32(0.2), rng.uniform(2, 5))
        image = np.maximum(image, (smoothstep(bone, 0, 0.15) * np.float32(0.65) + shell * np.float32(0.3)) * body)
    if rng.random() < 0.5:  # lungs
        for side in (-1, 1):
            lung = _blob(rng, size, (width / 2 + side * width * 0.2, height * 0.5), (width * 0.16, height * 0.24), 0.08)
            texture = np.float32(0.06) + ridged(power_noise(rng, size, 1.6, outer=40), 4) * np.float32(0.3)
            image = image + smoothstep(lung, 0, 0.05) * body * (texture - image)
    streaks = power_noise(rng, size, 1.0, anisotropy=30, angle=float(rng.uniform(0, np.pi))) * np.float32(
        rng.uniform(0, 0.03)
    )
    grain = power_noise(rng, size, 0.6, outer=6) * np.float32(rng.uniform(0.01, 0.06))
    return _picture(blur(image, float(rng.uniform(0, 1))) + (streaks + grain) * (0.3 + body))


def magnetic_resonance(rng: np.random.Generator, size: Size) -> Picture:
    """Slice with strong soft-tissue contrast, folded ribbons (cortex), a slow bias field and Rician noise."""
    image, body = _slice(rng, size, (0.1, 0.95), 0.6)
    if rng.random() < 0.5:
        folds = power_noise(rng, size, 2.2, outer=rng.uniform(14, 40))
        inner = blur(body, 6) > 0.98
        image = np.where(
            inner, image * np.float32(0.5) + smoothstep(ridged(folds, 1.5), 0.2, 0.7) * np.float32(0.45), image
        )
    image = image * np.exp(power_noise(rng, size, 3, outer=400) * np.float32(0.25))
    sigma = np.float32(rng.uniform(0.01, 0.08))
    noise = rng.standard_normal((2, *size), dtype=np.float32) * sigma
    return _picture(np.hypot(blur(image.astype(np.float32), float(rng.uniform(0, 1.2))) + noise[0], noise[1]))


def ultrasound(rng: np.random.Generator, size: Size) -> Picture:
    """Sector of speckle, longer across the beam with depth, with echo-free cysts and shadowed reflectors."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    apex = -height * rng.uniform(0.02, 0.4)
    depth = np.hypot(x - width / 2, y - apex)
    angle = np.arctan2(x - width / 2, y - apex)
    opening = rng.uniform(0.5, 0.95)
    echo = np.exp(power_noise(rng, size, 2, outer=90) * np.float32(0.5)) * np.float32(0.35)
    for _ in range(rng.integers(1, 7)):
        at = (width * rng.uniform(0.2, 0.8), height * rng.uniform(0.2, 0.9))
        cyst = _blob(rng, size, at, (rng.uniform(8, 50), rng.uniform(8, 35)), 0.08)
        echo = echo * (1 + smoothstep(cyst, 0, 0.15) * np.float32(rng.uniform(-0.95, 1.2)))
        echo = echo + ridged(cyst, rng.uniform(6, 14)) * np.float32(rng.uniform(0, 0.8))
    for _ in range(rng.integers(0, 4)):  # shadows behind reflectors run along the beam
        towards, thick, start = rng.uniform(-opening, opening), rng.uniform(0.02, 0.1), rng.uniform(0.2, 0.7) * height
        echo = echo * np.where(
            (np.abs(angle - towards) < thick) & (depth > start), np.float32(rng.uniform(0.15, 0.5)), np.float32(1)
        )
    scale = np.float32(rng.uniform(1.5, 3.5))
    fine = rng.standard_normal((2, *size), dtype=np.float32)
    blurred = [warp(blur(part, float(scale) / 2), 0.0, angle * 3) for part in fine]
    speckle = np.hypot(*blurred)
    speckle = speckle / max(float(speckle.mean()), 1e-6)
    image = np.log1p(echo * speckle * 6) / np.float32(2.4) * np.exp(-depth / (height * rng.uniform(0.8, 2.5)))
    sector = (np.abs(angle) < opening) & (depth > -apex + 4) & (depth < height * 1.02 - apex * 0.9)
    return _picture(image * sector * np.float32(rng.uniform(1.0, 1.6)))


def endoscopy(rng: np.random.Generator, size: Size) -> Picture:
    """Pink tube with ring folds, vessels, a dark lumen, polyps and specular spots, in a dark frame or not."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    cx, cy = width * rng.uniform(0.2, 0.8), height * rng.uniform(0.2, 0.8)
    bend = power_noise(rng, size, 2.5, outer=180)
    radius = np.hypot(x - cx, (y - cy) * rng.uniform(0.8, 1.25)) / min(size) + bend * np.float32(0.05)
    radius = np.maximum(radius, np.float32(0.01))
    folds = np.sin(np.log(radius + 0.1) * rng.uniform(9, 22) + bend * rng.uniform(0.3, 1.5))
    light = smoothstep(radius, 0.0, rng.uniform(0.25, 0.6)) * (0.75 + 0.2 * folds) + 0.03
    for _ in range(rng.integers(0, 4)):
        at = (width * rng.uniform(0.1, 0.9), height * rng.uniform(0.1, 0.9))
        size_of = rng.uniform(10, 45)
        polyp = np.clip(_blob(rng, size, at, (size_of, size_of * rng.uniform(0.6, 1)), 0.06), 0, 1)
        down, right = np.gradient(np.sqrt(polyp) * size_of)
        light = np.where(
            polyp > 0, np.clip(0.65 - 0.3 * right - 0.3 * down, 0.15, 1) * (0.6 + 0.4 * np.sqrt(polyp)), light
        )
    vessels = ridged(power_noise(rng, size, 1.8, outer=60), rng.uniform(5, 14)) * np.float32(rng.uniform(0, 0.3))
    tone = np.array([rng.uniform(0.8, 1.0), rng.uniform(0.4, 0.62), rng.uniform(0.3, 0.55)], dtype=np.float32)
    mucus = power_noise(rng, size, 1.6, outer=40) * np.float32(0.05)
    rgb = (light + mucus)[..., None] * tone
    rgb = rgb * (1 - vessels[..., None] * np.array([0.3, 0.9, 0.8], dtype=np.float32))
    spots = smoothstep(power_noise(rng, size, 1.5, outer=18) + np.float32(0.6) * folds, rng.uniform(2.2, 2.8), 3.0)
    rgb = rgb + (spots * smoothstep(light, 0.3, 0.6))[..., None]
    if rng.random() < 0.5:
        rim = np.hypot(x - width / 2, y - height / 2) / (min(size) * rng.uniform(0.5, 0.66))
        rgb = rgb * (1 - smoothstep(rim.astype(np.float32), 0.97, 1.0))[..., None]
    return _picture(rgb + rng.normal(0, 0.01, rgb.shape))


KINDS: tuple[Callable[[np.random.Generator, Size], Picture], ...] = (
    computed_tomography, magnetic_resonance, ultrasound, endoscopy,
)  # fmt: skip


def render_medical(seed: int, *, size: Size = (256, 256)) -> Picture:
    """One picture of a kind drawn by `seed`: uint8 RGB (H, W, 3); grey kinds repeat their channel."""
    rng = np.random.default_rng([seed, 1])  # 1: the stream of medical pictures
    return KINDS[rng.integers(len(KINDS))](rng, size)
