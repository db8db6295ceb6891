"""Losses of dense prediction. Ignored pixels count nowhere and get a gradient of exactly 0."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import IGNORE_INDEX, PromptedMasks


def _without_ignored(logits: Tensor, mask: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Logits in float32, 0 in ignored pixels (so that not even a NaN there can spread), and the pixels that count."""
    counted = mask != ignore_index
    return logits.float().masked_fill(~counted.unsqueeze(1), 0.0), counted


def cross_entropy(
    logits: Tensor, mask: Tensor, *, weight: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Cross-entropy, averaged over the counted pixels by their class weights.

    Shapes: `logits` (B, K, H, W), `mask` int64 (B, H, W), `weight` (K,) -> scalar. A batch without a counted pixel
    gives 0, with a gradient of 0 (torch's own mean reduction gives NaN).
    """
    logits, counted = _without_ignored(logits, mask, ignore_index)
    total = F.cross_entropy(logits, mask, weight=weight, ignore_index=ignore_index, reduction="sum")
    per_pixel = counted.float() if weight is None else weight.float()[mask.masked_fill(~counted, 0)] * counted
    return total / per_pixel.sum().clamp_min(torch.finfo(torch.float32).tiny)


def dice(logits: Tensor, mask: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Soft multi-class Dice loss, 1 - mean over classes of 2 sum(p t) / (sum(p) + sum(t)), sums over the whole batch.

    Shapes: `logits` (B, K, H, W), `mask` int64 (B, H, W) -> scalar. The mean is over the classes that the batch's
    labels hold: an absent class would add a constant 1. A batch without a counted pixel gives 0, with a gradient of 0.
    """
    logits, counted = _without_ignored(logits, mask, ignore_index)
    classes = mask.masked_fill(~counted, 0).unsqueeze(1)
    truth = torch.zeros_like(logits).scatter_(1, classes, counted.unsqueeze(1).float())
    probability = logits.softmax(1) * counted.unsqueeze(1)
    over = (0, 2, 3)
    size = truth.sum(over)
    score = 2 * (probability * truth).sum(over) / (probability.sum(over) + size).clamp_min(1e-6)
    present = (size > 0).float()
    return ((1 - score) * present).sum() / present.sum().clamp_min(1)


class SegmentationLoss(nn.Module):
    """`ce_weight` x cross-entropy (with class weights) + `dice_weight` x Dice (balanced by itself, so without them)."""

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        class_weights: Sequence[float] | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        self.ce_weight, self.dice_weight, self.ignore_index = ce_weight, dice_weight, ignore_index
        weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Logits (B, K, H, W) and mask (B, H, W) -> {"loss": the sum, "ce", "dice": each before its weight}."""
        ce = cross_entropy(logits, mask, weight=self.class_weights, ignore_index=self.ignore_index)
        overlap = dice(logits, mask, ignore_index=self.ignore_index)
        return {"loss": self.ce_weight * ce + self.dice_weight * overlap, "ce": ce.detach(), "dice": overlap.detach()}


class PromptLoss(nn.Module):
    """Cross-entropy, Dice and the error of the expected IoU for masks of prompted objects.

    Of several alternatives only the one with the lowest loss is trained, so that they come to mean different things;
    the expected IoU is trained for all (Kirillov et al. 2023, https://arxiv.org/abs/2304.02643, §3 and appendix A).
    """

    def __init__(self, *, ce_weight: float = 1.0, dice_weight: float = 1.0, iou_weight: float = 1.0) -> None:
        super().__init__()
        self.ce_weight, self.dice_weight, self.iou_weight = ce_weight, dice_weight, iou_weight

    def forward(
        self,
        answer: PromptedMasks,
        truth: Tensor,
        counted: Tensor,
        present: Tensor,
        nothing: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Answers to B x M objects -> {"loss": the sum, "mask", "iou": mean per object}.

        `truth` bool (B, M, H, W); `counted` bool (B, H, W): pixels that are not ignored; `present` bool (B, M): False
        where no object is, which gets a gradient of 0; `nothing` bool (B, M), of these: the prompt is on something that
        is no object, so that an IoU of 0 is to be expected.
        """
        weight = counted[:, None, None].float()
        logits = answer.logits.float().masked_fill(weight == 0, 0.0)
        target = truth[:, :, None].float().expand_as(logits)
        pixels = weight.sum((-2, -1)).clamp_min(1)
        ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mul(weight).sum((-2, -1)) / pixels
        probability, target = logits.sigmoid() * weight, target * weight
        overlap, size = (probability * target).sum((-2, -1)), target.sum((-2, -1))
        dice_loss = 1 - (2 * overlap + 1) / (probability.sum((-2, -1)) + size + 1)
        mask_loss = self.ce_weight * ce + self.dice_weight * dice_loss
        chosen, _ = mask_loss.min(-1)
        with torch.no_grad():
            iou = mask_iou(logits > 0, truth[:, :, None], counted[:, None, None])
        quality = _mean((answer.scores.float() - iou).square().mean(-1), present)
        if nothing is not None:  # apart, or the many would have the score of good masks low, too
            quality = quality + _mean(answer.scores.float().square().mean(-1), nothing)
        mask_part = _mean(chosen, present)
        return {"loss": mask_part + self.iou_weight * quality, "mask": mask_part.detach(), "iou": quality.detach()}


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of those that are counted, 0 without one."""
    return (values * counted).sum() / counted.sum().clamp_min(1)


def mask_iou(found: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Intersection over union of masks, bool (..., H, W) of shapes that broadcast -> (...); 1 where both are empty."""
    both = (found & truth & counted).sum((-2, -1)).float()
    either = ((found | truth) & counted).sum((-2, -1)).float()
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def class_weights(pixels: Sequence[int], *, cap: float = 4.0) -> list[float]:
    """Weights by inverse square root of frequency, sqrt(median / pixels), clamped to [1 / cap, cap].

    `pixels`: counted pixels per class. The square root is the usual middle between no weights and full balancing,
    which over-predicts rare classes. A class without pixels gets 1.
    """
    seen = torch.tensor([float(p) for p in pixels])
    if not bool((seen > 0).any()):
        return [1.0] * len(pixels)
    weights = (seen[seen > 0].median() / seen.clamp_min(1)).sqrt().clamp(1 / cap, cap)
    return [float(w) for w in torch.where(seen > 0, weights, torch.ones_like(weights))]
