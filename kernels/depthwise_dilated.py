"""Depthwise convolutions of several dilations on a token grid, each through a GELU, summed: the middle of DD-Adapter.

Equation: m = Σ_i GELU(W_i *_{d_i} x + b_i), where *_d is the depthwise 3 x 3 convolution of dilation d, zero-padded so
that the grid keeps its size. Source: DD-SAM2, https://arxiv.org/abs/2507.14613.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def depthwise_dilated(x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int]) -> Tensor:
    """Sum of the GELUs of R depthwise convolutions of one grid.

    A contiguous grid read as (B, C, h, w) is in torch's channels-last layout, for which it has depthwise kernels of
    its own: nothing is permuted in memory, which halves the time on a CPU.

    Args:
        x: (B, h, w, C), any floating dtype.
        weight: (R, C, 3, 3).
        bias: (R, C).
        dilations: d_i, R whole numbers of at least 1.

    Returns:
        m: (B, h, w, C), contiguous where x is.

    Raises:
        ValueError: the shapes do not fit.
    """
    channels, rates = x.shape[-1], len(dilations)
    if x.ndim != 4 or not rates or weight.shape != (rates, channels, 3, 3) or bias.shape != (rates, channels):
        shapes = f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, {rates} dilations"
        raise ValueError(f"depthwise_dilated: {shapes} do not fit x {tuple(x.shape)}")
    maps = x.permute(0, 3, 1, 2)
    first, *rest = (
        F.gelu(F.conv2d(maps, w, b, padding=d, dilation=d, groups=channels))
        for w, b, d in zip(weight.unsqueeze(2).unbind(), bias.unbind(), dilations, strict=True)
    )
    for term in rest:
        first = first.add_(term)  # GELU's gradient needs its input only
    return first.permute(0, 2, 3, 1)
