"""How far the surfaces of two masks lie apart."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PERCENTILE = 95


@dataclass(frozen=True)
class SurfaceDistances:
    """Of two masks, in the unit of the spacing.

    `hd95`: the greater of the two directed 95th percentiles of the distance from a surface pixel to the other surface.
    `mean`: the average of that distance over the surface pixels of both (average symmetric surface distance).
    """

    hd95: float
    mean: float


def surface_distances(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float]
) -> SurfaceDistances | None:
    """Distances between two masks of one shape, (H, W) or (D, H, W), by MONAI; None where either is empty.

    `spacing`: millimetres (or 1 for pixels) along each axis.
    """
    if not (prediction.any() and truth.any()):
        return None
    import torch
    from monai.metrics.utils import get_edge_surface_distance

    found, true = (torch.from_numpy(np.ascontiguousarray(m)) for m in (prediction, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of an argument that MONAI itself gives
        both: Any = get_edge_surface_distance(found, true, spacing=list(spacing), symmetric=True)[1]
    directed = [d.numpy() for d in both]
    return SurfaceDistances(
        hd95=max(float(np.percentile(d, _PERCENTILE)) for d in directed),
        mean=float(np.concatenate(directed).mean()),
    )
