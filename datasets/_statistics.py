"""Mean and standard deviation of the bands of a data set."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError

FILES = 256
"""Images that they are taken from, spread evenly over the training split."""
_PIXELS = 65_536  # of each image, on a regular grid


def band_statistics(
    images: Iterable[tuple[NDArray[np.float32], NDArray[np.bool_]]], source: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per band over the valid pixels of images (C, H, W) with validity (H, W).

    Raises:
        UserError: no pixel is valid; `source` names the images.
    """
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for image, valid in images:
        step = max(1, round((valid.size / _PIXELS) ** 0.5))
        pixels = image[:, ::step, ::step][:, valid[::step, ::step]].astype(np.float64)
        count += pixels.shape[1]
        total = total + pixels.sum(axis=1)
        squares = squares + (pixels**2).sum(axis=1)
    if not count:
        raise UserError(f"{source} hold no valid pixel; look at their nodata value")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    std[std == 0] = 1.0  # a constant band tells nothing, but must not divide by zero
    return tuple(mean.tolist()), tuple(std.tolist())
