"""The first adapters: a residual bottleneck on the outputs of attention and MLP.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", https://arxiv.org/abs/1902.00751.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import Adapter, BackboneSpec, OnOutput, Site, UserError

INITIAL_STD = 1e-3
"""Published: weights start as a normal distribution cut at two of these."""


class Houlsby(Adapter):
    """y <- y + U GELU(D y + b) + c on the outputs of attention and of the MLP, before each joins the residual stream.

    Not the identity when new, but near it: weights start at about 0.001. 2,379,264 parameters for ViT-B with dim 64.
    The norms stay frozen, where the paper trains them too.

    Args:
        spec: the backbone's; blocks may differ in width.
        dim: width of each bottleneck.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = "a GELU stands between its two layers"

    def __init__(self, spec: BackboneSpec, *, dim: int = 64) -> None:
        super().__init__()
        if dim < 1:
            raise UserError(f"houlsby: dim={dim} must be at least 1 (often 64)")
        self.attention = nn.ModuleList(Bottleneck(channels, dim) for channels in spec.dims)
        self.mlp = nn.ModuleList(Bottleneck(channels, dim) for channels in spec.dims)

    def sites(self) -> Sequence[Site]:
        """Two per block."""
        places = (("proj", self.attention), ("mlp", self.mlp))
        return [OnOutput(role, i, layer.forward) for role, layers in places for i, layer in enumerate(layers)]


class Bottleneck(nn.Module):
    """y + U GELU(D y + b) + c."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, dim), nn.Linear(dim, channels)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, y: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        delta: Tensor = self.up(F.gelu(self.down(y)))
        return y + delta
