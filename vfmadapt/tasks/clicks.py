"""Objects of label maps, and the prompts that someone would give to single them out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vfmadapt.contracts import MaskPrompts

Placer = Callable[[Tensor], Tensor]
"""Regions, bool (B, M, H, W) -> a pixel of each (B, M, 2) as x, y; any where the region is empty."""

BOX_JITTER = 0.1  # standard deviation of a box's corners, as a share of its side, and ...
LARGEST_JITTER = 20.0  # ... at most this many pixels: as SAM was trained
_EIGHT = np.ones((3, 3))  # regions that touch at a corner are one


@dataclass(frozen=True)
class Objects:
    """Up to M objects in each of B images.

    `masks` bool (B, M, H, W); `classes` int64 (B, M); `present` bool (B, M): False where an image has fewer, the mask
    being the whole image there.
    """

    masks: Tensor
    classes: Tensor
    present: Tensor


def find_objects(mask: Tensor, classes: Sequence[int], *, smallest: int) -> list[tuple[int, Tensor]]:
    """Connected regions (8 neighbours) of the labels `classes` in a label map (H, W) -> [(label, bool (H, W))].

    Regions of fewer than `smallest` pixels are left out.
    """
    from scipy.ndimage import label

    values, found = mask.cpu().numpy(), []
    for value in classes:
        numbered, _ = label(values == value, structure=_EIGHT)
        sizes = np.bincount(numbered.ravel())
        for number in np.flatnonzero(sizes >= smallest):
            if number:  # 0 is what belongs to no region
                found.append((int(value), torch.from_numpy(numbered == number)))
    return found


def stack_objects(images: Sequence[Sequence[tuple[int, Tensor]]], size: tuple[int, int], *, most: int) -> Objects:
    """The objects of B images -> one batch of at most `most` per image, padded."""
    count = max(1, min(most, max(len(found) for found in images)))
    masks = torch.ones(len(images), count, *size, dtype=torch.bool)
    classes, present = (torch.zeros(len(images), count, dtype=d) for d in (torch.int64, torch.bool))
    for i, found in enumerate(images):
        for j, (value, region) in enumerate(found[:count]):
            masks[i, j], classes[i, j], present[i, j] = region, value, True
    return Objects(masks, classes, present)


def boxes_of(masks: Tensor) -> Tensor:
    """Masks (B, M, H, W), none empty -> first and last column and row: (B, M, 4) as x0, y0, x1, y1."""
    from torchvision.ops import masks_to_boxes

    return masks_to_boxes(masks.flatten(0, 1)).unflatten(0, masks.shape[:2])


def jitter(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (B, M, 4) as a hand draws them: the corners moved at random, inside the image (H, W)."""
    side = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    moved = boxes + torch.randn_like(boxes) * (BOX_JITTER * side).clamp_max(LARGEST_JITTER)
    limit = boxes.new_tensor([size[1] - 1, size[0] - 1] * 2)
    first, second = moved.clamp_min(0).minimum(limit).split(2, -1)
    return torch.cat([first.minimum(second), first.maximum(second)], -1)


def random_place(regions: Tensor) -> Tensor:
    """A pixel of each region, all equally likely."""
    drawn = torch.rand(regions.shape, device=regions.device) * regions
    return _coordinates(drawn.flatten(2).argmax(-1), regions.shape[-1])


def central_place(regions: Tensor) -> Tensor:
    """The pixel of each region that is farthest from its outside, where someone would click."""
    from scipy.ndimage import distance_transform_edt

    padded = np.pad(regions.cpu().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))  # outside the image is outside
    depth = np.stack([[distance_transform_edt(r)[1:-1, 1:-1] for r in image] for image in padded])
    deepest = torch.from_numpy(depth.reshape(*regions.shape[:2], -1).argmax(-1)).to(regions.device)
    return _coordinates(deepest, regions.shape[-1])


def first_click(masks: Tensor, place: Placer) -> MaskPrompts:
    """One point on each object (B, M, H, W)."""
    points = place(masks).unsqueeze(2)
    return MaskPrompts(points=points, labels=torch.ones(points.shape[:3], device=points.device))


def next_click(given: MaskPrompts, found: Tensor, truth: Tensor, counted: Tensor, place: Placer) -> MaskPrompts:
    """The prompts `given` and one more point where the masks `found` (bool, B, M, H, W) are wrong.

    `truth` bool (B, M, H, W), `counted` bool (B, H, W). A mask that is right gets no point.
    """
    wrong = (found != truth) & counted[:, None]
    # what is missing and what is too much may touch: the point belongs to the larger of the two
    missing, extra = wrong & truth, wrong & ~truth
    more = missing.sum((-2, -1)) >= extra.sum((-2, -1))
    point = place(torch.where(more[..., None, None], missing, extra)).unsqueeze(2)
    label = torch.where(wrong.any(-1).any(-1), more.float(), -1.0).unsqueeze(2)
    if given.points is None or given.labels is None:
        return MaskPrompts(points=point, labels=label, boxes=given.boxes)
    points, labels = torch.cat([given.points, point], 2), torch.cat([given.labels, label], 2)
    return MaskPrompts(points=points, labels=labels, boxes=given.boxes)


def _coordinates(index: Tensor, width: int) -> Tensor:
    return torch.stack([index % width, index // width], -1).float()
