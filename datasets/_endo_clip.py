"""A clip of generated endoscopy: pictures, depths, poses and intrinsics of frames that follow one another."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._endo_lumen import make_lumen
from vfmadapt.datasets._endo_path import make_path
from vfmadapt.datasets._endo_view import Lens, Look, draw_look, view
from vfmadapt.datasets._procedural import Field

VERSION = 1
"""Of what a seed gives; another one whenever the pictures change."""

_EXPOSED = 0.8  # to which the bright part of a frame is brought
_BRIGHT = 90  # percentile that counts as the bright part: highlights do not
_INERTIA = 0.7  # share of the exposure that stays from frame to frame: cameras follow the light slowly


@dataclass(frozen=True)
class EndoClip:
    """Frames of one scene.

    `image` uint8 (T, H, W, 3); `depth` float32 (T, H, W), millimetres along the optical axis; `poses` (T, 4, 4) camera
    to world; `intrinsics` (3, 3) in pixels.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]
    poses: NDArray[np.float64]
    intrinsics: NDArray[np.float64]


def render_clip(seed: int, *, frames: int, size: tuple[int, int], fov: float) -> EndoClip:
    """Render a clip; equal arguments give equal clips."""
    rng = np.random.default_rng(seed)
    lumen = make_lumen(rng)
    path, look, lens = make_path(rng, lumen), draw_look(rng), Lens(size, fov)
    times = path.frames(rng, frames + 1)
    poses = [path.at(u) for u in times[:frames]]
    images, depths, gain = [], [], 0.0
    for pose, now, following in zip(poses, times[:-1], times[1:], strict=True):
        light, depth = view(lumen, pose, path.at(now + look.shutter * (following - now)), lens, look)
        wanted = _EXPOSED / float(np.percentile(light.max(-1), _BRIGHT))
        gain = _INERTIA * gain + (1 - _INERTIA) * wanted if gain else wanted
        images.append(_developed(rng, light * np.float32(gain), look))
        depths.append(depth)
    return EndoClip(np.stack(images), np.stack(depths), np.stack(poses), lens.matrix)


def _developed(rng: np.random.Generator, light: NDArray[np.float32], look: Look) -> NDArray[np.uint8]:
    """Exposed light -> 8-bit sRGB: highlights roll off and clip, shadows keep a sensor's noise."""
    noisy = light + np.sqrt(np.maximum(light, 0) + 0.02) * _grain(rng, light.shape) * np.float32(look.noise * 2)
    knee = np.float32(0.7)
    rolled = np.where(noisy > knee, knee + (1 - knee) * np.tanh((noisy - knee) / (1 - knee) * 0.8), noisy)
    shown = np.clip(rolled, 0, 1) ** np.float32(1 / 2.2)
    return np.asarray(np.rint(shown * 255), dtype=np.uint8)


def _grain(rng: np.random.Generator, shape: tuple[int, ...]) -> Field:
    return rng.standard_normal(shape, dtype=np.float32)
