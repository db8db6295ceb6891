"""PEGO: a group of low-rank pairs on q and v that a loss keeps orthogonal to the frozen weight and to one another.

Hu et al., "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain
Generalization", https://arxiv.org/abs/2407.15085.
"""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vfmadapt.adapters._lora import LowRank
from vfmadapt.adapters._per_linear import PerLinear
from vfmadapt.contracts import Adapter, Backbone, BackboneSpec, Merger, OnLinear, Site, UserError

ROLES = ("q", "v")


class Pego(Adapter):
    """y + sum_n B_n A_n x at q and v of every block, and a loss on the pairs.

    The loss is weight * sum over layers of sum_n |W_0 (B_n A_n)^T| + sum_{n<m} |B_n A_n (B_m A_m)^T|, |.| the sum of
    absolute entries and not their mean, as published. So it grows with the square of the width, and the published
    weight is for 768 channels; for others set weight = 1e-3 (768 / width)^2 to weigh every entry as much.

    The identity when new: B_n = 0. 589,824 parameters for ViT-B with four pairs of rank 4, as published. A group is
    stored as one pair of rank group * rank, the same function in one pass; `weight` 0 makes that plain LoRA.

    Args:
        spec: the backbone's.
        group: number N of pairs (published: 4; 2 for PACS).
        rank: of each pair (published: 4).
        weight: of the loss (published: 1e-3).

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = ""

    def __init__(self, spec: BackboneSpec, *, group: int = 4, rank: int = 4, weight: float = 1e-3) -> None:
        super().__init__()
        for name, value, published in (("group", group, 4), ("rank", rank, 4)):
            if value < 1:
                raise UserError(f"pego: {name}={value} must be at least 1 (published: {published})")
        if weight < 0:
            raise UserError(f"pego: weight={weight} must not be negative (published: 0.001); 0 switches the loss off")
        self.group, self.weight = group, weight
        self.layers = PerLinear(spec, ROLES, partial(LowRank, rank=group * rank, scale=1.0))
        # the backbone's parameters and their rows; in a list, so that they are not this module's own
        self._frozen: list[tuple[Tensor, slice]] = []

    def bind(self, backbone: Backbone) -> None:
        """Remember which frozen weights the loss compares with."""
        places = [backbone.place(role, index) for role, index, _ in self.layers.each()]
        self._frozen = [
            (place.module.get_parameter("weight"), slice(*place.rows) if place.rows is not None else slice(None))
            for place in places
        ]

    def sites(self) -> Sequence[Site]:
        """The q and v layers of every block."""
        return [OnLinear(role, index, layer.forward) for role, index, layer in self.layers.each()]

    def aux_loss(self) -> Tensor | None:
        """The weighted loss, or None where its weight is 0."""
        if not self.weight:
            return None
        base, mutual = self.orthogonality()
        return self.weight * (base + mutual)

    def orthogonality(self) -> tuple[Tensor, Tensor]:
        """The loss before its weight: (pairs against the frozen weights, pairs against one another)."""
        base = mutual = torch.zeros((), device=self._frozen[0][0].device)
        for (_, _, layer), (weight, rows) in zip(self.layers.each(), self._frozen, strict=True):
            pairs = list(zip(layer.down.chunk(self.group), layer.up.chunk(self.group, dim=1), strict=True))
            for down, up in pairs:
                base = base + _absolute_sum(weight[rows] @ down.T, up)
            for (down, up), (other_down, other_up) in combinations(pairs, 2):
                mutual = mutual + _absolute_sum(up @ (down @ other_down.T), other_up)
        return base, mutual

    def merge(self, into: Merger) -> None:
        """Add every group's product to its weight."""
        for role, index, layer in self.layers.each():
            into.add(role, index, layer.delta_weight())


def _absolute_sum(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the absolute entries of L R^T, from (out, r) each.

    Absolute values need the entries, so the (out, out) product is formed, but only one at a time: backward forms it
    again instead of keeping all of them.
    """
    total: Tensor = checkpoint(_product_sum, left, right, use_reentrant=False)
    return total


def _product_sum(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.T).abs().sum()
