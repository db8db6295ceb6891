"""SSF: every feature is scaled and shifted, channel by channel.

Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
https://arxiv.org/abs/2210.08823.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vfmadapt.contracts import Adapter, BackboneSpec, Merger, OnOutput, Site

INITIAL_SPREAD = 0.02  # standard deviation of scales around 1 and shifts around 0, as published


class SSF(Adapter):
    """y <- scale * y + shift, per channel, after every operation of the backbone.

    The operations: patch embedding, and in each block both norms, the fused q, k and v (or each, where they are apart),
    the attention's projection, fc1 (before the activation) and fc2; also the final norm where features come through it.
    Not the identity when new: scales are drawn around 1, shifts around 0, as published.

    205,824 parameters for ViT-B/16 with its final norm. A bias that the backbone adds outside the layer is not scaled.
    Not reproduced from the release (dongzelian/SSF): it guesses the axis of the channels, last one first, so a map
    (B, C, H, W) as wide as it has channels is scaled along its width.

    Args:
        spec: the backbone's.
    """

    unmergeable = ""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.patch_embed = ScaleShift(spec.embed_dim)
        self.blocks = nn.ModuleList(_block(spec, i) for i in range(spec.depth))
        self.norm = ScaleShift(spec.dims[-1]) if spec.final_norm else None

    def sites(self) -> Sequence[Site]:
        """One per operation, on its output."""
        return [OnOutput(role, index, layer.forward) for role, index, layer in self.layers()]

    def merge(self, into: Merger) -> None:
        """Fold each scale and shift into the layer before it; raises UserError where that has no bias to shift."""
        for role, index, layer in self.layers():
            weight = into.weight(role, index)
            scaled = weight * layer.scale.view(-1, *(1,) * (weight.ndim - 1))
            into.add(role, index, bias=(layer.scale - 1) * into.bias(role, index) + layer.shift)
            into.put(role, index, scaled)

    def layers(self) -> Iterator[tuple[str, int, "ScaleShift"]]:
        """(role, index of the block, what acts on its output)."""
        yield "patch_embed", 0, self.patch_embed
        for index, block in enumerate(self.blocks):
            for role, layer in cast(nn.ModuleDict, block).items():
                yield role, index, cast(ScaleShift, layer)
        if self.norm is not None:
            yield "norm", 0, self.norm


class ScaleShift(nn.Module):
    """y -> scale * y + shift, one of each per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels).normal_(1, INITIAL_SPREAD))
        self.shift = nn.Parameter(torch.empty(channels).normal_(0, INITIAL_SPREAD))

    def forward(self, y: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return y * self.scale + self.shift


def _block(spec: BackboneSpec, index: int) -> nn.ModuleDict:
    """{role: scale and shift of its output} for a block."""
    attention = ("qkv",) if "qkv" in spec.linears else ("q", "k", "v")
    widths = {role: spec.widths(role)[index] for role in (*attention, "proj", "fc1", "fc2")}
    channels = {"norm1": widths[attention[0]][0], "norm2": widths["fc1"][0]}
    channels |= {role: out for role, (_, out) in widths.items()}
    return nn.ModuleDict({role: ScaleShift(width) for role, width in channels.items()})
