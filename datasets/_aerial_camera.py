"""From reflectances to an aerial photograph: haze, exposure, white balance, sharpness, noise, JPEG."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._procedural import Field

Range = tuple[float, float]


@dataclass(frozen=True)
class Camera:
    """Ranges that a photograph's camera and processing are drawn from.

    Args:
        haze: reflectance of an even veil, strongest in blue.
        bright: grey level that the 90th percentile of the ground is exposed to.
        gamma: of the tone curve; 2.2 undoes nothing.
        warmth: logarithm of the ratio of the red to the blue gain.
        saturation: 1 keeps colours.
        blur: standard deviation in pixels.
        sharpen: strength of an unsharp mask.
        noise: standard deviation, grey levels of 0..1.
        quality: of the JPEG.
    """

    haze: Range = (0.0, 0.03)
    bright: Range = (0.5, 0.85)
    gamma: Range = (1.6, 2.4)
    warmth: Range = (-0.12, 0.12)
    saturation: Range = (0.8, 1.25)
    blur: Range = (0.3, 0.9)
    sharpen: Range = (0.0, 0.8)
    noise: Range = (0.002, 0.015)
    quality: Range = (70, 96)


TRAIN_CAMERA = Camera()
"""Of the training and validation scenes."""

TEST_CAMERA = Camera(
    haze=(0.01, 0.05),
    bright=(0.6, 0.8),
    gamma=(1.5, 2.0),
    warmth=(0.10, 0.22),
    saturation=(0.7, 0.9),
    blur=(0.6, 1.0),
    sharpen=(0.4, 1.2),
    noise=(0.006, 0.018),
    quality=(60, 85),
)
"""Of the test scenes only: warm, pale, over-sharpened."""

_VEIL = np.array([0.7, 0.85, 1.0], dtype=np.float32)[:, None, None]
_GREY = np.array([0.30, 0.59, 0.11], dtype=np.float32)


def photograph(rng: np.random.Generator, camera: Camera, light: Field) -> NDArray[np.uint8]:
    """Light from the ground (3, H, W) -> the photograph, uint8 RGB (H, W, 3)."""
    haze, bright, gamma, warmth, saturation, sigma, sharpen, noise = (
        float(rng.uniform(*span))
        for span in (
            camera.haze, camera.bright, camera.gamma, camera.warmth,
            camera.saturation, camera.blur, camera.sharpen, camera.noise,
        )
    )  # fmt: skip
    seen = light + np.float32(haze) * _VEIL
    gains = np.exp(np.array([warmth / 2, 0, -warmth / 2], dtype=np.float32))
    seen = seen * gains[:, None, None]
    exposure = bright**gamma / max(proc.quantile(seen.mean(0), 0.9), 1e-3)
    graded = np.clip(seen * np.float32(exposure), 0, None) ** np.float32(1 / gamma)
    grey = np.tensordot(_GREY, graded, 1)
    graded = grey + np.float32(saturation) * (graded - grey)
    for plane in graded:
        plane[:] = proc.blur(plane, sigma)
        plane += np.float32(sharpen) * (plane - proc.blur(plane, 1.2))
    graded += np.float32(noise) * rng.standard_normal(graded.shape, dtype=np.float32)
    pixels = (np.clip(graded, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    return _jpeg(pixels, int(rng.uniform(*camera.quality)))


def _jpeg(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    from PIL import Image

    packed = BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG", quality=quality)
    return np.asarray(Image.open(packed), dtype=np.uint8)
