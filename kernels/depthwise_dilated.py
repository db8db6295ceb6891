"""Depthwise convolutions of several dilations on a token grid, each through a GELU, summed: the middle of DD-Adapter.

Equation: m = Σ_i GELU(W_i *_{d_i} x + b_i), where *_d is the depthwise 3 x 3 convolution of dilation d, zero-padded so
that the grid keeps its size. Source: DD-SAM2, https://arxiv.org/abs/2507.14613.

Backward, with u_i = W_i *_{d_i} x + b_i made anew: δ_i = GELU'(u_i) ∂m, ∂x = Σ_i (W_i turned by 180°) *_{d_i} δ_i,
∂W_i[t] = Σ δ_i · (x shifted by tap t), ∂b_i = Σ δ_i. No δ_i is ever whole in memory on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.kernels import _nvrtc, _triton
from vfmadapt.kernels._dispatch import Case, Implementation, Operation, Work, autocast

if TYPE_CHECKING:
    import triton.language as tl
    from triton.language import constexpr

HALF = (torch.bfloat16, torch.float16)
THREADS = 256  # of a block in csrc/depthwise_dilated.cu
FEW = 2**16  # values of a grid; measured with dilations 1 and 3 on AVX2: 0.8 times as fast at 2**14, 1.6 times at 2**17
WARPS = 8  # of a Triton program, see `_triton_tile`
PROGRAMS = 4  # to a multiprocessor in Triton's and CUDA's backward passes, whose weights' sums are per program
SHARED_BYTES = 48 * 1024 - 4 * THREADS  # what every GPU gives a block without being asked
OFFSETS = 2**31  # offsets inside one image are 32-bit


def depthwise_dilated(
    x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int], activated: bool = True
) -> Tensor:
    """Sum of the GELUs of R depthwise convolutions of one grid, or of the convolutions themselves.

    The grid may lie in memory as (B, h, w, C), which torch calls channels-last, or as a view of (B, C, h, w): nothing
    is permuted. Differentiable once; VFMADAPT_KERNELS=reference is differentiable any number of times.

    Args:
        x: (B, h, w, C), any floating dtype.
        weight: (R, C, 3, 3).
        bias: (R, C).
        dilations: d_i, R whole numbers of at least 1.
        activated: whether each convolution passes a GELU.

    Returns:
        m: (B, h, w, C), in memory as x is.

    Raises:
        ValueError: the shapes do not fit.
    """
    channels, rates = x.shape[-1], len(dilations)
    if x.ndim != 4 or not rates or weight.shape != (rates, channels, 3, 3) or bias.shape != (rates, channels):
        shapes = f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, {rates} dilations"
        raise ValueError(f"depthwise_dilated: {shapes} do not fit x {tuple(x.shape)}")
    return OPERATION(x, weight, bias, dilations, activated)


def depthwise_dilated_reference(
    x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int], activated: bool = True
) -> Tensor:
    """The equation in plain PyTorch, same arguments."""
    return _sum(_convolution, x, weight, bias, dilations, activated)


def _sum(
    convolve: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dilations: Sequence[int],
    activated: bool,
) -> Tensor:
    maps = x.permute(0, 3, 1, 2)
    branches = zip(weight.unsqueeze(2).unbind(), bias.unbind(), dilations, strict=True)
    first, *rest = (F.gelu(u) if activated else u for u in (convolve(maps, w, b, d) for w, b, d in branches))
    for term in rest:
        first = first.add_(term)  # GELU's gradient needs its input only
    return first.permute(0, 2, 3, 1)


def _convolution(maps: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return F.conv2d(maps, weight, bias, padding=dilation, dilation=dilation, groups=maps.shape[1])


class _ByForwardPasses(torch.autograd.Function):
    """A dilated convolution whose gradients on a CPU do not take 10 to 40 times its own time, as torch's do.

    The input's gradient is itself a depthwise convolution, of the kind for which torch's forward pass is fast.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.dilation = dilation
        return _convolution(maps, weight, bias, dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        (maps, weight), d = ctx.saved_tensors, ctx.dilation
        taps = [_correlation(maps, delta, d * down, d * right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        of_maps = _convolution(delta, weight.flip(2, 3), None, d)
        return of_maps, torch.stack(taps, 1).view(weight.shape), delta.sum((0, 2, 3)), None


def _cpu(x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int], activated: bool = True) -> Tensor:
    """Torch's own gradients at dilation 1, where they are as fast."""

    def convolve(maps: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        run = _convolution if dilation == 1 else _ByForwardPasses.apply
        return run(maps, weight, bias, dilation)

    return _sum(convolve, x, weight, bias, dilations, activated)


def _correlation(maps: Tensor, delta: Tensor, down: int, right: int) -> Tensor:
    """Σ over pixels of delta times the map moved by (down, right): (C,)."""
    height, width = maps.shape[2:]
    if abs(down) >= height or abs(right) >= width:
        return maps.new_zeros(maps.shape[1])
    rows, columns = height - abs(down), width - abs(right)
    moved = maps[:, :, max(down, 0) :, max(right, 0) :][:, :, :rows, :columns]
    return (moved * delta[:, :, max(-down, 0) :, max(-right, 0) :][:, :, :rows, :columns]).sum((0, 2, 3))


def _cpu_reason(x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int], activated: bool) -> str:
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, weight, bias)):
        return "only gradients go another way, and none is wanted"
    if max(dilations) == 1:
        return "torch's own gradients are as fast at dilation 1"
    if x.dtype in HALF or torch.is_autocast_enabled("cpu"):
        return "the weights' gradients would be summed in half precision"
    if x.numel() < FEW:
        return f"below {FEW} values the calls cost more than they save"
    return ""


def _forward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    height: int,
    width: int,
    channels: int,
    x_b: int,
    x_y: int,
    x_x: int,
    x_c: int,
    out_b: int,
    out_y: int,
    out_x: int,
    out_c: int,
    dilations: constexpr,
    activated: constexpr,
    lanes: constexpr,
    rows: constexpr,
    columns: constexpr,
) -> None:
    """One tile of one block of channels."""
    blocks = tl.cdiv(channels, lanes)
    tile = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * lanes + tl.arange(0, lanes)
    batch, y, x_at = _place(tile, height, width, rows, columns)
    total = tl.zeros((rows * columns, lanes), tl.float32)
    for r in tl.static_range(len(dilations)):
        total += _activation(
            _branch(x + batch * x_b, weight, bias, r, dilations[r], y, x_at, c, height, width, channels, x_y, x_x, x_c),
            activated,
        )
    keep = ((y < height) & (x_at < width))[:, None] & (c < channels)[None, :]
    at = (y * out_y + x_at * out_x)[:, None] + (c * out_c)[None, :]
    tl.store(out + batch * out_b + at, total.to(out.dtype.element_ty), mask=keep)


def _backward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    grad: tl.tensor,
    result: tl.tensor,
    partial_sums: tl.tensor,
    scratch: tl.tensor,
    tiles: int,
    splits: int,
    height: int,
    width: int,
    channels: int,
    x_b: int,
    x_y: int,
    x_x: int,
    x_c: int,
    grad_b: int,
    grad_y: int,
    grad_x: int,
    grad_c: int,
    out_b: int,
    out_y: int,
    out_x: int,
    out_c: int,
    dilations: constexpr,
    widest: constexpr,
    activated: constexpr,
    lanes: constexpr,
    rows: constexpr,
    columns: constexpr,
) -> None:
    """Every `splits`-th tile of one block of channels.

    For each branch δ is made on the tile and a margin of its dilation, into a scratch of the program's own that stays
    in the cache; the input's gradient gathers from there. The weights' sums are kept in memory, again the program's.
    """
    pixels: constexpr = rows * columns
    blocks = tl.cdiv(channels, lanes)
    lane = tl.arange(0, lanes)
    c = tl.program_id(0) % blocks * lanes + lane
    split = tl.program_id(0) // blocks
    known = c < channels
    own = scratch + tl.program_id(0).to(tl.int64) * ((rows + 2 * widest) * (columns + 2 * widest) * lanes)
    sums = partial_sums + split.to(tl.int64) * (len(dilations) * 10 * channels)
    p = tl.arange(0, pixels)
    for tile in range(split, tiles, splits):
        batch, y, x_at = _place(tile, height, width, rows, columns)
        top = tl.min(y)
        left = tl.min(x_at)
        image = x + batch * x_b
        total = tl.zeros((pixels, lanes), tl.float32)
        for r in tl.static_range(len(dilations)):
            across = columns + 2 * dilations[r]
            count = across * (rows + 2 * dilations[r])
            tl.debug_barrier()  # the last branch's readers are done
            for start in range(0, count, pixels):
                q = start + p
                y_q = top - dilations[r] + q // across
                x_q = left - dilations[r] + q % across
                u = _branch(image, weight, bias, r, dilations[r], y_q, x_q, c, height, width, channels, x_y, x_x, x_c)
                slope = _shifted(grad + batch * grad_b, y_q, x_q, c, height, width, channels, grad_y, grad_x, grad_c)
                delta = slope * _activation_slope(u, activated)  # zero outside of the image, where the slope is
                tl.store(own + q[:, None] * lanes + lane[None, :], delta, mask=(q < count)[:, None])
            tl.debug_barrier()
            here = own + ((p // columns + dilations[r]) * across + p % columns + dilations[r])[:, None] * lanes
            here += lane[None, :]
            delta_here = tl.load(here)
            for row in range(3):
                for column in tl.static_range(3):
                    w = tl.load(weight + (r * channels + c) * 9 + row * 3 + column, mask=known, other=0).to(tl.float32)
                    down = dilations[r] * (row - 1)
                    right = dilations[r] * (column - 1)
                    total += w[None, :] * tl.load(here - (down * across + right) * lanes)
                    moved = _shifted(image, y + down, x_at + right, c, height, width, channels, x_y, x_x, x_c)
                    _add(sums + (r * 10 + row * 3 + column) * channels + c, tl.sum(delta_here * moved, 0), known)
            _add(sums + (r * 10 + 9) * channels + c, tl.sum(delta_here, 0), known)
        keep = ((y < height) & (x_at < width))[:, None] & known[None, :]
        at = (y * out_y + x_at * out_x)[:, None] + (c * out_c)[None, :]
        tl.store(result + batch * out_b + at, total.to(result.dtype.element_ty), mask=keep)


def _place(
    tile: tl.tensor, height: int, width: int, rows: constexpr, columns: constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Image (64-bit, as its offset must be), rows and columns of the pixels of a tile."""
    across = tl.cdiv(width, columns)
    down = tl.cdiv(height, rows)
    p = tl.arange(0, rows * columns)
    within = tile % (across * down)
    batch = (tile // (across * down)).to(tl.int64)
    return batch, within // across * rows + p // columns, within % across * columns + p % columns


def _shifted(
    image: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    c: tl.tensor,
    height: int,
    width: int,
    channels: int,
    by_y: int,
    by_x: int,
    by_c: int,
) -> tl.tensor:
    """Pixels (y, x) of channels c of an image, zero outside."""
    inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None] & (c < channels)[None, :]
    return tl.load(image + (y * by_y + x * by_x)[:, None] + (c * by_c)[None, :], mask=inside, other=0).to(tl.float32)


def _branch(
    image: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    r: constexpr,
    dilation: constexpr,
    y: tl.tensor,
    x: tl.tensor,
    c: tl.tensor,
    height: int,
    width: int,
    channels: int,
    by_y: int,
    by_x: int,
    by_c: int,
) -> tl.tensor:
    """u_r at pixels (y, x)."""
    known = c < channels
    u = tl.zeros((y.shape[0], c.shape[0]), tl.float32)
    u += tl.load(bias + r * channels + c, mask=known, other=0).to(tl.float32)[None, :]
    for row in range(3):  # unrolled too, the code would outgrow the instruction cache
        for column in tl.static_range(3):
            w = tl.load(weight + (r * channels + c) * 9 + row * 3 + column, mask=known, other=0).to(tl.float32)
            down = dilation * (row - 1)
            right = dilation * (column - 1)
            u += w[None, :] * _shifted(image, y + down, x + right, c, height, width, channels, by_y, by_x, by_c)
    return u


def _activation(u: tl.tensor, activated: constexpr) -> tl.tensor:
    if activated:
        u = 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))
    return u


def _activation_slope(u: tl.tensor, activated: constexpr) -> tl.tensor:
    if activated:
        slope = 0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:
        slope = u * 0 + 1
    return slope


def _add(to: tl.tensor, values: tl.tensor, mask: tl.tensor) -> None:
    """No atomics: nobody else writes there, so that sums come in one order."""
    tl.store(to, tl.load(to, mask=mask, other=0) + values, mask=mask)


_TRITON = (
    _place,
    _shifted,
    _branch,
    _activation,
    _activation_slope,
    _add,
    _forward_kernel,
    _backward_kernel,
)


def _power(size: int, limit: int) -> int:
    """The least power of two that holds `size`, up to `limit`."""
    return min(1 << max(size - 1, 0).bit_length(), limit)


class Tile(NamedTuple):
    """What a program or block computes at a time: channels x rows x columns."""

    lanes: int
    rows: int
    columns: int

    def margin(self, widest: int) -> int:
        """Values of the tile and a margin around it."""
        return self.lanes * (self.rows + 2 * widest) * (self.columns + 2 * widest)

    def counts(self, x: Tensor) -> tuple[int, int]:
        """How many tiles all images have, and how many blocks of channels."""
        batch, height, width, channels = x.shape
        return batch * -(-height // self.rows) * -(-width // self.columns), -(-channels // self.lanes)


def _triton_tile(x: Tensor) -> Tile:
    """A program's 2048 values, 8 to a thread of 8 warps.

    In half precision that is one load of 16 bytes a tap, and the forward pass takes 80 registers, so that 24 warps of
    an SM hide the latency of memory; with 4 warps it were 128 and 16. Of 9 R taps per value all but the tile's margin
    come from the L1 cache, and 8 x 8 pixels have the least margin. A warp reads along the contiguous axis: 32 channels,
    or columns of one channel.
    """
    _, height, width, channels = x.shape
    last = x.stride(3) == 1 or channels == 1
    lanes = _power(channels, 32) if last else 1
    columns = _power(width, 8 if last else 64)
    return Tile(lanes, _power(height, 2048 // lanes // columns), columns)


def _splits(x: Tensor, tiles: int, blocks: int) -> int:
    """Into how many lots the tiles of a backward pass are shared out: enough to fill the GPU."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return min(tiles, -(-PROGRAMS * processors // blocks))


def _triton_forward(x: Tensor, weight: Tensor, bias: Tensor, dilations: list[int], activated: bool) -> Tensor:
    out, tile = torch.empty_like(x), _triton_tile(x)
    tiles, blocks = tile.counts(x)
    *_, forward, _ = _triton.jit(_TRITON)
    args = (x, weight, bias, out, *x.shape[1:], *x.stride(), *out.stride(), tuple(dilations), activated, *tile)
    with _triton.on_device(x):
        forward[(tiles * blocks,)](*args, num_warps=WARPS, **_triton.OPTIONS)
    return out


def _triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dilations: list[int], activated: bool
) -> tuple[Tensor, Tensor]:
    out, tile, widest = torch.empty_like(x), _triton_tile(x), max(dilations)
    tiles, blocks = tile.counts(x)
    splits = _splits(x, tiles, blocks)
    sums = x.new_zeros(splits, len(dilations), 10, x.shape[3], dtype=torch.float32)
    scratch = x.new_empty(splits * blocks * tile.margin(widest), dtype=torch.float32)
    tensors = (x, weight, bias, grad, out, sums, scratch)
    sizes = (tiles, splits, *x.shape[1:], *x.stride(), *grad.stride(), *out.stride())
    *_, backward = _triton.jit(_TRITON)
    with _triton.on_device(x):
        backward[(splits * blocks,)](
            *tensors, *sizes, tuple(dilations), widest, activated, *tile, num_warps=WARPS, **_triton.OPTIONS
        )
    return out, sums


def _cuda_tile(x: Tensor, widest: int) -> Tile | None:
    """A block's 2048 values, 8 to a thread, or None where no tile's margin fits into shared memory.

    A thread's 8 values lie side by side, so that at dilation 1 they share more than half of their loads. A block takes
    32 channels and 8 x 8 pixels; fewer channels and more rows where margins are wide; 64 rows and 32 columns of one
    channel at last, and where the channels are not the contiguous axis.
    """
    most = _power(x.shape[3], 32) if x.stride(3) == 1 else 1
    tiles = [Tile(n, THREADS // n, 8) for n in (32, 16, 8, 4, 2) if n <= most]
    return next((t for t in (*tiles, Tile(1, 64, 32)) if 4 * t.margin(widest) <= SHARED_BYTES), None)


def _cuda_plan(x: Tensor, dilations: Sequence[int], activated: bool) -> tuple[dict[str, object], int, int]:
    """Macros, and the counts of tiles and of blocks of channels."""
    tile = _cuda_tile(x, max(dilations))
    assert tile is not None  # `_cuda_reason`
    macros = {
        "SCALAR": _nvrtc.SCALARS[x.dtype],
        "RATES": len(dilations),
        "DILATIONS": ",".join(map(str, dilations)),
        "WIDEST": max(dilations),
        "ACTIVATED": int(activated),
        "CHANNELS": tile.lanes,
        "TILE_Y": tile.rows,
        "TILE_X": tile.columns,
        "ALONG_X": int(tile.lanes > 1),
    }
    return macros, *tile.counts(x)


def _cuda_forward(x: Tensor, weight: Tensor, bias: Tensor, dilations: list[int], activated: bool) -> Tensor:
    out = torch.empty_like(x)
    macros, tiles, blocks = _cuda_plan(x, dilations, activated)
    args = (x, weight, bias, out, *x.shape[1:], *x.stride(), *out.stride())
    _nvrtc.launch("depthwise_dilated:forward", macros, (tiles * blocks,), THREADS, args)
    return out


def _cuda_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dilations: list[int], activated: bool
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    macros, tiles, blocks = _cuda_plan(x, dilations, activated)
    splits = _splits(x, tiles, blocks)
    sums = x.new_empty(splits, len(dilations), 10, x.shape[3], dtype=torch.float32)
    args = (x, weight, bias, grad, out, sums, tiles, *x.shape[1:], *x.stride(), *grad.stride(), *out.stride())
    _nvrtc.launch("depthwise_dilated:backward", macros, (splits * blocks,), THREADS, args)
    return out, sums


def _gpu_reason(x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int], activated: bool) -> str:
    x, weight, bias = autocast(x, weight, bias)
    if reason := _triton.unsupported(x, weight, bias):
        return reason
    if sum((n - 1) * abs(by) for n, by in zip(x.shape[1:], x.stride()[1:], strict=True)) >= OFFSETS:
        return "offsets inside one image need more than 32 bits"
    return ""


def _cuda_reason(x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int], activated: bool) -> str:
    reason = _gpu_reason(x, weight, bias, dilations, activated)
    return reason or (
        "" if _cuda_tile(x, max(dilations)) else f"dilation {max(dilations)} takes too much shared memory"
    )


def _operator(
    name: str, forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., Tensor]:
    """The differentiable operator vfmadapt::depthwise_dilated_NAME of a pair of launches."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, dilations: list[int], activated: bool) -> Tensor:
        if not x.numel():
            return torch.empty_like(x)
        return forward(x, weight.contiguous(), bias.contiguous(), dilations, activated)

    def run_backward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dilations: list[int], activated: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not x.numel():
            return torch.empty_like(x), weight.new_zeros(weight.shape), bias.new_zeros(bias.shape)
        of_x, sums = backward(grad, x, weight.contiguous(), bias.contiguous(), dilations, activated)
        total = sums.sum(0)
        of_weight, of_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
        of_weight.flatten(2).copy_(total[:, :9].transpose(1, 2))
        return of_x, of_weight, of_bias.copy_(total[:, 9])

    operator = torch.library.custom_op(f"vfmadapt::depthwise_dilated_{name}", run, mutates_args=())
    gradient = torch.library.custom_op(f"vfmadapt::depthwise_dilated_{name}_backward", run_backward, mutates_args=())

    @operator.register_fake
    def _(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    @gradient.register_fake
    def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.settings = inputs[3:]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *gradient(grad, *ctx.saved_tensors, *ctx.settings), None, None

    operator.register_autograd(differentiate, setup_context=keep)
    return operator


def _call(
    operator: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int], activated: bool
) -> Tensor:
    return operator(*autocast(x, weight, bias), list(dilations), activated)


TRITON = _operator("triton", _triton_forward, _triton_backward)
CUDA = _operator("cuda", _cuda_forward, _cuda_backward)


def _work(
    x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int], activated: bool = True
) -> tuple[Work, Work]:
    """A multiply-add per tap and ten operations per GELU; backward: δ's taps again, then two products per tap."""
    size = x.numel() * x.element_size()
    flops = x.numel() * len(dilations) * (18 + 10 * activated)
    return Work(2 * size, flops), Work(5 * size, flops + x.numel() * len(dilations) * (54 + 15 * activated))


def _case(
    batch: int, size: int, channels: int, dilations: tuple[int, ...] = (1, 3), planar: bool = False
) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        shapes = ((len(dilations), channels, 3, 3), (len(dilations), channels), (batch, size, size, channels))
        weight, bias, x = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if planar else x
        return x, weight / 3, bias, dilations, True

    return make


STAGES = ((128, 48), (64, 96), (32, 192), (16, 384))  # grid and half the width: SAM2's Hiera-T at 512 pixels
CASES = (
    *(Case(f"SAM2-T stage {i}: 1 x {n} x {n} x {c}", "cpu", _case(1, n, c)) for i, (n, c) in enumerate(STAGES, 1)),
    Case("SAM2-T stage 2, dilation 1", "cpu", _case(1, 64, 96, (1,))),
    Case("SAM2-T stage 2, (B, C, h, w)", "cpu", _case(1, 64, 96, planar=True)),
    *(
        Case(f"SAM2-T stage {i}: {b} x {n} x {n} x {c}", "cuda", _case(b, n, c))
        for i, (b, (n, c)) in enumerate(zip((64, 128, 256, 512), STAGES, strict=True), 1)
    ),
    Case("SAM2-T stage 2, (B, C, h, w)", "cuda", _case(128, 64, 96, planar=True)),
)


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor, dilations: Sequence[int], activated: bool) -> Tensor:
    """The reference with cuDNN's convolutions, where torch would choose its own kernels."""

    def convolve(maps: Tensor, weight: Tensor, bias: Tensor, d: int) -> Tensor:
        found = torch.cudnn_convolution(maps, weight, (d, d), (1, 1), (d, d), maps.shape[1], True, False, False)
        return found + bias[:, None, None]

    return _sum(convolve, x, weight, bias, dilations, activated)


OPERATION = Operation(
    "depthwise_dilated",
    depthwise_dilated_reference,
    (
        Implementation("cpu", _cpu_reason, _cpu),
        Implementation("triton", _gpu_reason, partial(_call, TRITON)),
        Implementation("cuda", _cuda_reason, partial(_call, CUDA)),
    ),
    _work,
    CASES,
    {"cuDNN": _cudnn},
)
