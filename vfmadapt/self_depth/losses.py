"""What two pictures of the same thing must have in common, and how smooth a map of it is."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WEIGHT = 0.85  # as in Monodepth2 (https://arxiv.org/abs/1806.01260), whose loss EndoDAC's is


def photometric(found: Tensor, wanted: Tensor) -> Tensor:
    """0.85 (1 - SSIM) / 2 + 0.15 |found - wanted| for each pixel: images (B, C, H, W) in 0..1 -> (B, H, W)."""
    different = ((1 - ssim(found, wanted)) / 2).clamp(0, 1)
    return (SSIM_WEIGHT * different + (1 - SSIM_WEIGHT) * (found - wanted).abs()).mean(1)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images in 0..1 around each pixel, over windows of 3 x 3: (B, C, H, W) -> the same."""
    a, b = (F.pad(x, (1, 1, 1, 1), mode="reflect") for x in (a, b))
    means = [F.avg_pool2d(x, 3, 1) for x in (a, b, a * a, b * b, a * b)]
    mean_a, mean_b = means[:2]
    var_a, var_b, both = means[2] - mean_a**2, means[3] - mean_b**2, means[4] - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2  # as defined for images in 0..1
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def least(losses: Sequence[Tensor], shown: Sequence[Tensor], unmoved: Sequence[Tensor]) -> Tensor:
    """Mean over pixels of the smallest of several losses (B, H, W) each, where it says something.

    A pixel counts only in pictures that show it (`shown`, bool), so that what is hidden in one is learnt from another
    (per-pixel minimum), and not at all where a picture fits at least as well `unmoved`: there nothing moves, or moves
    with the camera (auto-mask). Both from Monodepth2.
    """
    infinite = [loss.masked_fill(~there, float("inf")) for loss, there in zip(losses, shown, strict=True)]
    smallest = torch.stack(infinite).amin(0)
    counted = (smallest < torch.stack(list(unmoved)).amin(0)).detach()
    return smallest.masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, H, W) where a bool mask is set, 0 where it never is."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def edge_aware(values: Tensor, guide: Tensor) -> Tensor:
    """Mean gradient of a map (B, K, H, W), each weighted by exp(-gradient) of the `guide` (B, C, H, W) there."""
    total = values.new_zeros(())
    for axis in (-1, -2):
        change, edge = (x.diff(dim=axis).abs() for x in (values, guide))
        total = total + (change * (-edge.mean(1, keepdim=True)).exp()).mean()
    return total
