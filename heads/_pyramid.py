"""Four maps, each half as fine as the one before, from any backbone: what heads made for hierarchies read."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, UserError
from vfmadapt.heads._layers import LayerNorm2d
from vfmadapt.heads._resize import resolve_layers, spread

LEVELS = 4


class Pyramid(nn.Module):
    """Normalised maps of some blocks, of a plain ViT at 1/4, 1/2, 1 and 2 of its stride.

    Features come un-normalised, so each block's go through a LayerNorm. A plain ViT has one stride: the finer maps are
    made by transposed convolutions that halve the channels, the coarser one by pooling (ViTDet's simple pyramid, Li et
    al. 2022, https://arxiv.org/abs/2203.16527, §3), but each from a block of its own, the finest from the earliest. A
    hierarchy's own maps stay as they are.

    `dims[i]`, `strides[i]`: channels of map i, and pixels per cell, whole or not.

    Args:
        spec: the backbone's.
        layers: blocks to read; by default four evenly spaced, or the last of each stage. Where a plain ViT gives fewer
            than four, its last serves several maps.
        maps: which of the maps to make, 0 the finest, -1 the coarsest; by default all.

    Raises:
        UserError: no such block, or more than four of a plain ViT.
    """

    def __init__(self, spec: BackboneSpec, layers: Sequence[int] | None, *, maps: Sequence[int] | None = None) -> None:
        super().__init__()
        blocks = resolve_layers(spec, default_layers(spec) if layers is None else tuple(layers))
        plain = len({spec.strides[i] for i in blocks}) == 1
        if plain and len(blocks) > LEVELS:
            raise UserError(f"head.layers={list(blocks)}: {spec.name} has one stride; give at most {LEVELS} blocks")
        every = range(LEVELS if plain else len(blocks))
        chosen = [every[i] for i in (every if maps is None else maps)]
        read = [blocks[min(i, len(blocks) - 1)] for i in chosen]
        factors = [2.0 ** (2 - i) if plain else 1.0 for i in chosen]
        self.layers = tuple(sorted(set(read)))
        self.sources = [self.layers.index(block) for block in read]
        self.dims = tuple(int(spec.dims[block] / max(f, 1)) for block, f in zip(read, factors, strict=True))
        self.strides = tuple(spec.strides[block] / f for block, f in zip(read, factors, strict=True))
        self.norms = nn.ModuleList(LayerNorm2d(spec.dims[i]) for i in self.layers)
        self.resize = nn.ModuleList(_resize(spec.dims[block], f) for block, f in zip(read, factors, strict=True))

    def forward(self, features: Features) -> list[Tensor]:
        """Features of `layers` -> maps (B, dims[i], h_i, w_i), the finest first."""
        grids = [norm(grid) for norm, grid in zip(self.norms, features.grids, strict=True)]
        return [resize(grids[i]) for resize, i in zip(self.resize, self.sources, strict=True)]


def default_layers(spec: BackboneSpec) -> tuple[int, ...]:
    """The last block of each stage of a hierarchy; of a plain ViT four, evenly spaced."""
    last = {stride: i for i, stride in enumerate(spec.strides)}
    return tuple(last.values()) if len(last) > 1 else spread(spec.depth, LEVELS)


def _resize(channels: int, factor: float) -> nn.Module:
    """(B, C, h, w) -> (B, C / factor, h factor, w factor); where it shrinks, C stays and h, w are rounded up."""
    if factor < 1:
        return nn.MaxPool2d(2, ceil_mode=True)
    steps: list[nn.Module] = []
    for i in range(round(math.log2(factor))):
        steps += [LayerNorm2d(channels >> i), nn.GELU()] if i else []
        steps += [nn.ConvTranspose2d(channels >> i, channels >> (i + 1), 2, stride=2)]
    return nn.Sequential(*steps)
