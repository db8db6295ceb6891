"""Cloud-Adapter: a small convolutional network reads the image, and every block's tokens attend to what it saw.

Zou et al., "Adapting Vision Foundation Models for Robust Cloud Segmentation in Remote Sensing Images",
https://arxiv.org/abs/2411.13127. The attention is in `vfmadapt.kernels.lowrank_attention`; prefix tokens (class,
registers) pass untouched.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters._layers import resolve_layers
from vfmadapt.contracts import Adapter, AfterBlock, BackboneSpec, OnImage, Site, UserError
from vfmadapt.kernels.lowrank_attention import lowrank_attention, lowrank_attention_direct

HEADS, HEAD_WIDTH = 8, 64  # whatever the backbone's, as published
HALVINGS = 4  # of the image, 1/16 in the end


class Cloud(Adapter):
    """x + A(x, c) after each of `layers`: cross-attention of the grid x to a context c that is read from the image.

    c is made once per image by convolutions, (B, context_dim, H / 16, W / 16), and resized bilinearly to the grid of
    tokens; A has 8 heads of 64 channels, projections of low rank without biases, no norm, no scale. Not the identity
    when new: no layer starts at zero, as published. Batch norm uses the batch's statistics in training (a batch needs
    more than one cell of c), and its running ones, which the adapter file holds, in evaluation.

    DINOv2-L with the published settings: 1,828,425 parameters, 206,409 of them the convolutions. As in the original,
    the 3 x 3 convolutions of its "depthwise-separable" units are dense (it passes the channel count as group size), and
    no activation stands between their norms, whatever is said of a ReLU: its counts and numbers come out only so.

    Not reproduced: square grids only and a class token taken for granted (the original's `int(math.sqrt(N))`).

    Args:
        spec: the backbone's; blocks may differ in width.
        rank: of each of the four projections (published: 16; ablation 4 to 32).
        context_dim: channels of the context (published: 64; ablation 16 to 128).
        layers: blocks with an interaction, negative ones counted from the last; all by default, as published.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = "its update is attention to a context that depends on the image"

    def __init__(
        self, spec: BackboneSpec, *, rank: int = 16, context_dim: int = 64, layers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if rank < 1 or context_dim < 1:
            raise UserError(
                f"cloud: rank={rank} and context_dim={context_dim} must be at least 1 (published: 16 and 64)"
            )
        used = resolve_layers(layers, spec.depth, "cloud: layers")
        self.perception = SpatialPerception(spec.bands, context_dim)
        self.layers = nn.ModuleDict({str(i): Interaction(spec.dims[i], context_dim, rank) for i in used})

    def sites(self) -> Sequence[Site]:
        """The image, and the output of each block of `layers`."""
        after = [AfterBlock(int(i), layer.forward, context=True) for i, layer in self.layers.items()]
        return [OnImage(self.perception.forward), *after]


class SpatialPerception(nn.Module):
    """The context: the image at full, 1/2, ... 1/16 of its size, each averaged down to the last and summed."""

    def __init__(self, bands: int, channels: int) -> None:
        super().__init__()
        self.first = Unit(bands, channels, kernel=1, stride=1, groups=bands)
        self.levels = nn.ModuleList(
            Unit(channels, channels, kernel=3, stride=1 if level == 0 else 2) for level in range(HALVINGS + 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image (B, bands, H, W) -> (B, channels, H / 16, W / 16), rounded up."""
        features, found = self.first(image), []
        for level in self.levels:
            features = level(features)
            found.append(features)
        context: Tensor = sum(F.adaptive_avg_pool2d(f, features.shape[-2:]) for f in found)  # type: ignore[assignment]
        return context


class Unit(nn.Module):
    """A spatial convolution, batch norm, a 1 x 1 convolution, batch norm; a skip where the shape stays."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.skips = stride == 1 and inputs == outputs
        self.spatial = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(inputs)
        self.mix = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        for conv in (self.spatial, self.mix):
            fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
            nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y: Tensor = self.norm2(self.mix(self.norm1(self.spatial(x))))
        return x + y if self.skips else y


class Interaction(nn.Module):
    """x + A(x, c) for one block; each projection is a pair of linear layers with `rank` channels between them."""

    def __init__(self, channels: int, context_dim: int, rank: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.query = _projection(channels, rank, inner)
        self.key = _projection(context_dim, rank, inner)
        self.value = _projection(context_dim, rank, inner)
        self.out = _projection(inner, rank, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, h, w, C) and context (B, context_dim, any, any) -> (B, h, w, C)."""
        seen = F.interpolate(context, size=x.shape[1:3], mode="bilinear").flatten(2).transpose(1, 2)
        narrow = (self.query[0](x).flatten(1, 2), self.key[0](seen), self.value[0](seen))
        update: Tensor = self.out[1](lowrank_attention(*narrow, *self.wide(), heads=HEADS))
        return x + update.view_as(x)

    def wide(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights at the heads' side: (512, rank) of query, key and value, (rank, 512) of the output."""
        found = self.query[1].weight, self.key[1].weight, self.value[1].weight, self.out[0].weight
        return found  # type: ignore[return-value]  # mypy takes module attributes for modules


def benchmark_pair(
    adapter: Cloud, batch: int, grid: tuple[int, int]
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]:
    """What tools/benchmark.py times: one block's attention, its direct form, and random inputs for both.

    What surrounds it, the projections to `rank` channels and back, is the same in both and not timed.
    """
    layer = next(iter(adapter.layers.values()))
    assert isinstance(layer, Interaction)
    weights = layer.wide()
    shape = batch, grid[0] * grid[1], weights[0].shape[1]
    narrow = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    fast, direct = partial(lowrank_attention, heads=HEADS), partial(lowrank_attention_direct, heads=HEADS)
    return fast, direct, (*narrow, *weights)


def _projection(inputs: int, rank: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False))
