"""Least, greatest and mean of values that are seen piece by piece."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Statistics:
    """Of the values of all pixels with data: least, greatest, mean and standard deviation; NaN without such pixels."""

    least: float
    greatest: float
    mean: float
    deviation: float


def moments(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Values (bands, n) -> least, greatest, sum and sum of squares of each band, (bands, 4)."""
    found = np.zeros((len(values), 4))
    found[:, 0] = values.min(axis=1, initial=np.inf)
    found[:, 1] = values.max(axis=1, initial=-np.inf)
    found[:, 2] = values.sum(axis=1, dtype=np.float64)
    found[:, 3] = np.square(values, dtype=np.float64).sum(axis=1)
    return found


def joined(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The moments of two pieces together."""
    least, greatest = np.minimum(first[:, 0], second[:, 0]), np.maximum(first[:, 1], second[:, 1])
    return np.column_stack([least, greatest, first[:, 2:] + second[:, 2:]])


def statistics(found: NDArray[np.float64], count: int) -> Statistics:
    """The statistics of one band's moments (4,) over `count` pixels."""
    if not count:
        return Statistics(*[math.nan] * 4)
    least, greatest, total, squares = map(float, found)
    mean = total / count
    return Statistics(least, greatest, mean, math.sqrt(max(squares / count - mean**2, 0.0)))
