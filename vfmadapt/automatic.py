"""All objects of an image though nobody points at any: a grid of points asks for them, or a head tells them apart."""

from collections.abc import Sequence
from dataclasses import astuple, replace

import torch
from torch import Tensor, nn

from vfmadapt.contracts import Instances, MaskPrompts
from vfmadapt.errors import UserError
from vfmadapt.model import AdaptedModel
from vfmadapt.promptable import PromptableModel

AT_ONCE = 64  # points that are answered together, ...
SAME_BOX = 0.7  # IoU of boxes above which the less sure of two masks is dropped, ...
SHIFT = 1.0  # and by how much logits are moved to draw a mask wider and tighter: all as published


class ObjectMapper(nn.Module):
    """Image in sensor units -> which object each pixel belongs to; a model that `vfmadapt.predict_raster` maps with.

    SAM's automatic masks (Kirillov et al. 2023, https://arxiv.org/abs/2304.02643, §4 and appendix B): a point of a grid
    may mean a thing, a part of it or what it belongs to, so all masks that the head has for it are considered (SAM:
    three), and a part is found beside its whole. Those count of which a high IoU is expected and that hardly change
    with the threshold; of two in about the same box, of one point or of several, the better one stays. Where masks
    overlap, the smaller one lies on top.

    Args:
        model: answers the points.
        points: per side of an image; None, here and below: as the model's head has it.
        quality: the least IoU that the model must expect of a mask, 0..1.
        stability: the least IoU of a mask drawn wider with the same drawn tighter, 0..1.

    Raises:
        UserError: a setting out of its range.
    """

    def __init__(
        self,
        model: PromptableModel,
        *,
        points: int | None = None,
        quality: float | None = None,
        stability: float | None = None,
    ) -> None:
        super().__init__()
        own = model.asked.grid
        self.grid = replace(
            own,
            points=own.points if points is None else points,
            quality=own.quality if quality is None else quality,
            stability=own.stability if stability is None else stability,
        )
        self.model = model
        self.spec = replace(model.spec, classes=(), objects=True)
        # a buffer, so that maps made with other settings are not taken for this one's
        self.register_buffer("settings", torch.tensor(astuple(self.grid)), persistent=False)

    @torch.no_grad()
    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        """Images (B, C, H, W) in sensor units, `valid` bool (B, H, W) -> float32 (B, 1, H, W).

        0 where no object is, else 1 + the index of the mask, all those of the first point before those of the second.
        Image by image, so that what is found in one does not depend on the others of its batch.
        """
        pairs = zip(image.split(1), valid.split(1), strict=True)
        return torch.stack([self._numbers(one, usable) for one, usable in pairs])

    def _numbers(self, image: Tensor, valid: Tensor) -> Tensor:
        """One image (1, C, H, W) -> (1, H, W)."""
        points = grid_of_points(self.grid.points, valid)
        x, y = points.round().long().unbind(1)
        asked = valid[0, y, x].nonzero()[:, 0]
        labels = valid.new_zeros(valid.shape, dtype=torch.float32)
        if not len(asked):
            return labels
        embedding = self.model.encode(image, valid)
        found = [self._masks(embedding, points[some], some, valid) for some in asked.split(AT_ONCE)]
        masks, scores, numbers = (torch.cat(part) for part in zip(*found, strict=True))
        for index in kept(masks, scores):
            labels[0, masks[index]] = numbers[index]
        return labels

    def _masks(self, embedding: Tensor, points: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of all masks of points (N, 2) that count: bool (M, H, W), expected IoU (M,), numbers (M,)."""
        prompts = MaskPrompts(points=points[None, :, None], labels=points.new_ones(1, len(points), 1))
        answer = self.model.asked.decode(embedding, prompts, (valid.shape[1], valid.shape[2]), several=True)
        scores, several = answer.scores[0].flatten().float(), answer.scores.shape[2]
        numbers = 1.0 + (index[:, None] * several + torch.arange(several, device=index.device)).flatten()
        sure = scores >= self.grid.quality  # first, for the rest looks at every pixel
        logits = answer.logits[0].flatten(0, 1)[sure].float().masked_fill(~valid, float("-inf"))
        masks = logits > 0
        counts = masks.flatten(1).any(1) & (stability(logits) >= self.grid.stability)
        return masks[counts], scores[sure][counts], numbers[sure][counts]


class InstanceMapper(nn.Module):
    """Image in sensor units -> which object of which class each pixel belongs to; for `vfmadapt.predict_raster`.

    Those of the model's instances count that are of the classes and sure enough. What overlaps is settled as by
    `ObjectMapper`: of two in about the same box the surer one stays, and the smaller one lies on top.

    Args:
        model: its head tells objects apart.
        classes: names of those whose objects are wanted.
        quality: the least score of an object, 0..1; by default it is likelier right than wrong.

    Raises:
        UserError: a head that tells no objects apart, an unknown class, a score out of its range.
    """

    def __init__(self, model: AdaptedModel, classes: Sequence[str], *, quality: float = 0.5) -> None:
        super().__init__()
        names = [c.name for c in model.spec.classes]
        if not model.head.regions:
            raise UserError(
                f"objects.classes={list(classes)}: this model's {type(model.head).__name__} has not learned to tell "
                "objects of a class apart; train with head=eomt head.regions=true, or leave objects.classes out"
            )
        if not classes or (unknown := sorted({*classes} - {*names})):
            given = f"no class {unknown[0]!r}" if classes else "no class"
            raise UserError(f"objects.classes={list(classes)}: {given}; the model has {', '.join(names)}, or write all")
        if not 0 <= quality <= 1:
            raise UserError(f"objects.quality={quality:g}: allowed are scores from 0 to 1")
        self.model, self.quality = model, quality
        self.spec = replace(model.spec, objects=True)
        self.wanted: Tensor
        self.register_buffer("wanted", torch.tensor([name in classes for name in names]), persistent=False)
        # a buffer, so that maps made with another score are not taken for this one's
        self.register_buffer("settings", torch.tensor(quality), persistent=False)

    @torch.no_grad()
    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        """Images (B, C, H, W) in sensor units, `valid` bool (B, H, W) -> float32 (B, 1, H, W), as `DataSpec` says."""
        pairs = zip(self.model.instances(image, valid), valid, strict=True)
        return torch.stack([self._numbers(found, usable) for found, usable in pairs])

    def _numbers(self, found: Instances, valid: Tensor) -> Tensor:
        """The objects of an image, `valid` (H, W) -> (1, H, W)."""
        masks = found.masks & valid
        counts = self.wanted[found.classes] & (found.scores >= self.quality) & masks.flatten(1).any(1)
        masks, classes = masks[counts], found.classes[counts]
        numbers = 1.0 + classes + len(self.wanted) * torch.arange(len(classes), device=classes.device)
        labels = valid.new_zeros((1, *valid.shape), dtype=torch.float32)
        for index in kept(masks, found.scores[counts]):
            labels[0, masks[index]] = numbers[index]
        return labels


def grid_of_points(per_side: int, valid: Tensor) -> Tensor:
    """The middles of `per_side` x `per_side` cells of an image, `valid` (1, H, W) -> (N, 2) as x, y, row by row."""
    height, width = valid.shape[-2:]
    middles = (torch.arange(per_side, device=valid.device) + 0.5) / per_side
    y, x = torch.meshgrid(middles * height - 0.5, middles * width - 0.5, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1).clamp_min(0)


def stability(logits: Tensor) -> Tensor:
    """IoU of each mask (N, H, W) at a threshold above 0 with the same mask at one below: (N,), 0 for an empty mask."""
    tight, wide = ((logits > shift).flatten(1).sum(1) for shift in (SHIFT, -SHIFT))
    return tight / wide.clamp_min(1)


def kept(masks: Tensor, scores: Tensor) -> list[int]:
    """Indices of masks (N, H, W), none empty, without those that a better one repeats; from large to small."""
    from torchvision.ops import masks_to_boxes, nms

    if not len(masks):
        return []
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1  # up to the far side of the last pixel
    best = nms(boxes, scores, SAME_BOX)
    order = masks[best].flatten(1).sum(1).argsort(descending=True, stable=True)
    return [int(i) for i in best[order]]
