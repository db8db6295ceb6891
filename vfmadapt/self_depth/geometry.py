"""Where the points of one picture lie in another. Pixels: x before y, (0, 0) the first pixel's centre.

B pictures, H W pixels. A pose (B, 4, 4) takes points from the first camera to the second, which looks along +z, x to
the right, y down.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pose_matrix(motion: Tensor) -> Tensor:
    """Rotation vector (radians) and translation (B, 6) -> poses (B, 4, 4)."""
    x, y, z = motion[:, :3].unbind(1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    rotation = torch.linalg.matrix_exp(skew)
    last = motion.new_tensor([0, 0, 0, 1]).expand(len(motion), 1, 4)
    return torch.cat([torch.cat([rotation, motion[:, 3:, None]], 2), last], 1)


def pixels(size: tuple[int, int], like: Tensor) -> Tensor:
    """Places (H, W, 2) of the pixels of a picture of `size`."""
    y, x = (torch.arange(n, device=like.device, dtype=like.dtype) for n in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def project(depth: Tensor, pose: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Where the points of a depth map are seen by a second camera of the same `intrinsics` (B, 3, 3).

    Returns:
        places (B, H, W, 2) in its picture, and whether they lie in front of it and within its frame, bool (B, H, W).
    """
    height, width = depth.shape[-2:]
    homogeneous = F.pad(pixels((height, width), depth), (0, 1), value=1.0).flatten(0, 1)
    rays = homogeneous @ torch.linalg.inv(intrinsics).mT
    points = rays * depth.flatten(1)[..., None]
    seen = (points @ pose[:, :3, :3].mT + pose[:, None, :3, 3]) @ intrinsics.mT
    ahead = seen[..., 2] > 1e-6
    places = seen[..., :2] / seen[..., 2:].clamp_min(1e-6)
    inside = ahead & (places >= 0).all(-1) & (places[..., 0] <= width - 1) & (places[..., 1] <= height - 1)
    return places.view(-1, height, width, 2), inside.view(-1, height, width)


def look_up(image: Tensor, places: Tensor) -> Tensor:
    """Bilinear values of an image (B, C, H, W) at places (B, H', W', 2); beyond the frame those of its border."""
    last = places.new_tensor([image.shape[-1] - 1, image.shape[-2] - 1])
    return F.grid_sample(image, 2 * places / last - 1, padding_mode="border", align_corners=True)


def coverage(flow: Tensor) -> Tensor:
    """How much of each pixel (B, H, W) is reached when all pixels of another picture go along `flow` (B, 2, H, W).

    Each spreads a weight of 1 over the four pixels around its end (Wang et al. 2018, "Occlusion aware unsupervised
    learning of optical flow", https://arxiv.org/abs/1711.05890): near 0 lies what that picture does not show.
    """
    height, width = flow.shape[-2:]
    ends = pixels((height, width), flow) + flow.permute(0, 2, 3, 1)
    corner = ends.floor()
    share = ends - corner
    total = flow.new_zeros(len(flow), height * width)
    for right in (0, 1):
        for down in (0, 1):
            x, y = corner[..., 0] + right, corner[..., 1] + down
            weight = (share[..., 0] - (1 - right)).abs() * (share[..., 1] - (1 - down)).abs()
            inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
            index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).long()
            total.scatter_add_(1, index.flatten(1), (weight * inside).flatten(1))
    return total.view(-1, height, width)


def camera_matrix(focal: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
    """Intrinsics (B, 3, 3) in pixels for a picture of `size` (H, W).

    `focal`, `centre` (B, 2): along x and y, in widths and heights of the picture; its corner is (0, 0), its middle 0.5.
    """
    extent = focal.new_tensor([size[1], size[0]])
    matrix = torch.diag_embed(F.pad(focal * extent, (0, 1), value=1.0))
    return matrix + F.pad((centre * extent - 0.5)[..., None], (2, 0, 0, 1))
