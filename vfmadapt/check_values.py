"""How hard data of values are: what the best constant and a per-pixel regressor reach."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import UserError
from vfmadapt.tasks.augment_values import known_values


def check_values(source: Any, split: str, pixels: tuple[int, int], rng: np.random.Generator) -> dict[str, Any]:
    """Root mean square errors of the first value on a split, fitted on train: the mean, and a regressor of one pixel.

    Args:
        source: the data, prepared.
        split: what is scored.
        pixels: how many pixels the regressor is fitted on, and how many both are scored on.
        rng: draws those pixels.

    Returns:
        "data", "bands", "split", "value", "unit", "mean" and "std" of the training values, "constant" and "per_pixel":
        root mean square errors.

    Raises:
        UserError: a split is empty, or holds no known pixel.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    train, scored = source.split("train"), source.split(split)
    if not len(train) or not len(scored):
        raise UserError(f"data set {source.spec.name}: split train or {split} is empty; nothing to check")
    features, wanted = _drawn(train, pixels[0], rng)
    others, truth = _drawn(scored, pixels[1], rng)
    model = HistGradientBoostingRegressor(random_state=int(rng.integers(2**31)))
    found = model.fit(features, wanted).predict(others)
    return {
        "data": source.spec.name,
        "bands": list(source.spec.bands),
        "split": split,
        "value": source.spec.values[0].name,
        "unit": source.spec.values[0].unit,
        "mean": float(wanted.mean()),
        "std": float(wanted.std()),
        "constant": float(np.sqrt(np.square(truth - wanted.mean()).mean())),
        "per_pixel": float(np.sqrt(np.square(truth - found).mean())),
    }


def _drawn(samples: Any, count: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """About `count` known pixels, as many of each image: (n, C) bands and (n,) values."""
    each = max(1, count // len(samples))
    features, values = [], []
    for index in range(len(samples)):
        sample = samples[index]
        truth = known_values(sample)[0].numpy()
        known = np.isfinite(truth)
        take = rng.choice(int(known.sum()), min(each, int(known.sum())), replace=False)
        features.append(sample["image"].numpy()[:, known][:, take].T)
        values.append(truth[known][take])
    if not sum(len(v) for v in values):
        raise UserError("no pixel of the split has a known value; look at data.*")
    return np.concatenate(features), np.concatenate(values)
