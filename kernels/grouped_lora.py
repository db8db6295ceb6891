"""Low-rank updates of a batch in which every item has its own: many LoRA adapters in one forward.

Equation (g: the item's adapter, A_g: (r, C), B_g: (O, r), s_g its scale; no update where g is -1):
    y_b = base_b + s_g (x_b A_gᵀ) B_gᵀ
LoRA: https://arxiv.org/abs/2106.09685; batches of several adapters: S-LoRA, https://arxiv.org/abs/2311.03285.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vfmadapt.kernels._dispatch import Case, Implementation, Operation, Work, autocast
from vfmadapt.kernels._triton import OPTIONS, jit, on_device, operand, unsupported

if TYPE_CHECKING:
    import triton.language as tl
    from triton.language import constexpr

WIDEST = 128  # ranks; what a program keeps in registers


def grouped_lora(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, group: Tensor) -> Tensor:
    """Add to each item of a batch the update of its own adapter.

    Adapters of smaller rank are padded with zeros. There is no loop over adapters, and no weight is copied per token.

    Args:
        base: (B, N, O), what the frozen layer gives; any floating dtype.
        x: (B, N, C), its input.
        down: (G, r, C), A.
        up: (G, O, r), B.
        scale: (G,), s.
        group: (B,) whole numbers from -1 to G - 1; -1 adds nothing. They are not checked, which would wait for the GPU.

    Returns:
        y: (B, N, O), dtype of base.

    Raises:
        ValueError: the shapes do not fit, or G is 0.
    """
    _check(base, x, down, up, scale, group)
    y: Tensor = OPERATION(base, x, down, up, scale, group)
    return y


def grouped_lora_reference(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, group: Tensor) -> Tensor:
    """Gather each item's factors and multiply them as a batch; same arguments."""
    _check(base, x, down, up, scale, group)
    chosen = group.clamp_min(0)
    scales = torch.where(group < 0, 0, scale[chosen]).view(-1, 1, 1)
    hidden = torch.bmm(x, down[chosen].mT)
    return base + torch.bmm((scales * hidden).to(x.dtype), up[chosen].mT).to(base.dtype)


def _check(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, group: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (base, x, down, up, scale, group)]
    fit = x.ndim == base.ndim == down.ndim == 3 and len(down) > 0
    if not fit or shapes != [
        (*x.shape[:2], base.shape[2]),
        (*x.shape[:2], x.shape[2]),
        (len(down), down.shape[1], x.shape[2]),
        (len(down), base.shape[2], down.shape[1]),
        (len(down),),
        (len(x),),
    ]:
        raise ValueError(f"grouped_lora: base, x, down, up, scale, group {shapes} do not fit")


# A program takes `rows` tokens of one item: it reads x once, keeps their hidden tokens (rows, r) in registers, and goes
# through the outputs once, adding to base. At ranks of 8 to 64 that is r operations a byte of half precision, far below
# the 150 to 300 at which an A100 or H100 is no longer bound by memory. So: loads of 128 bytes of each row, and few
# tokens a program, so that it needs few registers and even a single item fills the GPU.
def _update_kernel(
    base: tl.tensor,
    x: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    scale: tl.tensor,
    group: tl.tensor,
    y: tl.tensor,
    hidden: tl.tensor,
    tokens: int,
    channels: int,
    outputs: int,
    rank: int,
    base_item: int,
    base_token: int,
    base_output: int,
    x_item: int,
    x_token: int,
    x_channel: int,
    down_group: int,
    down_rank: int,
    down_channel: int,
    up_group: int,
    up_output: int,
    up_rank: int,
    operand: constexpr,
    padded: constexpr,
    rows: constexpr,
    columns: constexpr,
) -> None:
    blocks = tl.cdiv(tokens, rows)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * rows + tl.arange(0, rows)[:, None].to(tl.int64)
    column = tl.arange(0, columns)
    r = tl.arange(0, padded)
    inside = row < tokens
    chosen = tl.load(group + item).to(tl.int64)
    on = chosen >= 0

    narrow = tl.zeros((rows, padded), tl.float32)
    if on:
        for first in range(0, channels, columns):
            c = first + column
            a = tl.load(
                x + item * x_item + row * x_token + c[None, :] * x_channel,
                mask=inside & (c[None, :] < channels),
                other=0.0,
            )
            w = tl.load(
                down + chosen * down_group + c[:, None] * down_channel + r[None, :] * down_rank,
                mask=(c[:, None] < channels) & (r[None, :] < rank),
                other=0.0,
            )
            narrow = tl.dot(a.to(operand), w.to(operand), narrow, input_precision="ieee")
    tl.store(
        hidden + (item * tokens + row) * rank + r[None, :],
        narrow.to(hidden.dtype.element_ty),
        mask=inside & (r[None, :] < rank),
    )
    factor = tl.load(scale + chosen, mask=on, other=0.0).to(tl.float32)
    scaled = (factor * narrow).to(x.dtype.element_ty).to(operand)

    for first in range(0, outputs, columns):
        o = first + column[None, :]
        mask = inside & (o < outputs)
        total = tl.load(base + item * base_item + row * base_token + o * base_output, mask=mask, other=0.0)
        total = total.to(tl.float32)
        if on:
            w = tl.load(
                up + chosen * up_group + o * up_output + r[:, None] * up_rank,
                mask=(o < outputs) & (r[:, None] < rank),
                other=0.0,
            )
            total = tl.dot(scaled, w.to(operand), total, input_precision="ieee")
        tl.store(y + (item * tokens + row) * outputs + o, total.to(y.dtype.element_ty), mask=mask)


_TRITON = (_update_kernel,)
ROWS = 32


@torch.library.custom_op("vfmadapt::grouped_lora", mutates_args=())
def _update(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and what each item's A makes of x: (B, N, r), zeros where there is no adapter."""
    (items, tokens, channels), rank, outputs = x.shape, down.shape[1], base.shape[2]
    y, hidden = _empty(base, x, down, up, scale, group)
    (kernel,) = jit(_TRITON)
    with on_device(x):
        kernel[(items * -(-tokens // ROWS),)](
            *(base, x, down, up, scale, group, y, hidden, tokens, channels, outputs, rank),
            *(*base.stride(), *x.stride(), *down.stride(), *up.stride()),
            operand=operand(x.dtype),
            padded=max(16, 1 << (rank - 1).bit_length()),  # the least that the tensor cores take
            rows=ROWS,
            columns=128 // x.element_size(),
            **OPTIONS,
        )
    return y, hidden


@_update.register_fake
def _empty(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), x.new_empty(*x.shape[:2], down.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:], output[1])


def _backward(ctx: Any, grad: Tensor, _hidden: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, scale, group, hidden = ctx.saved_tensors
    narrow = grad.to(x.dtype)
    # the gradient of x is an update, too: of nothing, by Aᵀ after Bᵀ
    x_grad, back = _update(narrow.new_zeros(()).expand(x.shape), narrow, up.mT, down.mT, scale, group)
    chosen = group.clamp_min(0)
    scales = scale[chosen].view(-1, 1, 1).to(x.dtype)
    down_grad = torch.zeros_like(down).index_add(0, chosen, torch.bmm((scales * back).mT, x))
    up_grad = torch.zeros_like(up).index_add(0, chosen, torch.bmm(narrow.mT, scales * hidden))
    products = (hidden.double() * back).sum((1, 2)).to(scale.dtype)
    return grad, x_grad, down_grad, up_grad, torch.zeros_like(scale).index_add(0, chosen, products), None


_update.register_autograd(_backward, setup_context=_save)


def _triton(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, group: Tensor) -> Tensor:
    y: Tensor = _update(base, *autocast(x, down, up), scale, group)[0]
    return y


def _triton_reason(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, group: Tensor) -> str:
    if not 0 < down.shape[1] <= WIDEST:
        return f"takes ranks of 1 to {WIDEST}, not {down.shape[1]}"
    return unsupported(base) or unsupported(*autocast(x, down, up))


def _work(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, group: Tensor) -> tuple[Work, Work]:
    tokens, size = x.shape[0] * x.shape[1], x.element_size()
    weights = down.numel() + up.numel()
    flops = 2 * tokens * down.shape[1] * (x.shape[2] + base.shape[2])
    forward = Work(size * (x.numel() + 2 * base.numel() + weights), flops)
    both = Work(forward.bytes + size * (2 * x.numel() + base.numel() + 2 * weights), 3 * flops)
    return forward, both


def _case(label: str, device: Literal["cpu", "cuda"], items: int, tokens: int, channels: int, rank: int) -> Case:
    def make(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        adapters = 4
        shapes = [(items, tokens, channels)] * 2 + [(adapters, rank, channels), (adapters, channels, rank), (adapters,)]
        drawn = [torch.randn(shape, device=where, dtype=dtype) for shape in shapes]
        return *drawn, torch.arange(items, device=where) % adapters

    return Case(label, device, make)


CASES = [
    _case("8 x 197 tokens, 768 channels, rank 8", "cpu", 8, 197, 768, 8),
    _case("2 x 1024 tokens, 1024 channels, rank 16", "cpu", 2, 1024, 1024, 16),
    _case("64 x 1024 tokens, 1024 channels, rank 8", "cuda", 64, 1024, 1024, 8),
    _case("256 x 257 tokens, 768 channels, rank 64", "cuda", 256, 257, 768, 64),
]
OPERATION = Operation(
    "grouped_lora", grouped_lora_reference, (Implementation("triton", _triton_reason, _triton),), _work, CASES
)
