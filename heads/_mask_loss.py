"""The loss of mask transformers: each labelled mask goes to the query that fits it best, the others mean nothing.

Cheng et al. 2022, "Masked-attention Mask Transformer for Universal Image Segmentation",
https://arxiv.org/abs/2112.01527, §3.3; the matching is that of DETR (Carion et al. 2020,
https://arxiv.org/abs/2005.12872, §3.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
"""Of the parts, in the matching as in the loss: as published."""

NOTHING_WEIGHT = 0.1
"""Of the queries that mean nothing, most of them: as published."""


@dataclass(frozen=True)
class MaskTargets:
    """The labelled masks of one image on the grid of the masks' logits.

    `masks` (M, h, w): share of a cell's counted pixels; `classes` int64 (M,); `weight` (h, w): share of pixels counted.
    """

    masks: Tensor
    classes: Tensor
    weight: Tensor


def mask_targets(labels: Tensor, shape: tuple[int, int], *, ignore_index: int, regions: bool) -> MaskTargets:
    """Labels (H, W) that cover the grid `shape` (h, w) -> a mask per class, or per connected region of a class.

    Every pixel counts, and an ignored one nowhere: cells hold shares, where the papers draw pixels at random.
    """
    counted = labels != ignore_index
    masks, classes = _masks(labels, [int(k) for k in labels[counted].unique()], regions=regions)
    weight = F.adaptive_avg_pool2d(counted.float()[None], shape)[0]
    shares = F.adaptive_avg_pool2d(masks.float(), shape) if len(classes) else masks.new_zeros(0, *shape).float()
    return MaskTargets(shares / weight.clamp_min(torch.finfo(torch.float32).tiny), classes, weight)


def _masks(labels: Tensor, classes: Sequence[int], *, regions: bool) -> tuple[Tensor, Tensor]:
    """Masks, bool (M, H, W), and the class of each."""
    found = [(k, labels == k) for k in classes]
    if regions:
        from scipy.ndimage import label

        numbered = [(k, *label(mask.cpu().numpy(), structure=np.ones((3, 3)))) for k, mask in found]
        found = [(k, torch.from_numpy(at == i).to(labels.device)) for k, at, n in numbered for i in range(1, n + 1)]
    masks = torch.stack([mask for _, mask in found]) if found else labels.new_zeros(0, *labels.shape, dtype=torch.bool)
    return masks, labels.new_tensor([k for k, _ in found], dtype=torch.int64)


def pairwise(masks: Tensor, targets: MaskTargets) -> tuple[Tensor, Tensor]:
    """Logits (Q, h, w) against M targets -> cross-entropy and Dice loss of every pair, (Q, M) each."""
    logits, weight = masks.float().flatten(1), targets.weight.flatten()
    truth = targets.masks.flatten(1)
    counted = weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
    ce = ((F.softplus(-logits) * weight) @ truth.T + (F.softplus(logits) * weight) @ (1 - truth).T) / counted
    inside = logits.sigmoid() * weight
    sizes = inside.sum(1)[:, None] + (truth * weight).sum(1)
    return ce, 1 - (2 * inside @ truth.T + 1) / (sizes + 1)


@torch.no_grad()
def match(classes: Tensor, masks: Tensor, targets: MaskTargets) -> tuple[Tensor, Tensor]:
    """Class logits (Q, K + 1) and mask logits (Q, h, w) -> indices of queries and of their targets, min(Q, M) each."""
    from scipy.optimize import linear_sum_assignment

    ce, dice = pairwise(masks, targets)
    probability = classes.float().softmax(-1)[:, targets.classes]
    cost = MASK_WEIGHT * ce + DICE_WEIGHT * dice - CLASS_WEIGHT * probability
    # a prediction that is not finite fits worst, so that the loss, not the matching, reports it
    queries, found = linear_sum_assignment(torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=1e6).cpu().numpy())
    return torch.from_numpy(queries).to(masks.device), torch.from_numpy(found).to(masks.device)


def mask_loss(classes: Tensor, masks: Tensor, targets: Sequence[MaskTargets]) -> dict[str, Tensor]:
    """Class logits (B, Q, K + 1), the last for nothing, and mask logits (B, Q, h, w) -> the loss.

    {"loss": the weighted sum, "mask", "dice": mean per target, "class": mean per query, before their weights}. Images
    without a counted pixel say nothing, and give a gradient of 0.
    """
    nothing = classes.shape[-1] - 1
    chosen = classes.new_full(classes.shape[:2], nothing, dtype=torch.int64)
    ce, dice = [classes.new_zeros(0)], [classes.new_zeros(0)]
    for i, target in enumerate(targets):
        queries, found = match(classes[i], masks[i], target)
        chosen[i, queries] = target.classes[found]
        pairs = MaskTargets(target.masks[found], target.classes[found], target.weight)
        for kept, losses in zip((ce, dice), pairwise(masks[i, queries], pairs), strict=True):
            kept.append(losses.diagonal())
    weight = torch.ones(nothing + 1, device=classes.device)
    weight[nothing] = NOTHING_WEIGHT
    says = weight[chosen] * torch.tensor([bool(len(t.classes)) for t in targets], device=classes.device)[:, None]
    each = F.cross_entropy(classes.float().transpose(1, 2), chosen, reduction="none")
    count = max(1, sum(len(losses) for losses in ce))
    parts = {
        "mask": torch.cat(ce).sum() / count,
        "dice": torch.cat(dice).sum() / count,
        "class": (each * says).sum() / says.sum().clamp_min(torch.finfo(torch.float32).tiny),
    }
    total = MASK_WEIGHT * parts["mask"] + DICE_WEIGHT * parts["dice"] + CLASS_WEIGHT * parts["class"]
    return {"loss": total, **{name: part.detach() for name, part in parts.items()}}
