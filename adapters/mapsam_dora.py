"""MapSAM's DoRA: q and v weights as a trained length and a low-rank direction of every input column.

Xia et al., "MapSAM: Adapting Segment Anything Model for Automated Feature Detection in Historical Maps",
https://arxiv.org/abs/2411.06971; Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation",
https://arxiv.org/abs/2402.09353, equation 5.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vfmadapt.adapters._per_linear import PerLinear
from vfmadapt.contracts import Adapter, Backbone, BackboneSpec, Merger, OnWeight, Site, UserError

ROLES = ("q", "v")
SMALLEST = 1e-12  # a column of zeros has no direction and stays one


class MapSamDora(Adapter):
    """W <- m V / |V| with V = W + U D at q and v of every block, |.| the norm of each input column.

    The norm is over the output rows as in DoRA's paper, and the gradient goes through it; `adapter=dora` is PEFT's: a
    norm per output row, a constant in the gradient. The identity when new: D = 0 and m = |W|. 165,888 parameters on
    SAM's ViT-B with rank 4.

    Args:
        spec: the backbone's.
        rank: of the direction's change (published: 4).

    Raises:
        UserError: a rank below 1, or a backbone without q and v.
    """

    unmergeable = ""

    def __init__(self, spec: BackboneSpec, *, rank: int = 4) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"mapsam_dora: rank={rank} must be at least 1 (published: 4)")
        self.layers = PerLinear(spec, ROLES, partial(ColumnDora, rank=rank))

    def bind(self, backbone: Backbone) -> None:
        """Start from the lengths of the frozen columns."""
        for role, index, layer in self.layers.each():
            place = backbone.place(role, index)
            weight = place.module.get_parameter("weight").detach()
            layer.magnitude.data.copy_(lengths(weight[slice(*place.rows)] if place.rows is not None else weight))

    def sites(self) -> Sequence[Site]:
        """The q and v weights of every block."""
        return [OnWeight(role, index, layer.forward) for role, index, layer in self.layers.each()]

    def merge(self, into: Merger) -> None:
        """Put the adapted weights in the place of the frozen ones."""
        for role, index, layer in self.layers.each():
            into.put(role, index, layer(into.weight(role, index)))


class ColumnDora(nn.Module):
    """One weight (out, in): `up` (out, rank) is random and `down` (rank, in) zero when new, as published.

    Args:
        width_in, width_out: of the frozen layer.
        rank: at least 1; the caller checks it.
    """

    def __init__(self, width_in: int, width_out: int, *, rank: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(width_out, rank) / rank**0.5)
        self.down = nn.Parameter(torch.zeros(rank, width_in))
        self.magnitude = nn.Parameter(torch.ones(1, width_in))

    def forward(self, weight: Tensor) -> Tensor:
        """Frozen weight -> adapted weight, both (out, in)."""
        direction = weight + self.up @ self.down
        return direction * (self.magnitude / lengths(direction).clamp_min(SMALLEST))


def lengths(weight: Tensor) -> Tensor:
    """Norm of every column of (out, in): (1, in)."""
    return torch.linalg.vector_norm(weight, dim=0, keepdim=True)
