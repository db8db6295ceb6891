"""The low-rank pair that LoRA and its relatives add to a frozen linear layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """x -> scale * up down x, zero when new: `up` starts at zero, `down` Kaiming-uniform with a = sqrt(5).

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685.

    Args:
        width_in, width_out: of the frozen layer.
        rank: at least 1; the caller checks it.
        scale: factor on the product, alpha / rank in LoRA.
    """

    def __init__(self, width_in: int, width_out: int, rank: int, *, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, width_in))
        self.up = nn.Parameter(torch.zeros(width_out, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the frozen layer's output: (..., in) -> (..., out)."""
        return F.linear(self.scale * F.linear(x, self.down), self.up)

    def delta_weight(self) -> Tensor:
        """What is added to the frozen layer's weight: (out, in)."""
        return self.scale * self.up @ self.down
