"""UPerNet on any backbone: pyramid pooling of the coarsest map, a feature pyramid over all.

Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding", https://arxiv.org/abs/1807.10221, §3.1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, Head
from vfmadapt.heads._layers import conv_norm_relu
from vfmadapt.heads._pyramid import Pyramid
from vfmadapt.heads._resize import to_image, upsample_to

POOLED = (1, 2, 3, 6)
"""Cells per side to which the coarsest map is pooled (Zhao et al. 2017, https://arxiv.org/abs/1612.01105)."""


class UPerNetHead(Head):
    """Pyramid pooling on the coarsest of four maps, added from coarse to fine; all side by side at the finest, fused.

    From a plain ViT the maps come by a simple pyramid.

    Args:
        spec: the backbone's.
        num_classes: logits per pixel.
        layers: blocks to read, see `Pyramid`.
        width: channels of the pyramid (published: 512).
        dropout: share of the fused channels that are dropped in training.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        num_classes: int,
        layers: Sequence[int] | None = None,
        width: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(spec, layers)
        self.layers = self.pyramid.layers
        *finer, coarsest = self.pyramid.dims
        self.pools = nn.ModuleList(conv_norm_relu(coarsest, width, 1) for _ in POOLED)
        self.top = conv_norm_relu(coarsest + width * len(POOLED), width, 3)
        self.laterals = nn.ModuleList(conv_norm_relu(c, width, 1) for c in finer)
        self.smooth = nn.ModuleList(conv_norm_relu(width, width, 3) for _ in finer)
        self.fuse = conv_norm_relu(width * (1 + len(finer)), width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> logits (B, K, H, W)."""
        *finer, coarsest = self.pyramid(features)
        strides = self.pyramid.strides
        merged = [*(lateral(m) for lateral, m in zip(self.laterals, finer, strict=True)), self._pool(coarsest)]
        for i in reversed(range(len(finer))):
            merged[i] = merged[i] + upsample_to(merged[i], merged[i + 1], strides[i + 1] / strides[i])
        merged[:-1] = [smooth(m) for smooth, m in zip(self.smooth, merged[:-1], strict=True)]
        merged = [upsample_to(merged[0], m, s / strides[0]) for m, s in zip(merged, strides, strict=True)]
        logits = self.classifier(self.dropout(self.fuse(torch.cat(merged, 1))))
        grid = (features.grids[0].shape[2], features.grids[0].shape[3])
        return to_image(logits, grid, features.strides[0], size)

    def _pool(self, coarsest: Tensor) -> Tensor:
        """The coarsest map with what whole regions of it hold: (B, C, h, w) -> (B, width, h, w)."""
        size = coarsest.shape[2:]
        pooled = [conv(F.adaptive_avg_pool2d(coarsest, n)) for conv, n in zip(self.pools, POOLED, strict=True)]
        grown = [F.interpolate(p, size=size, mode="bilinear", align_corners=False) for p in pooled]
        top: Tensor = self.top(torch.cat([coarsest, *grown], 1))
        return top
