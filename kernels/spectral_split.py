"""Low and high spatial frequencies of a token grid: the half-open square low-pass of Earth-Adapter.

Equation: low = Re(F⁻¹(M · F x)), high = x - low, where F is the 2-D Fourier transform of the grid and M keeps the
frequencies (u, v) with -q <= u, v < q. The square is half open (-q is in, q is not), as published, so what is kept of a
real grid is not real, and taking the real part discards something; low + high is x all the same.
Source: Earth-Adapter, https://arxiv.org/abs/2504.06220.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor


def spectral_split(x: Tensor, cutoff: int) -> tuple[Tensor, Tensor]:
    """Split a real grid into its low and its high frequencies by small real matrix products.

    The mask is separable, so F⁻¹ M F = P_h ⊗ P_w with complex projections P = A + iB, and for real x
    Re(P_h x P_wᵀ) = A_h x A_wᵀ - B_h x B_wᵀ = [A_w, -B_w] · ([A_h; B_h] x): two products, no complex numbers.
    Half-precision grids are filtered in float32, under autocast too: rounded matrices would cost accuracy.

    Args:
        x: (B, h, w, d), any floating dtype; h and w of any size.
        cutoff: q, the largest kept frequency in cycles per grid; 0 keeps nothing, q >= size / 2 everything.

    Returns:
        low, high: (B, h, w, d) each, dtype of x.

    Raises:
        ValueError: x is no (B, h, w, d) grid of real numbers or cutoff is negative.
    """
    _check(x, cutoff)
    batch, height, width, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A compiler traces the few operations that make the matrices; fake tensors must not enter the cache.
    matrices = _filters if torch.compiler.is_compiling() or type(x) is not Tensor else _cached_filters
    rows, columns = matrices(height, width, cutoff, dtype, x.device)
    with _no_autocast(x.device):
        # (B, 2h, w·d), the rows being A x and B x of row 0, of row 1, ...; read again as (B·h, 2w, d)
        halves = rows @ x.to(dtype).reshape(batch, height, width * channels)
        low = (columns @ halves.view(batch * height, 2 * width, channels)).view_as(x).to(x.dtype)
    return low, x - low


def spectral_split_fft(x: Tensor, cutoff: int) -> tuple[Tensor, Tensor]:
    """Split a real grid by the equation itself: the oracle of `spectral_split`, with the same arguments and results.

    Both halves come from their own inverse transform, as published. Half precision is transformed in float32.
    """
    _check(x, cutoff)
    dtype = torch.promote_types(x.dtype, torch.float32)
    maps = x.to(dtype).permute(0, 3, 1, 2).contiguous()  # the transform is fastest over the last two axes
    keep = _kept(x.shape[1], cutoff, x.device)[:, None] & _kept(x.shape[2], cutoff, x.device)
    mask = keep.to(dtype)
    spectrum = torch.fft.fftshift(torch.fft.fft2(maps, norm="ortho"), dim=(-2, -1))
    low, high = (
        torch.fft.ifft2(torch.fft.ifftshift(part, dim=(-2, -1)), norm="ortho").real.permute(0, 2, 3, 1).to(x.dtype)
        for part in (spectrum * mask, spectrum * (1 - mask))
    )
    return low, high


def _check(x: Tensor, cutoff: int) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"spectral split: x must be a real (B, h, w, d) grid, not {tuple(x.shape)} of {x.dtype}")
    if cutoff < 0:
        raise ValueError(f"spectral split: cutoff {cutoff} is negative; 0 keeps no frequency")


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    known = torch.amp.is_autocast_available(device.type)  # not on "meta"
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _kept(size: int, cutoff: int, device: torch.device) -> Tensor:
    """Which of the `size` frequencies, in the order of fftshift, the half-open band keeps: (size,) bool."""
    frequency = torch.arange(size, device=device) - size // 2
    return (frequency >= -cutoff) & (frequency < cutoff)


def _projection(size: int, cutoff: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the projection onto the kept frequencies of one axis: (size, size) each.

    P[y, z] = 1/n Σ_u exp(2πi u (y - z) / n) depends on y - z only, so n values are summed and then spread.
    """
    position = torch.arange(size, device=device)
    frequency = position - size // 2
    phase = (position[:, None] * frequency % size).to(dtype) * (
        2 * math.pi / size
    )  # whole numbers up to the last product
    keep = _kept(size, cutoff, device).to(dtype) / size
    lag = (position[:, None] - position) % size
    return (phase.cos() @ keep)[lag], (phase.sin() @ keep)[lag]


def _filters(height: int, width: int, cutoff: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two constant factors: rows (2h, h) with A_h and B_h interleaved row by row, columns (w, 2w) = [A_w, -B_w]."""
    # A matrix that is born in inference mode or under autocast would be no use to a later training step.
    with torch.inference_mode(False), _no_autocast(device):
        real_h, imag_h = _projection(height, cutoff, dtype, device)
        real_w, imag_w = _projection(width, cutoff, dtype, device)
        return torch.stack((real_h, imag_h), 1).flatten(0, 1), torch.cat((real_w, -imag_w), 1)


_cached_filters = lru_cache(maxsize=64)(_filters)  # few grid sizes are met in one run; 64 KiB each at 64 x 64 cells
