"""Resizing that knows about the backbone's padding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.contracts import BackboneSpec, UserError


def to_image(logits: Tensor, grid: tuple[int, int], stride: int, size: tuple[int, int]) -> Tensor:
    """Logits (B, K, *, *) that cover `grid` cells of `stride` pixels -> (B, K, H, W), bilinear.

    `size` is (H, W) of the image. The grid covers the image padded at the bottom and right, so the logits are scaled to
    that size and cropped.
    """
    padded = (grid[0] * stride, grid[1] * stride)
    logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
    return logits[..., : size[0], : size[1]]


def resolve_layers(spec: BackboneSpec, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of blocks, negative ones counted from the last, -> indices in 0..depth-1, ascending.

    Raises UserError where one lies outside.
    """
    if not layers or any(not -spec.depth <= i < spec.depth for i in layers):
        raise UserError(
            f"head.layers={list(layers)}: {spec.name} has {spec.depth} blocks; "
            f"give indices from {-spec.depth} to {spec.depth - 1}"
        )
    return tuple(sorted({i % spec.depth for i in layers}))


def spread(depth: int, count: int = 4) -> tuple[int, ...]:
    """`count` blocks evenly spaced, the last one included (12 -> 2, 5, 8, 11); all of them where there are fewer."""
    count = min(count, depth)
    return tuple((2 * depth * (i + 1) + count) // (2 * count) - 1 for i in range(count))  # rounds halves up


def upsample_to(like: Tensor, coarse: Tensor, factor: float) -> Tensor:
    """Scale a map up by `factor` and crop it to `like`: stages of a hierarchy may be padded by different amounts."""
    if factor == 1:
        return coarse
    size = [round(n * factor) for n in coarse.shape[2:]]
    scaled = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return scaled[..., : like.shape[2], : like.shape[3]].contiguous(memory_format=torch.channels_last)
