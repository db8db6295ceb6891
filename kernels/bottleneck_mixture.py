"""One layer of Earth-Adapter: bottlenecks on a grid, its low and its high frequencies, mixed by a router per token.

Equations (x: a token, low and high: its value in the filtered grids, d: bottleneck width):
    E_k(z) = U_k ReLU(D_k z + b_k) + c_k          k = 1, 2, 3
    g      = softmax(R x + r)                     (3,)
    y      = x + s · (g_1 E_1(x) + g_2 E_2(low) + g_3 E_3(high))
Source: Earth-Adapter, https://arxiv.org/abs/2504.06220.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.kernels.spectral_split import spectral_split, spectral_split_direct


def bottleneck_mixture(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor, cutoff: int
) -> Tensor:
    """Apply the layer with two matrix products over the channels, filtering d projected channels instead of all C.

    The filter mixes tokens and D_k mixes channels, so they commute: D_k low(x) = low(D_k x). Router weights and s are
    folded into the activations: y = x + [s g_k ReLU(·), s g] · [U_k; c_k].

    Args:
        x: (B, h, w, C), any floating dtype.
        down: (3d + 3, C), the rows of D_1, D_2, D_3 and of the router R.
        down_bias: (3d + 3,), b_1, b_2, b_3 and r.
        up: (3d, C), the columns of U_1, U_2, U_3 as rows.
        up_bias: (3, C), c_1, c_2, c_3.
        scale: (), s.
        cutoff: q of `spectral_split`.

    Returns:
        y: (B, h, w, C); dtype of x (under autocast too, where the products run in the lower precision).

    Raises:
        ValueError: the shapes do not fit.
    """
    width = _check(x, down, down_bias, up, up_bias)
    tokens = x.reshape(-1, x.shape[-1])
    projected = F.linear(tokens, down).view(*x.shape[:-1], 3 * width + 3)
    projected = projected.to(torch.promote_types(projected.dtype, torch.float32))  # narrow, so full precision is cheap
    plain, filtered, router = projected.split_with_sizes((width, 2 * width, 3), -1)
    low, high = spectral_split(filtered, cutoff)
    hidden = F.relu(torch.cat((plain, low[..., :width], high[..., width:]), -1) + down_bias[:-3])
    gate = scale * (router + down_bias[-3:]).softmax(-1)
    gated = (hidden.view(*x.shape[:-1], 3, width) * gate.unsqueeze(-1)).flatten(-2)
    mixed = torch.cat((gated, gate), -1).flatten(0, -2).to(up.dtype)
    return (tokens + mixed @ torch.cat((up, up_bias))).view(x.shape)


def bottleneck_mixture_reference(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor, cutoff: int
) -> Tensor:
    """Apply the layer by its equations, transforming all C channels: oracle and baseline, same arguments."""
    width = _check(x, down, down_bias, up, up_bias)
    *downs, router = down.split_with_sizes((width, width, width, 3))
    *biases, router_bias = down_bias.split_with_sizes((width, width, width, 3))
    gates = F.linear(x, router, router_bias).softmax(-1).split_with_sizes((1, 1, 1), -1)
    grids = (x, *spectral_split_direct(x, cutoff))
    experts = zip(
        gates, grids, downs, biases, up.split_with_sizes((width, width, width)), up_bias.unbind(), strict=True
    )
    mixed = [g * F.linear(F.relu(F.linear(z, d, b)), u.t(), c) for g, z, d, b, u, c in experts]
    return x + scale * (mixed[0] + mixed[1] + mixed[2])


def _check(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> int:
    """The bottleneck width d that the shapes agree on."""
    width, channels = up.shape[0] // 3, x.shape[-1]
    shapes = [tuple(t.shape) for t in (down, down_bias, up, up_bias)]
    if x.ndim != 4 or shapes != [(3 * width + 3, channels), (3 * width + 3,), (3 * width, channels), (3, channels)]:
        raise ValueError(f"bottleneck_mixture: down, down_bias, up, up_bias {shapes} do not fit x {tuple(x.shape)}")
    return width
