"""Specks of a label map: regions too small to be what they are called."""

import numpy as np
import torch
from torch import Tensor


def without_specks(logits: Tensor, smallest: int) -> Tensor:
    """Logits (B, K, H, W) whose label map has no region of fewer than `smallest` pixels of one class.

    There the class has the lowest of the pixel's logits, so that the next likely one holds. SAM drops such pieces of a
    mask, too (`min_mask_region_area` of segment-anything). What touches the border is kept: it may go on beyond it.
    """
    from skimage.measure import label

    maps = logits.argmax(1, keepdim=True)
    specks = np.zeros(maps.shape, bool)
    for image, found in zip(maps[:, 0].cpu().numpy(), specks[:, 0], strict=True):
        regions = label(image, background=-1, connectivity=2)  # of one value each, corners touch
        few = np.bincount(regions.ravel()) < smallest
        few[np.concatenate([regions[[0, -1]].ravel(), regions[:, [0, -1]].ravel()])] = False
        found[:] = few[regions]
    small = torch.from_numpy(specks).to(logits.device)
    named = torch.zeros_like(logits, dtype=torch.bool).scatter(1, maps, small)
    return torch.where(named, logits.amin(1, keepdim=True), logits)
