"""Inference on an image of any size that is in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.raster.tiling import TileGrid, window


def whole_image(model: Any, image: Tensor, valid: Tensor, *, side: int) -> Tensor:
    """Logits of whole images: in one go up to `side` pixels per side, else by overlapping windows, blended.

    A model of relative depth sees a larger image as a whole, shrunk: its values have another scale and shift for every
    image, so windows do not fit together.

    Shapes: `image` (B, C, H, W) in sensor units, `valid` bool (B, H, W) -> logits (B, K, H, W), float32. Windows
    overlap by a quarter and lie inside the image.
    """
    height, width = image.shape[-2:]
    if max(height, width) > side and model.spec.relative:
        return _shrunk(model, image, valid, side)
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


def _shrunk(model: Any, image: Tensor, valid: Tensor, side: int) -> Tensor:
    """Values of images whose longer side is brought to `side` pixels, at the images' own size."""
    whole = image.shape[-2:]
    size = [max(round(n * side / max(whole)), 1) for n in whole]
    small = F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
    known = F.interpolate(valid[:, None].float(), size, mode="area")[:, 0] > 0.5
    return F.interpolate(model(small, known).float(), whole, mode="bilinear", align_corners=False)


class WholePicture(nn.Module):
    """A model of relative depth as one that maps rasters by tiles: its one tile holds the picture, seen as a whole.

    Args:
        model: whose value is an inverse depth.
        size: of the picture (H, W), which the tile begins with.
        side: of the picture that the model sees, at most, in pixels.
    """

    side: Tensor

    def __init__(self, model: Any, size: tuple[int, int], side: int) -> None:
        super().__init__()
        self.model, self.spec, self.size = model, model.spec, size
        self.register_buffer("side", torch.tensor(side))  # so that another is another model to an interrupted run

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        """Images (B, C, H, W) in sensor units, valid bool (B, H, W) -> values (B, K, H, W), 0 beyond the picture."""
        part = (..., slice(self.size[0]), slice(self.size[1]))
        found = whole_image(self.model, image[part], valid[part], side=int(self.side))
        beyond = [image.shape[-1] - self.size[1], image.shape[-2] - self.size[0]]
        return F.pad(found, (0, beyond[0], 0, beyond[1]))
