"""Inference on an image of any size that is in memory."""

import torch
from torch import Tensor, nn

from vfmadapt.raster.tiling import TileGrid, window


def whole_image(model: nn.Module, image: Tensor, valid: Tensor, *, side: int) -> Tensor:
    """Logits of whole images: in one go up to `side` pixels per side, else by overlapping windows, blended.

    Shapes: `image` (B, C, H, W) in sensor units, `valid` bool (B, H, W) -> logits (B, K, H, W), float32. Windows
    overlap by a quarter and lie inside the image.
    """
    height, width = image.shape[-2:]
    if max(height, width) <= side:
        logits: Tensor = model(image, valid)
        return logits.float()
    grid = TileGrid(height, width, side, side // 4)
    weights = torch.from_numpy(window(side, side // 4)).to(image.device)[: min(side, height), : min(side, width)]
    sums: Tensor | None = None
    total = torch.zeros(height, width, device=image.device)
    for row in grid.rows:
        for column in grid.columns:
            top, left = min(row, max(height - side, 0)), min(column, max(width - side, 0))
            at = (..., slice(top, top + side), slice(left, left + side))
            part = model(image[at], valid[at]).float() * weights
            if sums is None:
                sums = part.new_zeros(*part.shape[:2], height, width)
            sums[at] += part
            total[at] += weights
    assert sums is not None
    return sums / total
