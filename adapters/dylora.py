"""DyLoRA: one low-rank update that can be used at every rank.

Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation", https://arxiv.org/abs/2210.07558.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters._lora import LowRank
from vfmadapt.contracts import Adapter, BackboneSpec, Merger, OnLinear, Site, UserError


class DyLoRA(Adapter):
    """Low-rank updates of q and v of which every step trains the first b directions, b drawn from 1 to `rank`.

    With them alone the update is alpha / b * up[:, :b] down[:b], as the release's factor sqrt(rank / b) on each side of
    alpha / rank has it. All blocks share a step's b; the first step trains the full rank, `after_step` draws the next.
    Evaluation uses `rank_used`, which `use_rank` changes without training. Identity when new. 294,912 parameters on
    ViT-B with rank 8.

    Args:
        spec: the backbone's.
        rank: the largest one.
        alpha: the update is scaled by alpha / rank.
        rank_used: in evaluation and in merged weights; `rank` by default.
        frozen: train the b-th direction alone, the ones before it only take part.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = ""
    drawn: Tensor

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        rank_used: int | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"dylora: rank={rank} must be at least 1 (published: 8)")
        if not 0 < alpha < float("inf"):
            raise UserError(f"dylora: alpha={alpha} must be above 0 (published: 16)")
        self.rank, self.frozen = rank, frozen
        self.use_rank(rank if rank_used is None else rank_used)
        self.updates = nn.ModuleDict()
        for role in ("q", "v"):
            self.updates[role] = nn.ModuleList(
                LowRank(*widths, rank, scale=alpha / rank) for widths in spec.widths(role)
            )
        # a buffer, so that training goes on with the same b after a restart and all processes share it
        self.register_buffer("drawn", torch.tensor(rank))

    def use_rank(self, rank: int) -> None:
        """Evaluate, and merge, with the first `rank` directions; raises UserError where there are not so many."""
        if not 1 <= rank <= self.rank:
            raise UserError(f"dylora: rank_used={rank} must be from 1 to rank={self.rank}")
        self.rank_used = rank

    def after_step(self, step: int, total: int) -> None:
        """Draw the next step's b."""
        self.drawn.random_(1, self.rank + 1)

    def sites(self) -> Sequence[Site]:
        """Two per block."""
        return [OnLinear(role, index, partial(self.delta, pair)) for role, index, pair in self._pairs()]

    def merge(self, into: Merger) -> None:
        """Add the update of rank `rank_used`."""
        for role, index, pair in self._pairs():
            first = slice(self.rank_used)
            into.add(role, index, self.rank / self.rank_used * pair.scale * pair.up[:, first] @ pair.down[first])

    def delta(self, pair: LowRank, x: Tensor) -> Tensor:
        """One layer's update of x (..., in).

        Directions are multiplied by 0 instead of left out: every parameter is part of every step's graph, and shapes
        stay the same.
        """
        rank = self.drawn if self.training else self.rank_used
        direction = torch.arange(1, self.rank + 1, device=x.device)
        gate = (direction <= rank) * (self.rank / rank)
        down: Tensor = pair.down
        up: Tensor = pair.up
        if self.frozen and self.training:
            trained = direction == rank
            down = torch.where(trained[:, None], down, down.detach())
            up = torch.where(trained, up, up.detach())
        hidden = F.linear(x, down)
        return F.linear(pair.scale * gate.to(hidden.dtype) * hidden, up)

    def _pairs(self) -> Iterator[tuple[str, int, LowRank]]:
        for role, stack in self.updates.items():
            for index, pair in enumerate(cast(nn.ModuleList, stack)):
                yield role, index, cast(LowRank, pair)
