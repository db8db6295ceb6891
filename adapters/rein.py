"""Rein: learnt tokens that every block's features attend to.

Wei et al., "Stronger, Fewer, & Superior: Harnessing Vision Foundation Models for Domain Generalized Semantic
Segmentation", https://arxiv.org/abs/2312.04265.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor, nn

from vfmadapt.contracts import Adapter, AfterBlock, BackboneSpec, Site, UserError

INITIAL_SCALE = 1e-3
INITIAL_PATCH = 16
"""Published: the tokens' range is that of a patch embedding's filters of this side, whatever the backbone's patches."""


class Rein(Adapter):
    """x <- x + s ((A V + x) W_f + b_f) after every block; A = softmax(x T^T / sqrt(C)), V = T W_t + b_t.

    T (m, C) are the block's own tokens. The first token only draws attention away: its column of A and its row of V
    are left out. W_t, W_f, their biases and s are shared by all blocks of one width (one set per stage where widths
    differ, as in Hiera). Prefix tokens pass untouched.

    Not the identity when new: s starts at 0.001. 2,990,081 parameters for DINOv2-L WITH the query link (1,741,569 for
    -B, 684,033 for -S; 5,016,065 for -L with full-rank tokens); 2,530,817 for -L without it, which is the default.

    Args:
        spec: the backbone's.
        tokens: m, at least 2 (published: 100).
        rank: of each block's T = A B (published: 16); null for full tokens.
        link_queries: build the link of `queries`. Only for a head that calls it: nothing else gives it a gradient.
        query_dim: channels of the linked queries (published: 256).

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = "which tokens a patch attends to depends on the image"

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        tokens: int = 100,
        rank: int | None = 16,
        link_queries: bool = False,
        query_dim: int = 256,
    ) -> None:
        super().__init__()
        if tokens < 2:
            raise UserError(f"rein: tokens={tokens} must be at least 2, since the first adds nothing (published: 100)")
        if rank is not None and rank < 1:
            raise UserError(f"rein: rank={rank} must be at least 1 (published: 16), or null for full tokens")
        if query_dim < 1:
            raise UserError(f"rein: query_dim={query_dim} must be at least 1 (published: 256)")
        widths = tuple(dict.fromkeys(spec.dims))
        self.refinements = nn.ModuleDict(
            {str(c): Refinement(c, spec.dims.count(c), tokens=tokens, rank=rank) for c in widths}
        )
        self.link = QueryLink(widths, query_dim) if link_queries else None
        self._blocks = [(str(c), spec.dims[:i].count(c)) for i, c in enumerate(spec.dims)]

    def sites(self) -> Sequence[Site]:
        """One per block."""
        return [
            AfterBlock(i, partial(self._refinement(width).refine, number))
            for i, (width, number) in enumerate(self._blocks)
        ]

    def queries(self) -> Tensor:
        """The tokens of all blocks as queries (m, query_dim) of a mask transformer's decoder.

        Raises:
            UserError: the adapter was built without the link.
        """
        if self.link is None:
            raise UserError("rein: there is no query link; build the adapter with link_queries=true")
        link: Tensor = self.link([self._refinement(width).tokens(number) for width, number in self._blocks])
        return link

    def _refinement(self, width: str) -> "Refinement":
        found = self.refinements[width]
        assert isinstance(found, Refinement)
        return found


class Refinement(nn.Module):
    """The tokens of the blocks of one width, and what these blocks share."""

    def __init__(self, channels: int, blocks: int, *, tokens: int, rank: int | None) -> None:
        super().__init__()
        shapes, fan = [(blocks, tokens, channels)], float(channels)
        if rank is not None:
            shapes, fan = [(blocks, tokens, rank), (blocks, rank, channels)], math.sqrt(channels * rank)
        bound = math.sqrt(6 / (3 * INITIAL_PATCH**2 + fan))
        self.factors = nn.ParameterList(torch.empty(shape).uniform_(-bound, bound) for shape in shapes)
        self.token_map = nn.Linear(channels, channels)
        self.delta_map = nn.Linear(channels, channels)
        self.scale = nn.Parameter(torch.tensor(INITIAL_SCALE))

    def tokens(self, number: int) -> Tensor:
        """Tokens (m, C) of the block with this number among those of its width."""
        return reduce(torch.matmul, [factor[number] for factor in self.factors])

    def refine(self, number: int, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        tokens = self.tokens(number)
        attention = (x @ tokens.T * x.shape[-1] ** -0.5).softmax(-1)
        found = attention[..., 1:] @ self.token_map(tokens[1:])
        return x + self.scale * self.delta_map(found + x)


class QueryLink(nn.Module):
    """Tokens of all blocks -> queries: the largest, the mean and the last of their projections, mixed."""

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({str(c): nn.Linear(c, dim) for c in widths})
        self.mix = nn.Linear(3 * dim, dim)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """(m, C) of each block -> (m, dim)."""
        each = torch.stack([self.projections[str(t.shape[-1])](t) for t in tokens])
        three = torch.stack([each.amax(0), each.mean(0), each[-1]], dim=-1)  # side by side channel by channel
        mixed: Tensor = self.mix(three.flatten(-2))
        return mixed
