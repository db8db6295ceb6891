"""A linear layer whose weights are N-bit codes into a Gaussian codebook.

Equations (W: trained weight, μ and σ: its mean and unbiased standard deviation, L: the 2^N levels of `codebook`):
    c   = cell of (W - μ) / (σ + 1e-5); the midpoints of neighbouring levels bound the cells
    W_q = σ L[c] + μ
    y   = x W_qᵀ
Packed, the codes lie row by row, 8/N to a byte, the first in the lowest bits.
Source: Jie, Wang, Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
https://arxiv.org/abs/2307.16867.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.kernels._dispatch import Case, Implementation, Operation, Work, autocast
from vfmadapt.kernels._triton import OPTIONS, jit, on_device, operand, unsupported

if TYPE_CHECKING:
    import triton.language as tl
    from triton.language import constexpr

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
    """Apply the packed layer.

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
    _check(x, packed, levels, out_features)
    y: Tensor = OPERATION(x, packed, mean, deviation, levels, out_features)
    return y


def bit_linear_reference(
    x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, out_features: int
) -> Tensor:
    """Apply the packed layer by its equations, code by code; same arguments."""
    bits = _check(x, packed, levels, out_features)
    codes = unpack(packed, bits, out_features * x.shape[-1]).view(out_features, -1)
    return F.linear(x, (deviation * levels[codes] + mean).to(x.dtype))


def _bits(levels: Tensor) -> int:
    return len(levels).bit_length() - 1


def _check(x: Tensor, packed: Tensor, levels: Tensor, out_features: int) -> int:
    """Bits per code, from the codebook; the packed bytes must be as many as the weight takes."""
    bits = _bits(levels)
    size = packed_size(out_features * x.shape[-1], bits)
    if packed.shape != (size,) or packed.dtype != torch.uint8:
        raise ValueError(
            f"bit_linear: packed is {tuple(packed.shape)} {packed.dtype}, but {bits} bits x {out_features} x "
            f"{x.shape[-1]} take ({size},) torch.uint8"
        )
    return bits


def _by_bytes(x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, out_features: int) -> Tensor:
    """Look up all weights of a byte at once."""
    bits = _bits(levels)
    every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
    table = (deviation * levels[unpack(every_byte, bits, 256 * 8 // bits)] + mean).view(256, -1)
    weight = table[packed.int()].flatten()[: out_features * x.shape[-1]]
    return F.linear(x, weight.view(out_features, -1).to(x.dtype))


# y (tokens, outputs) = x (tokens, inputs) times weights that are unpacked where they are used; the gradient of x is
# the same product with the weight read the other way round. A bottleneck's narrow side, 1 to 64, is one block of
# columns or one step of the loop, so that the tokens are read once and copying bounds the kernel: 32 tokens and 64
# channels a step, as loads of 128 bytes of each row. A step's 32 x 64 codes cost each of 128 threads 16 bytes from the
# L1 cache and some ten integer operations each, and serve 32 tokens.
def _product_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    mean: tl.tensor,
    deviation: tl.tensor,
    levels: tl.tensor,
    y: tl.tensor,
    tokens: int,
    inputs: int,
    outputs: int,
    code_input: int,
    code_output: int,
    bits: constexpr,
    operand: constexpr,
    rows: constexpr,
    columns: constexpr,
    step: constexpr,
) -> None:
    blocks = tl.cdiv(outputs, columns)
    row = (tl.program_id(0) // blocks).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    column = (tl.program_id(0) % blocks) * columns + tl.arange(0, columns)[None, :]
    sigma = tl.load(deviation).to(tl.float32)
    mu = tl.load(mean).to(tl.float32)
    total = tl.zeros((rows, columns), tl.float32)
    for first in range(0, inputs, step):
        k = first + tl.arange(0, step)
        a = tl.load(x + row * inputs + k[None, :], mask=(row < tokens) & (k[None, :] < inputs), other=0.0)
        k = k[:, None]
        known = (k < inputs) & (column < outputs)
        bit = (k.to(tl.int64) * code_input + column * code_output) * bits
        byte = tl.load(packed + bit // 8, mask=known, other=0).to(tl.int32)
        code = (byte >> (bit % 8).to(tl.int32)) & ((1 << bits) - 1)
        weight = sigma * tl.load(levels + code, mask=known, other=0.0).to(tl.float32) + mu
        # beyond the last input a is 0, and columns beyond the last are not stored
        total = tl.dot(a.to(operand), weight.to(x.dtype.element_ty).to(operand), total, input_precision="ieee")
    tl.store(y + row * outputs + column, total.to(y.dtype.element_ty), mask=(row < tokens) & (column < outputs))


_TRITON = (_product_kernel,)


@torch.library.custom_op("vfmadapt::bit_linear", mutates_args=())
def _product(
    x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, outputs: int, transposed: bool
) -> Tensor:
    """Tokens (T, inputs) times the weight (outputs, inputs), or where `transposed` times one of (inputs, outputs)."""
    (tokens, inputs), y = x.shape, _empty(x, packed, mean, deviation, levels, outputs, transposed)
    rows, columns = 32, 32 if outputs <= 32 else 64
    (kernel,) = jit(_TRITON)
    with on_device(x):
        kernel[(-(-tokens // rows) * -(-outputs // columns),)](
            *(x.contiguous(), packed, mean, deviation, levels, y, tokens, inputs, outputs),
            *((outputs, 1) if transposed else (1, inputs)),
            bits=_bits(levels),
            operand=operand(x.dtype),
            rows=rows,
            columns=columns,
            step=min(128 // x.element_size(), max(16, 1 << (inputs - 1).bit_length())),
            **OPTIONS,
        )
    return y


@_product.register_fake
def _empty(
    x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, outputs: int, transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, _, ctx.transposed = inputs
    ctx.inputs = x.shape[1]
    ctx.save_for_backward(*weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _product(grad, *ctx.saved_tensors, ctx.inputs, not ctx.transposed), *[None] * 6


_product.register_autograd(_backward, setup_context=_save)


def _cpu_reason(x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, out_features: int) -> str:
    # measured: 1.1 to 1.8 times as fast from there on, 0.7 to 0.9 times below
    pays = len(levels) < 256 and x.shape[-1] * out_features >= 16384
    return "" if pays else "making a table pays from 16384 weights of fewer than 8 bits"


def _triton(x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, out_features: int) -> Tensor:
    (x,) = autocast(x)
    y: Tensor = _product(x.flatten(0, -2), packed, mean, deviation, levels, out_features, False)
    return y.view(*x.shape[:-1], out_features)


def _triton_reason(
    x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, out_features: int
) -> str:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (mean, deviation, levels)):
        return "gives no gradient to mean, deviation and levels"
    return unsupported(*autocast(x))


def _work(
    x: Tensor, packed: Tensor, mean: Tensor, deviation: Tensor, levels: Tensor, out_features: int
) -> tuple[Work, Work]:
    tokens = x[..., 0].numel()
    forward = Work(
        x.element_size() * (x.numel() + tokens * out_features) + packed.numel(), 2 * x.numel() * out_features
    )
    return forward, Work(2 * forward.bytes, 2 * forward.flops)


def _case(label: str, device: Literal["cpu", "cuda"], tokens: int, inputs: int, outputs: int, bits: int) -> Case:
    def make(where: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        packed = torch.randint(256, (packed_size(inputs * outputs, bits),), dtype=torch.uint8, device=where)
        statistics = torch.tensor([0.01, 0.05], device=where)
        levels = torch.tensor(codebook(bits), device=where)
        return torch.randn(tokens, inputs, device=where, dtype=dtype), packed, *statistics, levels, outputs

    return Case(f"{label}, {tokens} tokens, {inputs} to {outputs}, {bits} bits", device, make)


CASES = [
    _case("down", "cpu", 1576, 768, 32, 1),
    _case("up", "cpu", 1576, 32, 768, 1),
    _case("down", "cpu", 197, 768, 8, 4),
    _case("down", "cuda", 65536, 768, 32, 1),
    _case("up", "cuda", 65536, 32, 768, 1),
    _case("down", "cuda", 65536, 1024, 64, 4),
]
OPERATION = Operation(
    "bit_linear",
    bit_linear_reference,
    (Implementation("triton", _triton_reason, _triton), Implementation("cpu", _cpu_reason, _by_bytes)),
    _work,
    CASES,
)
