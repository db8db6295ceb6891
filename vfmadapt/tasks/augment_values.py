"""Augmentation of training samples whose pixels hold values or depth."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.contracts import DepthSample, ValueSample
from vfmadapt.tasks.augment import Augment


class ValueAugment(Augment):
    """As `Augment`, for samples of values: these move with the image, by nearest neighbour, and keep what they are.

    A depth is no longer true of a magnified image of one camera: for depth in units set `scale` to (1, 1).
    """

    unknown = float("nan")
    stored = np.float32

    def __call__(self, sample: ValueSample | DepthSample, rng: np.random.Generator) -> ValueSample:  # type: ignore[override]
        """Sample of any size -> augmented sample of `crop` x `crop` pixels; the given one is left as it was."""
        values = known_values(sample).numpy().transpose(1, 2, 0)
        image, values, valid = self._changed(sample, values, rng)
        values = values.reshape(*valid.shape, -1)  # the resampling drops a third axis of one
        return ValueSample(
            image=torch.from_numpy(image),
            values=torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)),
            valid=torch.from_numpy(valid),
            id=sample["id"],
            bands=sample["bands"],
        )

    def counted(self, mask: NDArray[Any]) -> NDArray[np.bool_]:
        """Where something is known."""
        return np.asarray(np.isfinite(mask))


def known_values(sample: Any) -> torch.Tensor:
    """The values (K, H, W) of a sample, a depth being one; NaN where unknown, infinite, or a depth not above 0."""
    if "values" in sample:
        values: torch.Tensor = sample["values"]
        known = torch.isfinite(values)
    else:
        values = sample["depth"][None]
        known = torch.isfinite(values) & (values > 0)
    return values.where(known & sample["valid"], torch.nan)
