"""What depth says beside itself: surface normals and edges."""

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE = 0.04
"""Least second difference of inverse depth, as a share of it, of an edge: on planes inverse depth is linear."""


def normals(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Unit normals (B, 3, H, W) of surfaces, towards the camera, x to the right, y down, z ahead.

    Shapes: `depth` (B, H, W), `intrinsics` (B, 3, 3) in pixels. They are cross products of the central differences of
    the points seen, one-sided at the frame.
    """
    height, width = depth.shape[-2:]
    y, x = torch.meshgrid(*(torch.arange(n).to(depth) for n in (height, width)), indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(intrinsics).mT[:, None]
    points = rays * depth[..., None]
    down, right = torch.gradient(points, dim=(1, 2))
    found = torch.linalg.cross(down, right).movedim(-1, 1)
    return F.normalize(found, dim=1)


def edges(depth: Tensor) -> Tensor:
    """Where surfaces end or bend, bool (B, H, W): the second differences of inverse depth exceed `EDGE` of it."""
    inverse = 1 / depth[:, None]
    padded = F.pad(inverse, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - 2 * inverse + padded[..., 1:-1, :-2]).abs()
    along = (padded[..., 2:, 1:-1] - 2 * inverse + padded[..., :-2, 1:-1]).abs()
    return (torch.maximum(across, along) > EDGE * inverse)[:, 0]
