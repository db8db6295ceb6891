"""DPT: tokens of four blocks made maps again, and fused from coarse to fine; for classes and for values like depth.

Ranftl et al. 2021, "Vision Transformers for Dense Prediction", https://arxiv.org/abs/2103.13413, §3; in the form of
Depth Anything (Yang et al. 2024, https://arxiv.org/abs/2401.10891), which leaves class and register tokens aside.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, Head, UserError
from vfmadapt.heads._depth_anything import load_depth_anything
from vfmadapt.heads._layers import LayerNorm2d
from vfmadapt.heads._pyramid import LEVELS, default_layers
from vfmadapt.heads._resize import resolve_layers

FACTORS = (4.0, 2.0, 1.0, 0.5)
"""How much finer than the token grid of a plain ViT each map becomes."""

LAST_WIDTH = 32
"""Channels at the image's own resolution, as published."""


class DPTHead(Head):
    """Reassembled maps of four blocks, fused from coarse to fine by residual units, then K values per pixel.

    Features come un-normalised, so each block's go through a LayerNorm (Depth Anything: the trunk's final norm, for all
    of them). A hierarchy's maps keep their own sizes. Bilinear steps align corners, as published, so that released
    weights mean the same.

    Args:
        spec: the backbone's.
        num_classes: K, logits or values per pixel; no activation follows.
        layers: four blocks; by default evenly spaced, or the last of each stage. Where there are fewer than four, the
            last serves several maps.
        stages: channels of the four maps; by default 1/8, 1/4, 1/2 and all of the trunk's, or a hierarchy's own.
        width: channels of the fusion (published: 64, 128, 256 for ViT-S, -B, -L).
        weights: a checkpoint of Depth Anything, the file that backbone.weights names; its values are inverse depths
            up to scale and shift. Version 2 reads the blocks that are the default (of ViT-L 4, 11, 17 and 23), version
            1 the last four.

    Raises:
        UserError: no such block, more than four blocks, another number of stages, or weights that do not fit.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        num_classes: int,
        layers: Sequence[int] | None = None,
        stages: Sequence[int] | None = None,
        width: int = 128,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.layers = resolve_layers(spec, default_layers(spec) if layers is None else tuple(layers))
        if len(self.layers) > LEVELS or (stages is not None and len(stages) != LEVELS):
            raise UserError(
                f"head.layers={list(self.layers)} head.stages={stages}: give at most {LEVELS} blocks and, for stages, "
                f"{LEVELS} numbers of channels or null"
            )
        self.sources = [min(i, len(self.layers) - 1) for i in range(LEVELS)]
        plain = len({spec.strides[i] for i in self.layers}) == 1
        dims = [spec.dims[self.layers[i]] for i in self.sources]
        if stages is None:
            stages = [max(c >> (LEVELS - 1 - i), 1) for i, c in enumerate(dims)] if plain else dims
        factors = FACTORS if plain else (1.0,) * LEVELS
        self.norms = nn.ModuleList(LayerNorm2d(spec.dims[i], eps=1e-6) for i in self.layers)
        self.reassemble = nn.ModuleList(_reassemble(c, s, f) for c, s, f in zip(dims, stages, factors, strict=True))
        self.project = nn.ModuleList(nn.Conv2d(s, width, 3, padding=1, bias=False) for s in stages)
        self.fusion = nn.ModuleList(_Fusion(width, joined=i < LEVELS - 1) for i in range(LEVELS))
        self.shrink = nn.Conv2d(width, max(width // 2, 1), 3, padding=1)
        self.values = nn.Sequential(
            nn.Conv2d(max(width // 2, 1), LAST_WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(LAST_WIDTH, num_classes, 1)
        )
        if weights is not None:
            load_depth_anything(self, weights)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> logits or values (B, K, H, W)."""
        return self.full(self.fused(features)[-1], features, size)

    def full(self, finest: Tensor, features: Features, size: tuple[int, int]) -> Tensor:
        """The finest of the fused maps -> logits or values (B, K, H, W)."""
        height, width = features.grids[0].shape[2:]
        stride = features.strides[0]
        grown = F.interpolate(
            self.shrink(finest), (height * stride, width * stride), mode="bilinear", align_corners=True
        )
        values: Tensor = self.values(grown)
        return values[..., : size[0], : size[1]]

    def fused(self, features: Features) -> list[Tensor]:
        """Features of `layers` -> the fused maps (B, width, h_i, w_i), from coarse to fine."""
        grids = [norm(grid) for norm, grid in zip(self.norms, features.grids, strict=True)]
        maps = [
            project(reassemble(grids[i]))
            for project, reassemble, i in zip(self.project, self.reassemble, self.sources, strict=True)
        ]
        found: list[Tensor] = []
        for i in reversed(range(LEVELS)):
            height, width = maps[i - 1].shape[2:] if i else (2 * n for n in maps[0].shape[2:])
            found.append(self.fusion[i](maps[i], found[-1] if found else None, (height, width)))
        return found


class _Fusion(nn.Module):
    """A map joined with the coarser one fused before, refined, resized and mixed."""

    def __init__(self, width: int, *, joined: bool) -> None:
        super().__init__()
        self.join = _Residual(width) if joined else None
        self.refine = _Residual(width)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, level: Tensor, coarser: Tensor | None, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w), what was fused so far in that size -> (B, C, *size)."""
        merged = level if self.join is None or coarser is None else coarser + self.join(level)
        grown = F.interpolate(self.refine(merged), size, mode="bilinear", align_corners=True)
        mixed: Tensor = self.mix(grown)
        return mixed


class _Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        changed: Tensor = self.second(torch.relu(self.first(torch.relu(x))))
        return x + changed


def _reassemble(channels: int, width: int, factor: float) -> nn.Sequential:
    """(B, C, h, w) -> (B, width, h factor, w factor), rounded up where it shrinks."""
    resize: nn.Module = nn.Identity()
    if factor > 1:
        resize = nn.ConvTranspose2d(width, width, int(factor), stride=int(factor))
    elif factor < 1:
        resize = nn.Conv2d(width, width, 3, stride=round(1 / factor), padding=1)
    return nn.Sequential(nn.Conv2d(channels, width, 1), resize)
