"""Resizing that knows about the backbone's padding."""

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
