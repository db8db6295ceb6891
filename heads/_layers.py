"""Layers that heads share."""

from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return super().forward(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_norm_relu(channels: int, width: int, kernel: int) -> nn.Sequential:
    """A convolution that keeps the size, a norm, ReLU.

    The norm is GroupNorm over each image, where the papers have batch norm: crops come in small batches, and what a
    model gives for an image must not depend on the others of its batch.
    """
    conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(1, width), nn.ReLU())
