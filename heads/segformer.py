"""SegFormer's all-MLP decoder on any backbone.

Xie et al. 2021, "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers",
https://arxiv.org/abs/2105.15203, §3.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, Head
from vfmadapt.heads._layers import conv_norm_relu
from vfmadapt.heads._pyramid import Pyramid
from vfmadapt.heads._resize import to_image, upsample_to


class SegFormerHead(Head):
    """Maps of four scales, each through a linear layer, side by side at the finest; mixed and classified per place.

    The linear layers are followed by norm and ReLU, as released. From a plain ViT the maps come by a simple pyramid.

    Args:
        spec: the backbone's.
        num_classes: logits per pixel.
        layers: blocks to read, see `Pyramid`.
        width: channels of the linear layers (published: 256 for B0 and B1, 768 for the larger ones).
        dropout: share of the mixed channels that are dropped in training (published: 0.1).
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
        self.linears = nn.ModuleList(conv_norm_relu(c, width, 1) for c in self.pyramid.dims)
        self.fuse = conv_norm_relu(width * len(self.linears), width, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> logits (B, K, H, W)."""
        maps = [linear(level) for linear, level in zip(self.linears, self.pyramid(features), strict=True)]
        finest, *strides = self.pyramid.strides
        maps[1:] = [upsample_to(maps[0], m, s / finest) for m, s in zip(maps[1:], strides, strict=True)]
        logits = self.classifier(self.dropout(self.fuse(torch.cat(maps, 1))))
        grid = (features.grids[0].shape[2], features.grids[0].shape[3])
        return to_image(logits, grid, features.strides[0], size)
