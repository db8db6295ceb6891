"""RepAdapter: a linear bottleneck before attention and before the MLP, which the next layers take in.

Luo et al., "Towards Efficient Visual Adaption via Structural Re-parameterization", https://arxiv.org/abs/2302.08106.
"""

from collections.abc import Sequence

from torch import nn

from vfmadapt.adapters._affine import READERS, AffineBottleneck, check_bottleneck, each, fold_before, input_widths
from vfmadapt.contracts import Adapter, BackboneSpec, Merger, OnInput, Site, UserError


class RepAdapter(Adapter):
    """An affine bottleneck on what attention and MLP read, after the norms: x <- x + s (B drop(A x + a) + b).

    B is block-diagonal: each of `groups` parts of the bottleneck feeds its own part of the channels. The frozen network
    until trained. 239,808 parameters on ViT-B with the published sizes.

    Args:
        spec: the backbone's; blocks may differ in width.
        dim: width of each bottleneck, a multiple of `groups`.
        groups: blocks of B; the channels must be a multiple of it.
        scale: s; published values were searched per task.
        dropout: share of a bottleneck's values that training drops.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = ""

    def __init__(
        self, spec: BackboneSpec, *, dim: int = 8, groups: int = 2, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_bottleneck("repadapter", scale, dropout)
        if dim < 1 or groups < 1:
            raise UserError(f"repadapter: dim={dim} groups={groups} must be at least 1 each (published: 8 and 2)")
        widths = {role: input_widths(spec, role) for role in READERS}
        if odd := [n for n in (dim, *widths["attn"], *widths["fc1"]) if n % groups]:
            raise UserError(
                f"repadapter: groups={groups} does not divide {odd[0]}; dim and the channels must be multiples of it"
            )
        self.bottlenecks = nn.ModuleDict()
        for role, found in widths.items():
            self.bottlenecks[role] = nn.ModuleList(
                AffineBottleneck(n, n, dim, scale=scale, dropout=dropout, groups=groups) for n in found
            )

    def sites(self) -> Sequence[Site]:
        """Two per block."""
        return [OnInput(role, index, bottleneck.residual) for role, index, bottleneck in each(self.bottlenecks)]

    def merge(self, into: Merger) -> None:
        """W <- W (I + M), b <- b + W c in q, k, v and fc1."""
        for role, index, bottleneck in each(self.bottlenecks):
            fold_before(into, role, index, bottleneck)
