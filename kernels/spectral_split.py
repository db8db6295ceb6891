"""Low and high spatial frequencies of a token grid: Earth-Adapter's half-open square or a disc.

Equation: low = Re(F⁻¹(M · F x)), high = x - low, where F is the 2-D Fourier transform of the grid and M keeps
    square: the frequencies (u, v) with -q <= u, v < q      disc: those with u² + v² <= q²
in cycles per grid. The square is half open, as Earth-Adapter's code has it, so what is kept of a real grid is not real,
and taking the real part discards something; low + high is x all the same. The disc is what its paper describes.
Source: Earth-Adapter, https://arxiv.org/abs/2504.06220.

Either way low = L x with a real symmetric L, whose Fourier factors are M made even, (M(u, v) + M(-u, -v)) / 2. So the
operator is its own adjoint: ∂x = ∂high + L (∂low - ∂high).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from vfmadapt.kernels import _nvrtc
from vfmadapt.kernels._dispatch import Case, Implementation, Operation, Work
from vfmadapt.kernels._triton import OPTIONS, jit, on_device, unsupported

if TYPE_CHECKING:
    import triton.language as tl
    from triton.language import constexpr

Shape = Literal["square", "disc"]

MODES = 32  # waves of an axis that the registers of a Triton program hold the coefficients of
LANES = 16  # channels of a Triton program, and cells that it takes at a time
THREADS = 256  # of a block in csrc/spectral_split.cu
SHARED_BYTES = 48 * 1024  # what every GPU gives a block without being asked


def spectral_split(x: Tensor, cutoff: int, shape: Shape = "square") -> tuple[Tensor, Tensor]:
    """Split a real grid into its low and its high frequencies.

    Half-precision grids are filtered in float32, under autocast too: rounded waves would cost accuracy.

    Args:
        x: (B, h, w, d), any floating dtype; h and w of any size.
        cutoff: q, the largest kept frequency in cycles per grid; 0 keeps nothing of the square, the mean of the disc.
        shape: "square" or "disc".

    Returns:
        low, high: (B, h, w, d) each, dtype of x.

    Raises:
        ValueError: x is no (B, h, w, d) grid of real numbers, cutoff is negative or shape is unknown.
    """
    _check(x, cutoff, shape)
    low, high = OPERATION(x, cutoff, shape)
    return low, high


def spectral_split_reference(x: Tensor, cutoff: int, shape: Shape = "square") -> tuple[Tensor, Tensor]:
    """Split by four products with the few kept waves, (m, h) and (m, w) real orthonormal rows V_h and V_w.

    low = V_hᵀ Z V_w with Z = M' · Y, Y = V_h x V_wᵀ: of the m_h x m_w coefficients each is kept by its weight. The
    square's corners -q, -q and q, q are kept (by half) and its corners -q, q and q, -q are not, which couples the four
    products of the two axes' last cosine and sine.
    """
    _check(x, cutoff, shape)
    batch, height, width, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    with _no_autocast(x.device):
        rows, columns, weights, corner = _waves(x, cutoff, shape)
        m, n = weights.shape
        half = rows @ x.to(dtype).reshape(batch, height, width * channels)
        y = (columns @ half.view(batch * m, width, channels)).view(batch, m, n, channels)
        z = y * weights[..., None]
        if corner is not None:
            coupled = y[:, -2:, -2:].flip(1, 2) * corner[..., None]
            z = z + torch.nn.functional.pad(coupled, (0, 0, n - 2, 0, m - 2, 0))
        half = columns.t() @ z.view(batch * m, n, channels)
        low = (rows.t() @ half.view(batch, m, width * channels)).view(x.shape).to(x.dtype)
    return low, x - low


def spectral_split_direct(x: Tensor, cutoff: int, shape: Shape = "square") -> tuple[Tensor, Tensor]:
    """Split by the equation itself: oracle and baseline.

    Both halves come from their own inverse transform, as published. Half precision is transformed in float32.
    """
    _check(x, cutoff, shape)
    dtype = torch.promote_types(x.dtype, torch.float32)
    maps = x.to(dtype).permute(0, 3, 1, 2).contiguous()  # the transform is fastest over the last two axes
    u, v = (torch.arange(n, device=x.device) - n // 2 for n in x.shape[1:3])
    mask = _kept(u[:, None], v, cutoff, shape).to(dtype)
    spectrum = torch.fft.fftshift(torch.fft.fft2(maps, norm="ortho"), dim=(-2, -1))
    low, high = (
        torch.fft.ifft2(torch.fft.ifftshift(part, dim=(-2, -1)), norm="ortho").real.permute(0, 2, 3, 1).to(x.dtype)
        for part in (spectrum * mask, spectrum * (1 - mask))
    )
    return low, high


def _check(x: Tensor, cutoff: int, shape: str) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"spectral split: x must be a real (B, h, w, d) grid, not {tuple(x.shape)} of {x.dtype}")
    if cutoff < 0:
        raise ValueError(f"spectral split: cutoff {cutoff} is negative; 0 is the smallest")
    if shape not in ("square", "disc"):
        raise ValueError(f"spectral split: shape {shape!r} is unknown; choose square or disc")


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    known = torch.amp.is_autocast_available(device.type)  # not on "meta"
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _kept(u: Tensor, v: Tensor, cutoff: int, shape: Shape) -> Tensor:
    """M, of frequencies from -size / 2 on."""
    if shape == "disc":
        return u**2 + v**2 <= cutoff**2
    return (u >= -cutoff) & (u < cutoff) & (v >= -cutoff) & (v < cutoff)


class _Waves(NamedTuple):
    """The constants of the products: (m, h), (n, w), (m, n), and (2, 2) where the square has corners."""

    rows: Tensor
    columns: Tensor
    weights: Tensor
    corner: Tensor | None


def _modes(size: int, cutoff: int) -> int:
    """How many waves of an axis have a frequency of at most `cutoff`."""
    return min(2 * cutoff + 1, size)


def _coupled(height: int, width: int, cutoff: int, shape: Shape) -> bool:
    """Whether both ends of the square's half-open band are there, on either axis."""
    return shape == "square" and 0 < 2 * cutoff < min(height, width)


def _axis(size: int, cutoff: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal waves of one axis: constant, cosine 1, sine 1, cosine 2, ... (m, size), and their frequencies (m,).

    Size / 2 has no sine, and the last wave is its cosine.
    """
    mode, position = (torch.arange(n, device=device) for n in (_modes(size, cutoff), size))
    frequency = (mode + 1) // 2
    # float64: a phase of 2π rounded to float32 would make the waves four times as wrong as their own rounding
    phase = (frequency[:, None] * position % size).double() * (2 * math.pi / size)
    sine = (mode % 2 == 0) & (mode > 0)
    norm = torch.where(2 * frequency % size == 0, 1.0, 2.0).double().div(size).sqrt()
    return (torch.where(sine[:, None], phase.sin(), phase.cos()) * norm[:, None]).to(dtype), frequency


def _make_waves(height: int, width: int, cutoff: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> _Waves:
    # A matrix that is born in inference mode or under autocast would be no use to a later training step.
    with torch.inference_mode(False), _no_autocast(device):
        (rows, u), (columns, v) = (_axis(n, cutoff, dtype, device) for n in (height, width))
        if shape == "disc":
            return _Waves(rows, columns, (u[:, None] ** 2 + v**2 <= cutoff**2).to(dtype), None)
        # an axis keeps one of the two ends of the band, unless there is only one or the band is empty
        down, across = (
            torch.where((f < cutoff) | (2 * cutoff >= n), 1.0, 0.5 * (cutoff > 0)).to(dtype)
            for f, n in ((u, height), (v, width))
        )
        sign = torch.tensor([0.5, -0.5], dtype=dtype, device=device)
        corner = -sign[:, None] * sign if _coupled(height, width, cutoff, shape) else None
        return _Waves(rows, columns, down[:, None] * across, corner)


_cached_waves = lru_cache(maxsize=64)(_make_waves)  # few grid sizes are met in one run; 16 KiB each at 64 x 64 cells


def _waves(x: Tensor, cutoff: int, shape: Shape) -> _Waves:
    # A compiler traces the few operations that make them; fake tensors must not enter the cache.
    make = _make_waves if torch.compiler.is_compiling() or type(x) is not Tensor else _cached_waves
    return make(x.shape[1], x.shape[2], cutoff, shape, torch.promote_types(x.dtype, torch.float32), x.device)


class _Projection(torch.autograd.Function):
    """L by a real transform and back; its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, response: Tensor) -> Tensor:
        ctx.save_for_backward(response)
        spectrum = torch.fft.rfft2(x, dim=(1, 2)).mul_(response)
        return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (response,) = ctx.saved_tensors
        low: Tensor = _Projection.apply(grad, response)
        return low, None


def _transformed(x: Tensor, cutoff: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Split by a real Fourier transform: MKL's or PocketFFT's on a CPU, cuFFT's on a GPU; same arguments."""
    height, width = x.shape[1:3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    u, v = torch.arange(height, device=x.device)[:, None], torch.arange(width // 2 + 1, device=x.device)
    kept = [
        _kept((s * u + height // 2) % height - height // 2, (s * v + width // 2) % width - width // 2, cutoff, shape)
        for s in (1, -1)
    ]
    response = (kept[0].to(dtype) + kept[1]) / 2
    low: Tensor = _Projection.apply(x.to(dtype), response[..., None])
    low = low.to(x.dtype)
    return low, x - low


# Nanoseconds per value on one core of an AMD EPYC with AVX2 (MKL, float32): products 1.9 + 0.07 s, where s is the count
# of multiplications per value and direction, m + m n / h; transforms 11 to 14, or 35 where a size has a prime factor
# above 7. Grids of 32 to 256 cells, 32 and 128 channels, forward; forward + backward is twice either.
BREAK_EVEN, BREAK_EVEN_ROUGH = 170, 500


def _transform_reason(x: Tensor, cutoff: int, shape: Shape) -> str:
    height, width = x.shape[1:3]
    work = _modes(height, cutoff) * (1 + _modes(width, cutoff) / max(height, 1))
    less = "products with so few waves are less work"
    if work <= BREAK_EVEN:
        return less
    smooth = max(_largest_prime(height), _largest_prime(width)) <= 7
    return "" if smooth or work > BREAK_EVEN_ROUGH else less


def _largest_prime(size: int) -> int:
    prime = 2
    while prime * prime <= size:
        if size % prime:
            prime += 1
        else:
            size //= prime
    return size


# A program takes one grid and 16 of its channels, and reads them twice: to sum up the coefficients, which stay in
# registers (4096 or 16384 floats of 256 threads: 16 or 64 each), then to write what they make. With up to 16 waves
# ptxas gives a thread 119 registers, so that two programs share a multiprocessor, with up to 32 255. The second reading
# meets the L2 cache: 132 multiprocessors x 2 programs x 64 KiB (32 x 32 cells, float32) are 17 MiB of an H100's 50; so
# memory moves three values per value. At 32 x 32 cells and q = 4 the padded products are 48 multiply-adds per value, 8
# operations a byte, below an A100's 13 and an H100's 20 without tensor cores. 16 is the least side of a product.
def _kernel(
    first: tl.tensor,
    second: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    weights: tl.tensor,
    height: int,
    width: int,
    channels: int,
    m: int,
    n: int,
    boundary: int,
    first_b: int,
    first_y: int,
    first_x: int,
    first_c: int,
    second_b: int,
    second_y: int,
    second_x: int,
    second_c: int,
    mode: constexpr,
    coupled: constexpr,
    down: constexpr,
    across: constexpr,
    cells: constexpr,
    block: constexpr,
) -> None:
    """Split `first`; or "adjoint": (first, second) -> second + L (first - second); or "halves": see `low_and_high`."""
    blocks = tl.cdiv(channels, block)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * block + tl.arange(0, block)
    first += batch * first_b
    second += batch * second_b
    i = tl.arange(0, down)
    j = tl.arange(0, across)
    x_at = tl.arange(0, cells)

    y = tl.zeros((down, across, block), tl.float32)
    for row in range(height):
        half = tl.zeros((across, block), tl.float32)
        for start in range(0, width, cells):
            x = start + x_at
            value = _values(first, row, x, c, width, channels, first_y, first_x, first_c)
            if mode == "adjoint":
                value -= _values(second, row, x, c, width, channels, second_y, second_x, second_c)
            known = (j < n)[:, None] & (x < width)[None, :]
            along_x = tl.load(columns + j[:, None] * width + x[None, :], mask=known, other=0)
            half = tl.dot(along_x, value, half, input_precision="ieee")
        along_y = tl.load(rows + i * height + row, mask=i < m, other=0)
        y += along_y[:, None, None] * half[None, :, :]

    inside = (i < m)[:, None] & (j < n)[None, :]
    z = y * tl.load(weights + i[:, None] * n + j[None, :], mask=inside, other=0)[:, :, None]
    if coupled:  # 0: the last cosine, 1: the last sine
        u = (i - (m - 2))[:, None]
        v = (j - (n - 2))[None, :]
        for a in tl.static_range(2):
            for b in tl.static_range(2):
                one = tl.sum(tl.sum(tl.where(((u == a) & (v == b))[:, :, None], y, 0.0), 0), 0)
                other = ((u == 1 - a) & (v == 1 - b))[:, :, None]
                z += tl.where(other, one[None, None, :] * (-0.25 if a == b else 0.25), 0.0)

    for row in range(height):
        along_y = tl.load(rows + i * height + row, mask=i < m, other=0)
        half = tl.sum(along_y[:, None, None] * z, 0)
        for start in range(0, width, cells):
            x = start + x_at
            known = (x < width)[:, None] & (j < n)[None, :]
            along_x = tl.load(columns + j[None, :] * width + x[:, None], mask=known, other=0)
            kept = tl.dot(along_x, half, input_precision="ieee")
            keep = (x < width)[:, None] & (c < channels)[None, :]
            to = ((batch * height + row) * width + x[:, None]) * channels + c[None, :]
            if mode == "adjoint":
                kept += _values(second, row, x, c, width, channels, second_y, second_x, second_c)
            else:
                value = _values(first, row, x, c, width, channels, first_y, first_x, first_c)
                if mode == "split":
                    tl.store(high + to, (value - kept).to(high.dtype.element_ty), mask=keep)
                else:
                    kept = tl.where((c < boundary)[None, :], kept, value - kept)
            tl.store(low + to, kept.to(low.dtype.element_ty), mask=keep)


def _values(
    image: tl.tensor,
    row: tl.tensor,
    x: tl.tensor,
    c: tl.tensor,
    width: int,
    channels: int,
    by_y: int,
    by_x: int,
    by_c: int,
) -> tl.tensor:
    """Cells x of a row, channels c."""
    known = (x < width)[:, None] & (c < channels)[None, :]
    at = row * by_y + (x * by_x)[:, None] + (c * by_c)[None, :]
    return tl.load(image + at, mask=known, other=0).to(tl.float32)


_TRITON = (_values, _kernel)


def _triton_launch(
    mode: str,
    inputs: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    cutoff: int,
    shape: Shape,
    boundary: int = 0,
) -> None:
    x = inputs[0]
    batch, height, width, channels = x.shape
    waves = _waves(x, cutoff, shape)
    m, n = waves.weights.shape
    down, across = (max(16, _power(k)) for k in (m, n))
    *_, kernel = jit(_TRITON)
    if x.numel() == 0:
        return
    with on_device(x):
        kernel[(batch * -(-channels // LANES),)](
            *inputs,
            *outputs,
            *waves[:3],
            *(height, width, channels, m, n, boundary, *inputs[0].stride(), *inputs[1].stride()),
            mode=mode,
            coupled=waves.corner is not None,
            down=down,
            across=across,
            cells=LANES,
            block=LANES,
            num_warps=8,
            **OPTIONS,
        )


def _power(size: int) -> int:
    """The least power of two that holds `size`."""
    return 1 << (size - 1).bit_length()


def low_and_high(x: Tensor, cutoff: int) -> Tensor:
    """By Triton: low of the first half of the channels beside high of the second, which is its own adjoint.

    Args:
        x: (B, h, w, 2d) that Triton's `spectral_split` takes; may be a view.
        cutoff: q of the square.

    Returns:
        (B, h, w, 2d), float32.
    """
    out = x.new_empty(x.shape, dtype=torch.float32)
    _triton_launch("halves", (x, x), (out, out), cutoff, "square", x.shape[-1] // 2)
    return out


def _cuda_launch(
    mode: str, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], cutoff: int, shape: Shape
) -> None:
    x = inputs[0]
    batch, height, width, channels = x.shape
    waves = _waves(x, cutoff, shape)
    m, n = waves.weights.shape
    lanes = _lanes(m, n, width)
    macros = {
        "SCALAR": _nvrtc.SCALARS[x.dtype],
        "ADJOINT": int(mode == "adjoint"),
        "COUPLED": int(waves.corner is not None),
        "CHANNELS": lanes,
        "ROWS": m,
        "COLUMNS": n,
    }
    grid = (batch * -(-channels // lanes),)
    args = (*inputs, *outputs, *waves[:3], height, width, channels, *inputs[0].stride(), *inputs[1].stride())
    if x.numel():
        _nvrtc.launch("spectral_split:split", macros, grid, THREADS, args, _shared_bytes(m, n, width, lanes))


def _shared_bytes(m: int, n: int, width: int, lanes: int) -> int:
    """What csrc/spectral_split.cu keeps: waves along x in fours, and coefficients or half-transformed rows."""
    return 4 * (width * -(-n // 4) * 4 + lanes * n * max(m, THREADS // lanes))


def _lanes(m: int, n: int, width: int) -> int:
    """Channels of a block: a warp's, or half of it, or 0 where shared memory does not hold the coefficients."""
    fitting = (lanes for lanes in (32, 16) if _shared_bytes(m, n, width, lanes) <= SHARED_BYTES)
    return next(fitting, 0)


def _operator(name: str, launch: Callable[..., None]) -> Callable[[Tensor, int, str], tuple[Tensor, Tensor]]:
    @torch.library.custom_op(f"vfmadapt::spectral_split_{name}", mutates_args=())
    def split(x: Tensor, cutoff: int, shape: str) -> tuple[Tensor, Tensor]:
        low, high = x.new_empty(x.shape), x.new_empty(x.shape)
        launch("split", (x, x), (low, high), cutoff, shape)
        return low, high

    @torch.library.custom_op(f"vfmadapt::spectral_split_{name}_adjoint", mutates_args=())
    def adjoint(low: Tensor, high: Tensor, cutoff: int, shape: str) -> Tensor:
        out = low.new_empty(low.shape)
        launch("adjoint", (low, high), (out, out), cutoff, shape)
        return out

    def save(ctx: Any, inputs: tuple[Tensor, int, str], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = inputs[1:]

    def backward(ctx: Any, low: Tensor, high: Tensor) -> tuple[Tensor, None, None]:
        return adjoint(low, high, *ctx.settings), None, None

    split.register_fake(lambda x, cutoff, shape: (x.new_empty(x.shape), x.new_empty(x.shape)))
    adjoint.register_fake(lambda low, high, cutoff, shape: low.new_empty(low.shape))
    split.register_autograd(backward, setup_context=save)
    return split


_triton, _cuda_products = _operator("triton", _triton_launch), _operator("cuda", _cuda_launch)


def triton_reason(x: Tensor, cutoff: int, shape: Shape) -> str:
    """Why Triton does not split these, or ""."""
    most = max(_modes(n, cutoff) for n in x.shape[1:3])
    if most > MODES:
        return f"keeps up to {MODES} waves of an axis, not {most}"
    return _too_large(x) or unsupported(x)


def _cuda_reason(x: Tensor, cutoff: int, shape: Shape) -> str:
    return _too_large(x) or unsupported(x)


def _too_large(x: Tensor) -> str:
    last = sum((n - 1) * by for n, by in zip(x.shape[1:], x.stride()[1:], strict=True))
    return "" if last < 2**31 else "offsets inside an image take more than 31 bits"


def _cuda(x: Tensor, cutoff: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Products where a block's shared memory holds the coefficients, otherwise cuFFT.

    Where they fit they win: a transform moves 14 values or more per value (copies, two transforms of two passes, the
    mask, the difference), products 3, and up to 25 waves their arithmetic takes less time than that.
    """
    m, n = (_modes(size, cutoff) for size in x.shape[1:3])
    return (_cuda_products if _lanes(m, n, x.shape[2]) else _transformed)(x, cutoff, shape)


def _work(x: Tensor, cutoff: int, shape: Shape = "square") -> tuple[Work, Work]:
    height, width = x.shape[1:3]
    m, n = _modes(height, cutoff), _modes(width, cutoff)
    products = 4 * x.numel() * n * (1 + m / width)
    flops = int(min(products, 2 * 2.5 * x.numel() * math.log2(max(height * width, 2))))
    size = x.numel() * x.element_size()
    return Work(3 * size, flops), Work(6 * size, 2 * flops)


def _case(batch: int, height: int, width: int, channels: int, cutoff: int, shape: Shape, device: Any) -> Case:
    def make(where: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        return torch.randn(batch, height, width, channels, device=where, dtype=dtype), cutoff, shape

    return Case(f"({batch}, {height}, {width}, {channels}), {shape}, q = {cutoff}", device, make)


CASES = (
    _case(8, 32, 32, 128, 4, "square", "cpu"),
    _case(8, 32, 32, 128, 4, "disc", "cpu"),
    _case(8, 37, 53, 32, 5, "square", "cpu"),
    _case(2, 64, 64, 128, 9, "square", "cpu"),
    _case(1, 128, 128, 128, 56, "square", "cpu"),
    _case(256, 32, 32, 128, 4, "square", "cuda"),
    _case(256, 32, 32, 128, 4, "disc", "cuda"),
    _case(128, 37, 53, 128, 5, "square", "cuda"),
    _case(64, 64, 64, 128, 9, "square", "cuda"),
    _case(16, 128, 128, 128, 32, "square", "cuda"),
)
OPERATION = Operation(
    "spectral_split",
    spectral_split_reference,
    (
        Implementation("cpu", _transform_reason, _transformed),
        Implementation("triton", triton_reason, _triton),
        Implementation("cuda", _cuda_reason, _cuda),
    ),
    _work,
    CASES,
    {"direct": spectral_split_direct},
)
