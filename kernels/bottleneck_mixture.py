"""One layer of Earth-Adapter: bottlenecks on a grid, its low and its high frequencies, mixed by a router per token.

Equations (x: a token, low and high: its value in the filtered grids, d: bottleneck width):
    E_k(z) = U_k ReLU(D_k z + b_k) + c_k          k = 1, 2, 3
    g      = softmax(R x + r)                     (3,)
    y      = x + s · (g_1 E_1(x) + g_2 E_2(low) + g_3 E_3(high))
Source: Earth-Adapter, https://arxiv.org/abs/2504.06220.

Backward, with m = [s g_k ReLU(·), s g], W = [U; c] and p = D x: ∂m = ∂y Wᵀ, ∂W = mᵀ ∂y, ∂x = ∂y + ∂p D; the filters are
their own adjoints. In half precision on a GPU a forward pass reads x twice and writes y; a backward pass reads ∂y three
times and x once and writes ∂x; all else is d wide, and of that p alone is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.kernels._dispatch import Case, Implementation, Operation, Work, autocast
from vfmadapt.kernels._triton import OPTIONS, jit, on_device, operand, unsupported
from vfmadapt.kernels.spectral_split import low_and_high, spectral_split, spectral_split_direct, triton_reason

if TYPE_CHECKING:
    import triton.language as tl
    from triton.language import constexpr

WIDEST = 256  # bottlenecks; what a program of `_mix_kernel` keeps in registers


def bottleneck_mixture(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor, cutoff: int
) -> Tensor:
    """Apply the layer with two matrix products over the channels, filtering d projected channels instead of all C.

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
    _check(x, down, down_bias, up, up_bias)
    y: Tensor = OPERATION(x, down, down_bias, up, up_bias, scale, cutoff)
    return y


def bottleneck_mixture_reference(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor, cutoff: int
) -> Tensor:
    """Apply the layer in plain PyTorch, same arguments.

    The filter mixes tokens and D_k mixes channels, so they commute: D_k low(x) = low(D_k x). Router weights and s are
    folded into the activations: y = x + [s g_k ReLU(·), s g] · [U_k; c_k].
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


def bottleneck_mixture_direct(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor, cutoff: int
) -> Tensor:
    """Apply the layer by its equations, transforming all C channels: oracle and baseline."""
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


def _hidden(
    projected: tl.tensor,
    filtered: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    j: tl.tensor,
    known: tl.tensor,
    width: int,
    padded: int,
    k: constexpr,
) -> tl.tensor:
    """ReLU(D_k z + b_k) of some tokens: (rows, block)."""
    if k == 0:
        value = tl.load(projected + row[:, None] * padded + j[None, :], mask=known, other=0).to(tl.float32)
    else:
        at = row[:, None] * (2 * width) + (k - 1) * width + j[None, :]
        value = tl.load(filtered + at, mask=known, other=0)
    value += tl.load(bias + k * width + j, mask=j < width, other=0).to(tl.float32)[None, :]
    return tl.where(known, tl.maximum(value, 0.0), 0.0)


def _shares(
    projected: tl.tensor, bias: tl.tensor, row: tl.tensor, inside: tl.tensor, width: int, padded: int
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Router weights g of some tokens."""
    at = projected + row * padded + 3 * width
    first = tl.load(at, mask=inside, other=0).to(tl.float32) + tl.load(bias + 3 * width).to(tl.float32)
    second = tl.load(at + 1, mask=inside, other=0).to(tl.float32) + tl.load(bias + 3 * width + 1).to(tl.float32)
    third = tl.load(at + 2, mask=inside, other=0).to(tl.float32) + tl.load(bias + 3 * width + 2).to(tl.float32)
    top = tl.maximum(tl.maximum(first, second), third)
    first = tl.exp(first - top)
    second = tl.exp(second - top)
    third = tl.exp(third - top)
    total = first + second + third
    return first / total, second / total, third / total


# Both narrow kernels only copy: 16 tokens of 64 channels are 1024 values to each of three experts, 8 to a thread of 4
# warps, in loads of 128 bytes and more.
def _mix_kernel(
    projected: tl.tensor,
    filtered: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    mixed: tl.tensor,
    tokens: int,
    width: int,
    padded: int,
    rows: constexpr,
    block: constexpr,
) -> None:
    """Make m of some tokens."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    j = tl.arange(0, block)
    inside = row < tokens
    known = inside[:, None] & (j < width)[None, :]
    s = tl.load(scale).to(tl.float32)
    first, second, third = _shares(projected, bias, row, inside, width, padded)
    for k in tl.static_range(3):
        gate = s * (first if k == 0 else (second if k == 1 else third))
        hidden = _hidden(projected, filtered, bias, row, j, known, width, padded, k)
        to = mixed + row * padded + k * width
        tl.store(to[:, None] + j[None, :], (gate[:, None] * hidden).to(mixed.dtype.element_ty), mask=known)
        tl.store(mixed + row * padded + 3 * width + k, gate.to(mixed.dtype.element_ty), mask=inside)


def _mix_backward_kernel(
    grad: tl.tensor,
    projected: tl.tensor,
    filtered: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    mixed: tl.tensor,
    result: tl.tensor,
    of_scale: tl.tensor,
    tokens: int,
    width: int,
    padded: int,
    rows: constexpr,
    block: constexpr,
) -> None:
    """From ∂m the gradients before the ReLUs and the softmax, and each token's share of ∂s; m is made anew."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    j = tl.arange(0, block)
    inside = row < tokens
    known = inside[:, None] & (j < width)[None, :]
    s = tl.load(scale).to(tl.float32)
    first, second, third = _shares(projected, bias, row, inside, width, padded)
    mean = tl.zeros((rows,), tl.float32)
    for k in tl.static_range(3):
        share = first if k == 0 else (second if k == 1 else third)
        hidden = _hidden(projected, filtered, bias, row, j, known, width, padded, k)
        at = row[:, None] * padded + k * width + j[None, :]
        gate_at = row * padded + 3 * width + k
        slope = tl.load(grad + at, mask=known, other=0).to(tl.float32)
        of_gate = tl.load(grad + gate_at, mask=inside, other=0).to(tl.float32) + tl.sum(slope * hidden, 1)
        mean += share * of_gate
        gate = s * share
        tl.store(mixed + at, (gate[:, None] * hidden).to(mixed.dtype.element_ty), mask=known)
        tl.store(mixed + gate_at, gate.to(mixed.dtype.element_ty), mask=inside)
        tl.store(result + at, tl.where(hidden > 0, gate[:, None] * slope, 0.0), mask=known)
        if k == 0:
            of_first = of_gate
        elif k == 1:
            of_second = of_gate
        else:
            of_third = of_gate
    to = result + row * padded + 3 * width
    tl.store(to, s * first * (of_first - mean), mask=inside)
    tl.store(to + 1, s * second * (of_second - mean), mask=inside)
    tl.store(to + 2, s * third * (of_third - mean), mask=inside)
    tl.store(of_scale + row, mean, mask=inside)


# A program takes 64 tokens and 128 channels; its neighbours take the other channels of these tokens, so that the narrow
# tokens come from the L2 cache. With d = 64 each value takes 400 operations and 4 bytes in half precision, 100 a byte:
# below the 150 to 300 of an A100's and an H100's tensor cores, so that copying bounds it. 64 sums to a thread of 4
# warps leave registers for the next operands.
def _residual_kernel(
    base: tl.tensor,
    narrow: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    tokens: int,
    per_item: int,
    channels: int,
    padded: int,
    base_item: int,
    base_token: int,
    base_channel: int,
    dot: constexpr,
    rows: constexpr,
    columns: constexpr,
    inner: constexpr,
) -> None:
    """Write base + narrow · weight."""
    blocks = tl.cdiv(channels, columns)
    row = (tl.program_id(0) // blocks).to(tl.int64) * rows + tl.arange(0, rows)
    c = tl.program_id(0) % blocks * columns + tl.arange(0, columns)
    k = tl.arange(0, inner)
    inside = row < tokens
    known = inside[:, None] & (c < channels)[None, :]
    total = tl.zeros((rows, columns), tl.float32)
    for start in range(0, padded, inner):
        left = tl.load(
            narrow + row[:, None] * padded + (start + k)[None, :],
            mask=inside[:, None] & (start + k < padded)[None, :],
            other=0,
        ).to(tl.float32)
        right = tl.load(
            weight + (start + k)[:, None] * channels + c[None, :],
            mask=(start + k < padded)[:, None] & (c < channels)[None, :],
            other=0,
        ).to(tl.float32)
        total = tl.dot(left.to(dot), right.to(dot), total, input_precision="ieee")
    at = (row // per_item * base_item + row % per_item * base_token)[:, None] + c.to(tl.int64)[None, :] * base_channel
    total += tl.load(base + at, mask=known, other=0).to(tl.float32)
    to = row[:, None] * channels + c[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=known)


_TRITON = (_hidden, _shares, _mix_kernel, _mix_backward_kernel, _residual_kernel)
ROWS = 16


def _add_product(base: Tensor, narrow: Tensor, weight: Tensor) -> Tensor:
    """Give base + narrow · weight: (B, T, C), (B, T, K), (K, C) -> (B, T, C), dtype of base.

    Float32 has no tensor cores without TF32: 400 operations for 8 bytes are bound by arithmetic, where cuBLAS is best.
    """
    batch, per_item, channels = base.shape
    if narrow.dtype == torch.float32:
        return base + narrow @ weight
    out = base.new_empty(base.shape)
    *_, kernel = jit(_TRITON)
    tokens, rows, columns = batch * per_item, 64, 128
    if out.numel():
        with on_device(base):
            kernel[(-(-tokens // rows) * -(-channels // columns),)](
                *(base, narrow, weight, out, tokens, per_item, channels, len(weight), *base.stride()),
                dot=operand(narrow.dtype),
                rows=rows,
                columns=columns,
                inner=64,
                num_warps=4,
                **OPTIONS,
            )
    return out


def _filtered(projected: Tensor, width: int, cutoff: int) -> Tensor:
    return low_and_high(projected[..., width : 3 * width], cutoff)


def _sizes(projected: Tensor, width: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Of the narrow kernels: their last arguments and settings."""
    tokens = projected.shape[:-1].numel()
    return (tokens, width, projected.shape[-1]), {"rows": ROWS, "block": max(16, 1 << (width - 1).bit_length())}


@torch.library.custom_op("vfmadapt::bottleneck_mixture_triton", mutates_args=())
def _forward(x: Tensor, down: Tensor, bias: Tensor, up: Tensor, scale: Tensor, cutoff: int) -> tuple[Tensor, Tensor]:
    """Give y and p: (B, h, w, C), (B, h, w, K). Both weights are (K, C), filled up with zeros from 3 d + 3 rows."""
    width, tokens = len(bias) // 3 - 1, x.flatten(1, 2)
    with torch.autocast(x.device.type, enabled=False):
        # as a batch, so that tokens cut out from behind a prefix are not copied
        projected = torch.bmm(tokens.to(down.dtype), down.t().expand(len(x), -1, -1)).view(*x.shape[:3], len(down))
        mixed = torch.zeros_like(projected)
        _, _, mix, *_ = jit(_TRITON)
        if x.numel():
            filtered = _filtered(projected, width, cutoff)
            sizes, settings = _sizes(projected, width)
            with on_device(x):
                mix[(-(-sizes[0] // ROWS),)](projected, filtered, bias, scale, mixed, *sizes, **settings, **OPTIONS)
        return _add_product(tokens, mixed.flatten(1, 2), up).view(x.shape), projected


@torch.library.custom_op("vfmadapt::bottleneck_mixture_triton_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, projected: Tensor, down: Tensor, bias: Tensor, up: Tensor, scale: Tensor, cutoff: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width, channels, dtype = len(bias) // 3 - 1, x.shape[-1], down.dtype
    with torch.autocast(x.device.type, enabled=False):
        tokens, slopes = (t.reshape(-1, channels).to(dtype) for t in (x, grad))
        of_mixed, mixed = slopes @ up.t(), torch.zeros_like(projected)
        result = torch.zeros_like(projected, dtype=torch.float32)
        of_scale = result.new_empty(len(tokens))
        *_, mix, _ = jit(_TRITON)
        if x.numel():
            filtered = _filtered(projected, width, cutoff)
            sizes, settings = _sizes(projected, width)
            with on_device(x):
                mix[(-(-sizes[0] // ROWS),)](
                    *(of_mixed, projected, filtered, bias, scale, mixed, result, of_scale, *sizes),
                    **settings,
                    **OPTIONS,
                )
        of_bias = result.flatten(0, 2).sum(0)[: len(bias)]
        if x.numel():
            result[..., width : 3 * width] = _filtered(result, width, cutoff)
        of_projected = result.to(dtype)
        return (
            _add_product(grad.flatten(1, 2), of_projected.flatten(1, 2), down).view(x.shape),
            of_projected.flatten(0, 2).t() @ tokens,
            of_bias.to(bias.dtype),
            mixed.flatten(0, 2).t() @ slopes,
            of_scale.sum().to(scale.dtype),
        )


@_forward.register_fake
def _(x: Tensor, down: Tensor, bias: Tensor, up: Tensor, scale: Tensor, cutoff: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:3], len(down)), dtype=down.dtype)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, projected: Tensor, down: Tensor, bias: Tensor, up: Tensor, scale: Tensor, cutoff: int
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, down, bias, up, scale))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *parameters, ctx.cutoff = inputs
    ctx.save_for_backward(x, output[1], *parameters)


def _differentiate(ctx: Any, grad: Tensor, _projected: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.cutoff), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _triton(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor, cutoff: int
) -> Tensor:
    extra = -len(down) % 8  # rows of 16 bytes in half precision, as the tensor cores' products want them
    down, up = (F.pad(t.contiguous(), (0, 0, 0, extra)) for t in autocast(down, torch.cat((up, up_bias))))
    y: Tensor = _forward(x, down, down_bias.contiguous(), up, scale, cutoff)[0]
    return y


def _triton_reason(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor, cutoff: int
) -> str:
    width = len(up) // 3
    if not 0 < width <= WIDEST:
        return f"takes bottlenecks of 1 to {WIDEST} channels, not {width}"
    return unsupported(x) or unsupported(*autocast(x, down, up, up_bias)) or triton_reason(x, cutoff, "square")


def _work(x: Tensor, down: Tensor, *_: Any) -> tuple[Work, Work]:
    """Two products forward, four more backward; the filter adds a few percent."""
    size, tokens = x.element_size() * x.numel(), x.shape[:-1].numel()
    flops = 4 * tokens * down.numel()
    return Work(2 * size, flops), Work(5 * size, 3 * flops)


def _case(batch: int, height: int, width: int, channels: int, dim: int, device: Literal["cpu", "cuda"]) -> Case:
    def make(where: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(batch, height, width, channels, device=where, dtype=dtype)
        shapes = ((3 * dim + 3, channels), (3 * dim + 3,), (3 * dim, channels), (3, channels), ())
        drawn = (torch.randn(shape, device=where, dtype=dtype) * 0.03 for shape in shapes)
        return x, *drawn, int(min(height, width) * 0.3 // 2)

    return Case(f"({batch}, {height}, {width}, {channels}), d = {dim}", device, make)


CASES = (
    _case(1, 32, 32, 1024, 64, "cpu"),
    _case(2, 37, 37, 384, 16, "cpu"),
    _case(32, 32, 32, 1024, 64, "cuda"),
    _case(64, 32, 32, 1024, 16, "cuda"),
    _case(32, 64, 64, 768, 64, "cuda"),
)


def _plain_bottleneck(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, *rest: Any) -> Tensor:
    """One bottleneck of width d, no filter, no router: how little the layer could cost; not the same result."""
    width = len(up) // 3
    hidden = F.relu(F.linear(x, down[:width], down_bias[:width]))
    return x + rest[0] * (hidden @ up[:width] + up_bias[0])


OPERATION = Operation(
    "bottleneck_mixture",
    bottleneck_mixture_reference,
    (Implementation("triton", _triton_reason, _triton),),
    _work,
    CASES,
    {"direct": bottleneck_mixture_direct, "plain bottleneck": _plain_bottleneck},
)
