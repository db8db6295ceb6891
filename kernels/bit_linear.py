"""A linear layer whose weights are N-bit codes into a Gaussian codebook.

Equations (W: trained weight, μ and σ: its mean and unbiased standard deviation, L: the 2^N levels of `codebook`):
    c   = cell of (W - μ) / (σ + 1e-5); the midpoints of neighbouring levels bound the cells
    W_q = σ L[c] + μ
    y   = x W_qᵀ
Packed, the codes lie row by row, 8/N to a byte, the first in the lowest bits.
Source: Jie, Wang, Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
https://arxiv.org/abs/2307.16867.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 500  # as published
EPSILON = 1e-5  # as published


@lru_cache
def codebook(bits: int) -> tuple[float, ...]:
    """The 2^bits ascending levels that quantise a standard normal with the least mean absolute error.

    Each level is the median of its cell, found by a fixed-point iteration in float64. It starts at zero: that gives the
    published codebooks of 1, 2 and 4 bits to the last bit of float32. At 8 bits, 500 steps are too few (mean error
    0.022, the optimum is 0.005), but a packed file does not hold its codebook, so the number of steps is its format.
    """
    levels = torch.zeros(2**bits, dtype=torch.float64, device="cpu")
    for _ in range(STEPS):
        below = F.pad(torch.special.ndtr((levels[1:] + levels[:-1]) / 2), (1, 0))
        above = F.pad(below[1:], (0, 1), value=1.0)
        levels = torch.special.ndtri((below + above) / 2)
    return tuple(levels.tolist())


def fake_quantise(weight: Tensor, levels: Tensor) -> Tensor:
    """W -> W_q of the same shape; the gradient takes L[c] for the normalised weight and flows through μ and σ too."""
    mean, deviation = weight.mean(), weight.std()
    normal = (weight - mean) / (deviation + EPSILON)
    quantised = levels[_cells(normal.detach(), levels)]
    return deviation * (quantised + (normal - normal.detach())) + mean


def quantise(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W -> (codes c of its shape, μ (), σ ())."""
    mean, deviation = weight.mean(), weight.std()
    return _cells((weight - mean) / (deviation + EPSILON), levels), mean, deviation


def _cells(normal: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(normal, (levels[1:] + levels[:-1]) / 2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape -> bytes (uint8), row by row; the last byte is filled up with zeros."""
    shifts = torch.arange(0, 8, bits, device=codes.device)
    flat = F.pad(codes.flatten(), (0, -codes.numel() % len(shifts)))
    return (flat.view(-1, len(shifts)) << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes (int64) of packed bytes."""
    shifts = torch.arange(0, 8, bits, device=packed.device)
    return (packed.long().unsqueeze(-1) >> shifts & 2**bits - 1).flatten()[:count]


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return -(-count * bits // 8)


def bit_linear(x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, out_features: int) -> Tensor:
    """Apply the packed layer, looking up all weights of a byte at once.

    Args:
        x: (..., C), any floating dtype.
        packed: bytes of the (out_features, C) codes, see `pack`.
        mean: (), μ.
        deviation: (), σ.
        levels: (2^N,), `codebook(N)`; its length says how many bits a code has.
        out_features: rows of the weight.

    Returns:
        y: (..., out_features).

    Raises:
        ValueError: the shapes do not fit.
    """
    bits = _check(x, packed, levels, out_features)
    every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
    table = (deviation * levels[unpack(every_byte, bits, 256 * 8 // bits)] + mean).view(256, -1)
    weight = table[packed.int()].flatten()[: out_features * x.shape[-1]]
    return F.linear(x, weight.view(out_features, -1).to(x.dtype))


def bit_linear_reference(
    x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, out_features: int
) -> Tensor:
    """Apply the packed layer by its equations, code by code: oracle and baseline, same arguments."""
    bits = _check(x, packed, levels, out_features)
    codes = unpack(packed, bits, out_features * x.shape[-1]).view(out_features, -1)
    return F.linear(x, (deviation * levels[codes] + mean).to(x.dtype))


def _check(x: Tensor, packed: Tensor, levels: Tensor, out_features: int) -> int:
    """Bits per code, from the codebook; the packed bytes must be as many as the weight takes."""
    bits = len(levels).bit_length() - 1
    size = packed_size(out_features * x.shape[-1], bits)
    if packed.shape != (size,) or packed.dtype != torch.uint8:
        raise ValueError(
            f"bit_linear: packed is {tuple(packed.shape)} {packed.dtype}, but {bits} bits x {out_features} x "
            f"{x.shape[-1]} take ({size},) torch.uint8"
        )
    return bits
