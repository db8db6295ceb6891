"""Losses of depth and other values; pixels that are not known count nowhere and get a gradient of exactly 0.

P predicted and T true values are (B, H, W) or (B, 1, H, W), `known` bool of the same shape.
"""

import torch
from torch import Tensor

_TINY = 1e-6


def silog(found: Tensor, truth: Tensor, known: Tensor, *, variance: float = 0.85) -> Tensor:
    """Scale-invariant logarithmic error, sqrt(mean(g^2) - v mean(g)^2) with g = log P - log T over all known pixels.

    Eigen et al. 2014, https://arxiv.org/abs/1406.2283, eq. 4, as a root (Lee et al. 2019, https://arxiv.org/abs/
    1907.10326, eq. 4). `variance` v: 1 ignores a common factor, 0 is the plain error of logarithms.

    Both maps are above 0 where known. Without a known pixel it is 0.
    """
    found, truth = found.float().masked_fill(~known, 1.0), truth.float().masked_fill(~known, 1.0)
    gap, count = found.clamp_min(_TINY).log() - truth.log(), known.sum().clamp_min(1)
    spread = gap.square().sum() / count - variance * (gap.sum() / count).square()
    return (spread.clamp_min(0) + _TINY).sqrt() - _TINY**0.5


def scale_and_shift_invariant(found: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Mean |P' - T'| with X' = (X - median) / mean |X - median| of each image, its known pixels only.

    Ranftl et al. 2022, "Towards Robust Monocular Depth Estimation", https://arxiv.org/abs/1907.01341, eq. 5 and 6, for
    inverse depth. Averaged over the images that have known pixels; without any it is 0.
    """
    gap, pixels = _normalised_gap(found, truth, known)
    return _per_image(gap.abs().flatten(1).sum(1), pixels)


def gradient_matching(found: Tensor, truth: Tensor, known: Tensor, *, scales: int = 4) -> Tensor:
    """Mean |dx R| + |dy R| of R = P' - T' (see `scale_and_shift_invariant`), summed over `scales` halved sizes.

    Ranftl et al. 2022, https://arxiv.org/abs/1907.01341, eq. 11: edges lie where those of the truth do. Differences
    count where both pixels are known.
    """
    gap, _ = _normalised_gap(found, truth, known)
    known = known.flatten(0, -3) if known.ndim == 4 else known
    total = gap.new_zeros(())
    for level in range(scales):
        step = 2**level
        part, counted = gap[:, ::step, ::step], known[:, ::step, ::step]
        edges = gap.new_zeros(len(gap))
        for axis in (1, 2):
            size = part.shape[axis]
            near, far = (t.narrow(axis, 0, max(size - 1, 0)) for t in (part, counted))
            near_next, far_next = (t.narrow(axis, min(1, size), max(size - 1, 0)) for t in (part, counted))
            edges = edges + ((near_next - near).abs() * (far & far_next)).flatten(1).sum(1)
        total = total + _per_image(edges, counted.flatten(1).sum(1))
    return total


def _normalised_gap(found: Tensor, truth: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """P' - T' as (B, H, W), 0 where not known; the number of known pixels (B,)."""
    found, truth, known = (t.flatten(0, -3) if t.ndim == 4 else t for t in (found, truth, known))
    gap = _normalised(found.float(), known) - _normalised(truth.float(), known)
    return gap.masked_fill(~known, 0.0), known.flatten(1).sum(1)


def _normalised(values: Tensor, known: Tensor) -> Tensor:
    """X' of each image, (B, H, W); 0 where not known."""
    flat, counted = values.masked_fill(~known, 0.0).flatten(1), known.flatten(1)
    pixels = counted.sum(1)
    middle = torch.where(counted, flat, torch.nan).nanmedian(1).values.where(pixels > 0, 0.0)
    away = (flat - middle[:, None]).masked_fill(~counted, 0.0)
    size = away.abs().sum(1) / pixels.clamp_min(1)
    return (away / size.clamp_min(_TINY)[:, None]).view_as(values)


def _per_image(sums: Tensor, pixels: Tensor) -> Tensor:
    """Mean over the images with known pixels of sum / pixels."""
    return (sums / pixels.clamp_min(1)).sum() / (pixels > 0).sum().clamp_min(1)
