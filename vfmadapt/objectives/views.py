"""Random views of a normalised square image of any bands."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[float, float]


def random_crop(square: Tensor, size: int, scale: Range, draw: np.random.Generator) -> Tensor:
    """A crop (C, size, size) of a square (C, s, s), inside it, flipped and turned by quarters.

    `scale`: least and greatest pixels of the square for a pixel of the crop, drawn log-uniformly.
    """
    side = square.shape[-1]
    extent = min(size / side * math.exp(draw.uniform(math.log(scale[0]), math.log(scale[1]))), 1.0)
    turn, flip = draw.integers(4) * (math.pi / 2), draw.choice((-1.0, 1.0))
    shift = draw.uniform(-1, 1, 2) * (1 - extent)
    cos, sin = math.cos(turn) * extent, math.sin(turn) * extent
    theta = torch.tensor([[[cos * flip, -sin, shift[0]], [sin * flip, cos, shift[1]]]], dtype=square.dtype)
    grid = F.affine_grid(theta, [1, square.shape[0], size, size], align_corners=False)
    return F.grid_sample(square[None], grid, padding_mode="border", align_corners=False)[0]


def jitter(image: Tensor, strength: float, draw: np.random.Generator) -> Tensor:
    """Vary the contrast of (C, H, W), the brightness, and a third as much that of each band, in standard deviations."""
    gain = math.exp(draw.uniform(-strength, strength))
    shifts = draw.uniform(-strength, strength) + draw.uniform(-strength / 3, strength / 3, len(image))
    return image * gain + torch.from_numpy(shifts).to(image).view(-1, 1, 1)


def blur(image: Tensor, chance: float, draw: np.random.Generator) -> Tensor:
    """With a chance, blur (C, H, W) with a Gaussian of 0.1 to 2 pixels (DINO's)."""
    from torchvision.transforms.v2.functional import gaussian_blur

    if draw.random() >= chance:
        return image
    blurred: Tensor = gaussian_blur(image, [9, 9], [draw.uniform(0.1, 2.0)])
    return blurred
