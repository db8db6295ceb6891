"""FLoRA: updates of frozen weights as a small core tensor between one factor per axis (a Tucker decomposition).

Si et al., "FLoRA: Low-Rank Core Space for N-dimension", https://arxiv.org/abs/2405.14739. Not the federated FLoRA.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters._per_linear import PerLinear
from vfmadapt.contracts import Adapter, BackboneSpec, Merger, OnLinear, Site, UserError


class FloraTucker(Adapter):
    """y + s U_out G^T U_in^T dropout(x) at linear layers: a trained core G (r_in, r_out) between two trained factors.

    The identity when new: G = 0. r_in r_out + in r_in + out r_out parameters a layer; `TuckerUpdate` also gives the
    update of a convolution's kernel, 4,108 parameters for 64 -> 128 channels, 3 x 3, ranks (16, 16, 2, 2).

    Not reproduced from github.com/SJTU-DeepVisionLab/FLoRA: no merge, though the method is linear; grouped convolutions
    that fail (sized by all input channels); an embedding layer that its own assertion refuses.

    Args:
        spec: the backbone's.
        roles: linear layers that are adapted, in every block.
        ranks: (r_in, r_out) of the core (its example: 16 and 16).
        scale: factor s on the update (its example: 4).
        dropout: share of the update's input that is dropped in training (its example: 0.01).

    Raises:
        UserError: a setting out of its range, or a role that the backbone lacks.
    """

    unmergeable = ""

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        roles: Sequence[str] = ("qkv", "proj", "fc1", "fc2"),
        ranks: tuple[int, int] = (16, 16),
        scale: float = 4.0,
        dropout: float = 0.01,
    ) -> None:
        super().__init__()
        if len(ranks) != 2 or min(ranks) < 1:
            raise UserError(
                f"flora_tucker: ranks={list(ranks)} must be two whole numbers from 1, r_in and r_out, as in [16,16]"
            )
        if scale == 0:
            raise UserError("flora_tucker: scale=0 switches the update off; give another number (its example: 4)")
        if not 0 <= dropout < 1:
            raise UserError(f"flora_tucker: dropout={dropout} must be from 0 to below 1 (its example: 0.01)")
        self.layers = PerLinear(spec, roles, partial(_make, ranks, scale, dropout))

    def sites(self) -> Sequence[Site]:
        """Every adapted layer."""
        return [OnLinear(role, index, layer.forward) for role, index, layer in self.layers.each()]

    def merge(self, into: Merger) -> None:
        """Add every layer's update to its weight."""
        for role, index, layer in self.layers.each():
            into.add(role, index, layer.delta())


class TuckerUpdate(nn.Module):
    """s G x_1 U_1 x_2 U_2 ..., for a linear weight or a kernel: zero when new, as the core is.

    Args:
        sizes: (in, out) of a linear layer, (in, out, kh, kw) of an ungrouped convolution.
        ranks: the core's size along each of these axes.
        scale: factor s.
        dropout: share of the input of `forward` that is dropped in training.
    """

    def __init__(self, sizes: Sequence[int], ranks: Sequence[int], *, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.core = nn.Parameter(torch.zeros(*ranks))
        self.factors = nn.ParameterList(torch.empty(size, rank) for size, rank in zip(sizes, ranks, strict=True))
        for factor in self.factors:
            nn.init.kaiming_normal_(factor, a=math.sqrt(3))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to a linear layer's output: (..., in) -> (..., out), without the update's own matrix."""
        from_inputs, to_outputs = self.factors
        return F.linear(self.scale * (self.dropout(x) @ from_inputs @ self.core), to_outputs)

    def delta(self) -> Tensor:
        """What is added to the weight: (out, in) or (out, in, kh, kw)."""
        full = self.scale * self.core
        for factor in self.factors:  # each turns the first axis into the last: after all of them the order is the old
            full = torch.tensordot(full, factor, dims=([0], [1]))
        return full.transpose(0, 1)


def _make(ranks: tuple[int, int], scale: float, dropout: float, width_in: int, width_out: int) -> TuckerUpdate:
    return TuckerUpdate((width_in, width_out), ranks, scale=scale, dropout=dropout)
