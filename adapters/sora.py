"""SoRA: low-rank updates whose rank is found by a sparse gate.

Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", https://arxiv.org/abs/2311.11696.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters._lora import LowRank
from vfmadapt.contracts import Adapter, BackboneSpec, Merger, OnLinear, Site, UserError


class SoRA(Adapter):
    """Low-rank updates of q and v with a gate per direction: y + alpha / rank * up (g * (down x)).

    Training adds `penalty` * mean |g| to the loss and after every optimiser step takes `threshold` off each |g|, down
    to zero (a soft threshold), so that gates die; `pruned` gives what is left. Identity when new. 295,104 parameters on
    ViT-B with rank 8. Not reproduced from the release (TsinghuaC3I/SoRA): its sequence of in-place steps also zeroes
    what the threshold has left below itself, all |g| < 2 * `threshold`.

    Args:
        spec: the backbone's.
        rank: directions per layer before any gate dies.
        alpha: the update is scaled by alpha / rank.
        penalty: weight of the gates' mean absolute value in the loss (lambda 1).
        threshold: of the step on the gates (lambda 2), itself and not times the learning rate.
        published: the release's step on the gates.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = ""

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        penalty: float = 10.0,
        threshold: float = 3e-4,
        published: bool = False,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"sora: rank={rank} must be at least 1 (published: 8)")
        if not 0 < alpha < float("inf"):
            raise UserError(f"sora: alpha={alpha} must be above 0; alpha=rank scales by 1")
        if not (0 <= penalty < float("inf") and 0 <= threshold < float("inf")):
            raise UserError(
                f"sora: penalty={penalty} threshold={threshold} must be at least 0 (published: 10 and 3e-4)"
            )
        self.penalty, self.threshold, self.published = penalty, threshold, published
        self.updates = nn.ModuleDict()
        for role in ("q", "v"):
            self.updates[role] = nn.ModuleList(Gated(*widths, rank, scale=alpha / rank) for widths in spec.widths(role))

    def sites(self) -> Sequence[Site]:
        """Two per block."""
        return [OnLinear(role, index, pair.forward) for role, index, pair in self._pairs()]

    def aux_loss(self) -> Tensor:
        """Penalty on the gates of all layers together."""
        return self.penalty * torch.cat([pair.gate for _, _, pair in self._pairs()]).abs().mean()

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """The soft threshold: g <- sign(g) max(|g| - threshold, 0)."""
        for _, _, pair in self._pairs():
            gate = F.softshrink(pair.gate, self.threshold)
            if self.published:
                gate = gate * (gate.abs() >= self.threshold)
            pair.gate.copy_(gate)

    def pruned(self) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """The updates as plain factors: {(role, block): (down (r, in), up (out, r))}, r the gates that are not zero."""
        found = {}
        for role, index, pair in self._pairs():
            alive = pair.gate != 0
            found[role, index] = pair.down[alive], pair.scale * (pair.up * pair.gate)[:, alive]
        return found

    def merge(self, into: Merger) -> None:
        """Add what is left of the updates."""
        for (role, index), (down, up) in self.pruned().items():
            into.add(role, index, up @ down)

    def _pairs(self) -> Iterator[tuple[str, int, "Gated"]]:
        for role, stack in self.updates.items():
            for index, pair in enumerate(cast(nn.ModuleList, stack)):
                yield role, index, cast(Gated, pair)


class Gated(LowRank):
    """x -> scale * up (g * (down x)), g drawn from N(0, 1)."""

    def __init__(self, width_in: int, width_out: int, rank: int, *, scale: float) -> None:
        super().__init__(width_in, width_out, rank, scale=scale)
        self.gate = nn.Parameter(torch.randn(rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(self.scale * self.gate * F.linear(x, self.down), self.up)
