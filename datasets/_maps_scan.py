"""From plates to a scan: printing faults, old paper, the scanner, JPEG."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._maps_plates import Plates
from vfmadapt.datasets._procedural import Field, blur, coordinates, power_noise, smoothstep

ORDER = ("water", "green", "red", "brown", "blue", "black")
"""Inks in the order of printing; each lets the ones below shine through, as ink does."""
_YELLOW = np.array([0.6, 1.0, 1.6], dtype=np.float32)  # how much age takes of red, green and blue


def scan(plates: Plates) -> NDArray[np.uint8]:
    """Print the plates on paper and scan the sheet: uint8 RGB (H, W, 3)."""
    rng = plates.rng
    wear = plates.wear
    rgb = _paper(plates, wear)
    fade = rng.uniform(0, 0.35) * wear
    for ink in ORDER:
        cover = _printed(plates, ink)
        colour = np.asarray(plates.colours[ink], dtype=np.float32) * np.float32(1 - fade) + np.float32(fade)
        rgb *= 1 - cover[..., None] * (1 - colour)
    rgb = _folds(rng, rgb, wear)
    return _jpeg(rng, _scanned(rng, rgb, wear))


def _paper(plates: Plates, wear: float) -> Field:
    """Paper with fibres, a yellowed cast that varies, and stains."""
    rng, size = plates.rng, plates.size
    base = np.asarray(plates.between(plates.style.paper), dtype=np.float32)
    cast = power_noise(rng, size, 2.5, outer=250) * np.float32(0.03 * wear)
    fibre = power_noise(rng, size, 0.8, outer=6) * np.float32(rng.uniform(0.004, 0.02))
    grain = (1 + fibre)[..., None] + cast[..., None] * _YELLOW
    if rng.random() < 0.3 * wear:
        stain = smoothstep(power_noise(rng, size, 2.2, outer=120), 1.0, 1.6)
        rim = np.clip(stain * (1 - stain) * 4, 0, 1) * np.float32(0.5) + stain
        grain = grain - rim[..., None] * _YELLOW * np.float32(rng.uniform(0.03, 0.1))
    return np.asarray(base * grain, dtype=np.float32)


def _printed(plates: Plates, ink: str) -> Field:
    """A plate's ink on the paper: out of register, bled, and patchy where the plate was worn."""
    rng, cover, press = plates.rng, plates.covers[ink], plates.presses[ink]
    if not cover.any():
        return cover
    bled = press.spread(cover)
    edge = rng.uniform(0.12, 0.3)
    worn = power_noise(rng, plates.size, 1.0, outer=20) * np.float32(0.12 * plates.wear)
    threshold = np.float32(press.least) + worn
    sharp = np.clip((bled - threshold) / np.float32(2 * edge) + np.float32(0.5), 0, 1)
    return np.asarray(sharp * np.float32(rng.uniform(0.85, 1.0)), dtype=np.float32)


def _folds(rng: np.random.Generator, rgb: Field, wear: float) -> Field:
    """Creases: a bright or dark line, and shade on one side of it."""
    size = (rgb.shape[0], rgb.shape[1])
    for _ in range(int(rng.integers(1, 3)) if rng.random() < 0.35 * wear else 0):
        angle = float(rng.choice([0, np.pi / 2]) + rng.normal(0, 0.02))
        across = coordinates(size, angle)[1] + np.float32(rng.uniform(-0.4, 0.4) * min(size))
        crease = np.exp(-((across / np.float32(rng.uniform(0.7, 1.8))) ** 2))
        shade = np.where(across > 0, np.exp(-across / 14), 0) * np.float32(rng.uniform(0, 0.12))
        rgb = rgb * (1 - shade)[..., None] + (crease * np.float32(rng.uniform(-0.25, 0.35)))[..., None]
    return np.asarray(rgb, dtype=np.float32)


def _scanned(rng: np.random.Generator, rgb: Field, wear: float) -> Field:
    """Blur of the optics, sharpening by the scanner's software, exposure, noise."""
    sigma, sharpen = rng.uniform(0.2, 0.8), rng.choice([0.0, rng.uniform(0, 2)])
    soft = np.stack([blur(np.ascontiguousarray(rgb[..., c]), float(sigma)) for c in range(3)], axis=2)
    wide = np.stack([blur(np.ascontiguousarray(soft[..., c]), 1.2) for c in range(3)], axis=2)
    sharp = soft + np.float32(sharpen) * (soft - wide)
    black = np.float32(rng.uniform(0, 0.12))  # what is darker becomes black
    exposed = np.clip((sharp - black) / (1 - black), 0, 1) ** np.float32(rng.uniform(0.85, 1.15))
    exposed *= np.float32(rng.uniform(0.88, 1.03))
    noise = rng.standard_normal(rgb.shape, dtype=np.float32) * np.float32(rng.uniform(0.004, 0.02 + 0.015 * wear))
    return np.asarray(np.clip(exposed + noise, 0, 1), dtype=np.float32)


def _jpeg(rng: np.random.Generator, rgb: Field) -> NDArray[np.uint8]:
    from PIL import Image

    picture = Image.fromarray((rgb * 255 + 0.5).astype(np.uint8))
    if rng.random() < 0.7:
        packed = BytesIO()
        picture.save(packed, "JPEG", quality=int(rng.integers(45, 95)))
        picture = Image.open(packed)
    return np.asarray(picture.convert("RGB"), dtype=np.uint8)
