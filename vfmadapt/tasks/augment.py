"""Augmentation of training samples: the only module that knows albumentations.

Every draw comes from the generator that the caller passes, so a sample's augmentation is a function of (seed, epoch,
sample id).
"""

import os
import random
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.contracts import IGNORE_INDEX, Sample
from vfmadapt.errors import UserError

Floats = NDArray[np.float32]
COUNTED_SHARE = 0.25  # a window with fewer labelled pixels than this is drawn anew ...
TRIES = 4  # ... this many times at most: tiles at a scene's border are mostly nodata


class Augment:
    """Random window, scale, orientation and radiometry for samples of any number of bands.

    Geometry acts on image, mask and validity alike: masks by nearest neighbour, pixels from outside the image become
    image 0, mask `IGNORE_INDEX`, not valid. The image is resampled together with its validity, so nodata never
    bleeds in.

    Radiometry acts on the image in sensor units and makes a model hold on other sensors and products than those of
    the training set: `radiometric` scales random gain (0.6 to 1.6), gamma, haze, per-band casts, noise and blur;
    `display` is the share of samples turned into what 8-bit pictures hold: raised black level, strong gamma, colour
    cast, saturation at 1 and 256 grey levels. For data that are not reflectances (an index of -1..1, say) set both
    to 0.

    Args:
        crop: side of the window given back, in pixels.
        scale: range of the magnification, drawn log-uniformly; (1, 1) for none.
        flips: the eight orientations of the square; off where up is up, or "mirror": left and right alone.
        affine: share of samples that are also rotated by up to 15 degrees and sheared by up to 5.
        radiometric: 0 for none, 1 for the ranges above.
        display: share of samples turned into 8-bit pictures, 0..1.
    """

    unknown: float = IGNORE_INDEX
    """What stands for a pixel of which nothing is known."""
    stored: type[np.generic] = np.uint8
    """The type in which label maps are resampled."""

    def __init__(
        self,
        *,
        crop: int,
        scale: tuple[float, float] = (0.5, 2.0),
        flips: bool | Literal["mirror"] = True,
        affine: float = 0.2,
        radiometric: float = 1.0,
        display: float = 0.5,
    ) -> None:
        if (
            flips not in (True, False, "mirror")
            or crop < 1
            or not 0 < scale[0] <= scale[1]
            or not (0 <= affine <= 1 and 0 <= display <= 1 and radiometric >= 0)
        ):
            raise UserError(
                f"augment: crop={crop} scale={[*scale]} flips={flips} affine={affine} radiometric={radiometric} "
                f"display={display}; crop >= 1, 0 < scale low <= high, affine and display in 0..1, radiometric >= 0, "
                "flips true, false or mirror"
            )
        self.crop, self.scale = crop, (float(scale[0]), float(scale[1]))
        self.radiometric, self.display = radiometric, display
        blur = 0.2 * min(radiometric, 1.0)
        self._geometry = _geometry(crop, flips=flips, affine=affine, blur=blur, unknown=self.unknown)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Sample of any size -> augmented sample of `crop` x `crop` pixels; the given one is left as it was."""
        image, mask, valid = self._changed(sample, sample["mask"].numpy(), rng)
        out = cast(Sample, {k: v for k, v in sample.items() if k not in ("crs", "transform")})
        out["image"] = torch.from_numpy(image)
        out["mask"] = torch.from_numpy(mask.astype(np.int64))
        out["valid"] = torch.from_numpy(valid)
        return out

    def _changed(
        self, sample: Any, mask: NDArray[Any], rng: np.random.Generator
    ) -> tuple[Floats, NDArray[Any], NDArray[np.bool_]]:
        """Image (C, H, W), what is known of its pixels (H, W, ...), validity: a window of them, changed alike."""
        image, valid = sample["image"].numpy().transpose(1, 2, 0), sample["valid"].numpy()
        image, valid, mask = self._window(image, valid, mask, rng)
        image, valid, mask = self._transform(image, valid, mask, rng)
        shown = rng.random() < self.display
        if self.radiometric:
            image = jitter(image, valid, rng, self.radiometric * (0.5 if shown else 1.0))
        if shown:
            image = to_display(image, valid, rng)
        image[:, ~valid] = 0
        mask[~valid] = self.unknown
        return image, mask, valid

    def counted(self, mask: NDArray[Any]) -> NDArray[np.bool_]:
        """Where something is known."""
        return np.asarray(mask != IGNORE_INDEX)

    def _window(
        self, image: Floats, valid: NDArray[np.bool_], mask: NDArray[Any], rng: np.random.Generator
    ) -> tuple[Floats, NDArray[np.bool_], NDArray[Any]]:
        """A random square (H, W, C), whose side sets the scale; what a small image lacks is filled up as not valid."""
        height, width = mask.shape[:2]
        side = round(self.crop / np.exp(rng.uniform(*np.log(self.scale))))
        side = max(1, min(side, max(min(height, width), self.crop)))
        for _ in range(TRIES):
            top, left = (int(rng.integers(max(n - side, 0) + 1)) for n in (height, width))
            at = (slice(top, top + side), slice(left, left + side))
            if self.counted(mask[at]).mean() >= COUNTED_SHARE:
                break
        grow = [(0, side - n) for n in mask[at].shape[:2]]
        if not any(after for _, after in grow):
            return image[at], valid[at], mask[at]
        return (
            np.pad(image[at], [*grow, (0, 0)]),
            np.pad(valid[at], grow),
            np.pad(mask[at], [*grow, (0, 0)][: mask.ndim], constant_values=self.unknown),
        )

    def _transform(
        self, image: Floats, valid: NDArray[np.bool_], mask: NDArray[Any], rng: np.random.Generator
    ) -> tuple[Floats, NDArray[np.bool_], NDArray[Any]]:
        """The window, resized and turned; the image comes back as (C, H, W)."""
        weight = valid[..., None].astype(np.float32)
        # one generator for all: Compose.set_random_seed would give each transform the same seed and so link their draws
        self._geometry.set_random_state(rng, random.Random(int(rng.integers(2**62))))
        out = self._geometry(image=np.concatenate([image * weight, weight], -1), mask=mask.astype(self.stored))
        bands = np.ascontiguousarray(out["image"].transpose(2, 0, 1))
        image, weight = bands[:-1], bands[-1]
        valid = weight >= 0.5
        if not (weight == 1).all():
            image /= np.maximum(weight, 0.5)
        return image, valid, np.array(out["mask"])


def _geometry(crop: int, *, flips: bool | str, affine: float, blur: float, unknown: float) -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or its import asks the network for a newer version
    import albumentations as albu

    steps: list[Any] = [albu.Resize(crop, crop, area_for_downscale="image")]
    if flips:
        steps.append(albu.HorizontalFlip(p=0.5) if flips == "mirror" else albu.D4(p=1))
    if affine:
        steps.append(albu.Affine(rotate=(-15, 15), shear=(-5, 5), fill=0, fill_mask=unknown, p=affine))
    if blur:
        steps.append(albu.GaussianBlur(blur_limit=0, sigma_limit=(0.4, 1.2), p=blur))
    return albu.Compose(steps)


def jitter(image: Floats, valid: NDArray[np.bool_], rng: np.random.Generator, strength: float = 1.0) -> Floats:
    """Change an image (C, H, W) of reflectances as another sensor, atmosphere or product would.

    y = gain x cast_c x |x|^gamma (with the sign of x) + haze + offset_c + noise; all ranges shrink to nothing with
    `strength`. The gain never lifts the brightest of the `valid` pixels (H, W) above 1.1, which no product holds.
    """
    per_band = (len(image), 1, 1)
    top = max(_level(image, valid, 98), 1e-6)
    gain = min(np.exp(strength * rng.uniform(np.log(0.6), np.log(1.6))), max(1.1 / top, 1.0))
    gamma = np.exp(strength * rng.uniform(np.log(0.75), np.log(1.3)))
    haze = strength * rng.uniform(0, 0.12) * (rng.random() < 0.5)
    cast = np.exp(strength * rng.normal(0, 0.06, per_band))
    offset = haze + strength * rng.normal(0, 0.01, per_band)
    noise = strength * rng.uniform(0, 0.015)
    out = _power(image, gamma)
    out *= (gain * cast).astype(np.float32)
    out += offset.astype(np.float32)
    if rng.random() < 0.5:
        out += np.float32(noise) * rng.standard_normal(image.shape, dtype=np.float32)
    return out


def to_display(image: Floats, valid: NDArray[np.bool_], rng: np.random.Generator) -> Floats:
    """Reflectances (C, H, W) -> what an 8-bit picture of them holds, k/255 in 0..1.

    y = black_c + (white_c - black_c) x (x / level)^gamma. Pictures on the web show dark land at grey levels of 0.1 to
    0.45, lift it by a gamma, tint it, some strongly, and let the brightest clouds saturate. Level and gamma follow the
    98th and 50th percentile of the `valid` pixels (H, W), so that land never turns white.
    """
    per_band = (len(image), 1, 1)
    level = max(rng.uniform(0.5, 1.1), _level(image, valid, 98) * rng.uniform(0.85, 1.3))
    median = float(np.clip(_level(image, valid, 50) / level, 1e-3, 0.99))
    gamma = float(np.clip(np.log(rng.uniform(0.1, 0.5)) / np.log(median), 0.4, 1.2))
    tint = 0.12 if rng.random() < 0.2 else 0.03
    black = rng.uniform(0, 0.45) * (1 - median**gamma) + rng.normal(0, tint, per_band)
    white = np.clip(rng.normal(1, 0.05, per_band), 0.8, 1.15)
    black = np.clip(black, 0, 0.6)
    out = _power(np.maximum(image / np.float32(level), 0), gamma)
    out *= (white - black).astype(np.float32)
    out += black.astype(np.float32)
    np.clip(out, 0, 1, out=out)
    out *= 255
    np.rint(out, out=out)
    out /= 255
    return out


def _level(image: Floats, valid: NDArray[np.bool_], percentile: float) -> float:
    """A percentile over the valid pixels of all bands, from every fourth row and column."""
    values = image[:, ::4, ::4][:, valid[::4, ::4]]
    return float(np.percentile(values, percentile)) if values.size else 1.0


def _power(image: Floats, exponent: float) -> Floats:
    powered: Floats = np.abs(image) ** np.float32(exponent)
    return np.copysign(powered, image, out=powered)
