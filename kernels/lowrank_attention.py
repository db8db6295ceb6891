"""Multi-head cross-attention whose projections have rank r: the interaction of Cloud-Adapter.

Equations (q, k, v: inputs already projected to r channels; U_h, K_h, V_h: (d, r), head h's rows of the widening
projections; O_h: (r, d), its columns of the narrowing one):
    P_h = softmax(q U_hᵀ K_h kᵀ / √d)
    y   = Σ_h P_h v V_hᵀ O_hᵀ
Source: Cloud-Adapter, https://arxiv.org/abs/2411.13127.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.kernels._dispatch import Case, Implementation, Operation, Work, autocast
from vfmadapt.kernels._triton import OPTIONS, jit, on_device, operand, unsupported

if TYPE_CHECKING:
    import triton.language as tl
    from triton.language import constexpr

WIDEST = 128  # ranks; what a program keeps in registers


def lowrank_attention(
    q: Tensor, k: Tensor, v: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int
) -> Tensor:
    """Attend among r channels instead of d: exact, and r / d of the work where r is below d.

    The weights that stand between two narrow tensors are multiplied first: G_h = U_hᵀ K_h / √d and M_h = V_hᵀ O_hᵀ,
    (r, r) each. Then y = Σ_h softmax((q G_h) kᵀ) v M_h, with keys and values that all heads share.

    Args:
        q: (B, N, r), any floating dtype.
        k: (B, M, r).
        v: (B, M, r).
        q_up: (heads · d, r), the rows of U_1, U_2, ...
        k_up: (heads · d, r), of K.
        v_up: (heads · d, r), of V.
        down: (r, heads · d), the columns of O.
        heads: number of heads.

    Returns:
        y: (B, N, r).

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(q, k, v, q_up, k_up, v_up, down, heads)
    y: Tensor = OPERATION(q, k, v, q_up, k_up, v_up, down, heads)
    return y


def lowrank_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int
) -> Tensor:
    """Attend among r channels in plain PyTorch; same arguments."""
    queries, mix = _narrowed(q, q_up, k_up, v_up, down, heads)
    # one head to a view, not one long head of all queries: backward passes run in parallel over heads
    keys, values = (t.unsqueeze(1).expand(-1, heads, -1, -1) for t in (k, v))
    attended = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, scale=1.0)
    return attended.transpose(1, 2).flatten(2) @ mix


def lowrank_attention_direct(
    q: Tensor, k: Tensor, v: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int
) -> Tensor:
    """Attend as published, among the d channels of each head: the oracle, same arguments."""
    _check(q, k, v, q_up, k_up, v_up, down, heads)
    queries, keys, values = (
        F.linear(t, up).unflatten(-1, (heads, -1)).transpose(1, 2) for t, up in ((q, q_up), (k, k_up), (v, v_up))
    )
    attended = F.scaled_dot_product_attention(queries, keys, values)
    return F.linear(attended.transpose(1, 2).flatten(2), down)


def _narrowed(q: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The queries q G_h of all heads, (B, N, heads, r), and M_1, M_2, ... as one (heads · r, r)."""
    q_head, k_head, v_head = (t.unflatten(0, (heads, -1)) for t in (q_up, k_up, v_up))
    score = q_head.transpose(1, 2) @ k_head * q_head.shape[1] ** -0.5  # (heads, r, r)
    mix = v_head.transpose(1, 2) @ down.t().unflatten(0, (heads, -1))
    return (q @ score.transpose(0, 1).flatten(1)).unflatten(-1, (heads, -1)), mix.flatten(0, 1)


def _check(q: Tensor, k: Tensor, v: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int) -> None:
    rank, inner = down.shape
    fit = q.ndim == k.ndim == 3 and q.shape[-1] == k.shape[-1] == rank and q.shape[0] == k.shape[0]
    fit = fit and k.shape == v.shape and q_up.shape == k_up.shape == v_up.shape == (inner, rank)
    if not fit or heads < 1 or inner % heads:
        shapes = [tuple(t.shape) for t in (q, k, v, q_up, k_up, v_up, down)]
        raise ValueError(f"lowrank_attention: q, k, v, q_up, k_up, v_up, down {shapes} do not fit {heads} heads")


# The products around the attention are a few matrix products of torch's; the kernels are the attention itself, whose
# keys and values all heads share. At rank 16 each score costs one exponential and 64 operations: the exponentials
# (16 a cycle on a multiprocessor of an A100 or H100) bound it, not tensor cores or memory, which holds no scores. So
# 64 queries by 64 keys on 4 warps, whose scores are 32 registers a thread, leave room for several programs on a
# multiprocessor; float32, whose products run without tensor cores, takes 32 by 32.
def _tile(start: tl.tensor, row: tl.tensor, rows: int, stride: int, rank: int, padded: constexpr) -> tl.tensor:
    r = tl.arange(0, padded)
    at = row.to(tl.int64)[:, None] * stride + r[None, :]
    return tl.load(start + at, mask=(row < rows)[:, None] & (r < rank)[None, :], other=0.0)


def _keep(start: tl.tensor, value: tl.tensor, row: tl.tensor, rows: int, stride: int, rank: int) -> None:
    r = tl.arange(0, value.shape[1])
    at = row.to(tl.int64)[:, None] * stride + r[None, :]
    tl.store(start + at, value.to(start.dtype.element_ty), mask=(row < rows)[:, None] & (r < rank)[None, :])


def _attend_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    norm: tl.tensor,
    queries: int,
    keys: int,
    heads: int,
    rank: int,
    operand: constexpr,
    padded: constexpr,
    block: constexpr,
    log2_e: constexpr,
) -> None:
    blocks = tl.cdiv(queries, block)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # of all images
    first = head // heads * queries * heads + head % heads  # the head's first query
    row = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    keys_at, values_at = k + head // heads * keys * rank, v + head // heads * keys * rank
    a = _tile(q + first * rank, row, queries, heads * rank, rank, padded).to(operand)
    top = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    found = tl.zeros((block, padded), tl.float32)
    for start in range(0, keys, block):
        key = start + tl.arange(0, block)
        b = _tile(keys_at, key, keys, rank, rank, padded).to(operand)
        score = tl.dot(a, tl.trans(b), input_precision="ieee") * log2_e
        score = tl.where((key < keys)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        c = _tile(values_at, key, keys, rank, rank, padded).to(operand)
        found = tl.dot(weight.to(v.dtype.element_ty).to(operand), c, found * shrink[:, None], input_precision="ieee")
        top = higher
    _keep(out + first * rank, found / total[:, None], row, queries, heads * rank, rank)
    tl.store(norm + first + row.to(tl.int64) * heads, top + tl.log2(total), mask=row < queries)


def _query_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    norm: tl.tensor,
    delta: tl.tensor,
    q_grad: tl.tensor,
    queries: int,
    keys: int,
    heads: int,
    rank: int,
    operand: constexpr,
    padded: constexpr,
    block: constexpr,
    log2_e: constexpr,
) -> None:
    blocks = tl.cdiv(queries, block)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first = head // heads * queries * heads + head % heads
    row = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    keys_at, values_at = k + head // heads * keys * rank, v + head // heads * keys * rank
    a = _tile(q + first * rank, row, queries, heads * rank, rank, padded).to(operand)
    g = _tile(grad + first * rank, row, queries, heads * rank, rank, padded).to(operand)
    at = first + row.to(tl.int64) * heads
    level = tl.load(norm + at, mask=row < queries, other=0.0)[:, None]
    mean = tl.load(delta + at, mask=row < queries, other=0.0)[:, None]
    found = tl.zeros((block, padded), tl.float32)
    for start in range(0, keys, block):
        key = start + tl.arange(0, block)
        b = _tile(keys_at, key, keys, rank, rank, padded).to(operand)
        c = _tile(values_at, key, keys, rank, rank, padded).to(operand)
        score = tl.dot(a, tl.trans(b), input_precision="ieee") * log2_e
        weight = tl.exp2(score - level)
        slope = weight * (tl.dot(g, tl.trans(c), input_precision="ieee") - mean)
        slope = tl.where((key < keys)[None, :], slope, 0.0)  # beyond the last key the weight may have overflowed
        found = tl.dot(slope.to(k.dtype.element_ty).to(operand), b, found, input_precision="ieee")
    _keep(q_grad + first * rank, found, row, queries, heads * rank, rank)


def _key_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    norm: tl.tensor,
    delta: tl.tensor,
    k_grad: tl.tensor,
    v_grad: tl.tensor,
    queries: int,
    keys: int,
    heads: int,
    rank: int,
    operand: constexpr,
    padded: constexpr,
    block: constexpr,
    log2_e: constexpr,
) -> None:
    blocks = tl.cdiv(keys, block)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first = head // heads * queries * heads + head % heads
    key = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    b = _tile(k + head // heads * keys * rank, key, keys, rank, rank, padded).to(operand)
    c = _tile(v + head // heads * keys * rank, key, keys, rank, rank, padded).to(operand)
    of_keys = tl.zeros((block, padded), tl.float32)
    of_values = tl.zeros((block, padded), tl.float32)
    for start in range(0, queries, block):
        row = start + tl.arange(0, block)
        a = _tile(q + first * rank, row, queries, heads * rank, rank, padded).to(operand)
        g = _tile(grad + first * rank, row, queries, heads * rank, rank, padded).to(operand)
        at = first + row.to(tl.int64) * heads
        level = tl.load(norm + at, mask=row < queries, other=0.0)[None, :]
        mean = tl.load(delta + at, mask=row < queries, other=0.0)[None, :]
        # beyond the last query a, g, level and mean are 0, so the weights there, 1, meet zeros only
        weight = tl.exp2(tl.dot(b, tl.trans(a), input_precision="ieee") * log2_e - level)
        of_values = tl.dot(weight.to(v.dtype.element_ty).to(operand), g, of_values, input_precision="ieee")
        slope = weight * (tl.dot(c, tl.trans(g), input_precision="ieee") - mean)
        of_keys = tl.dot(slope.to(k.dtype.element_ty).to(operand), a, of_keys, input_precision="ieee")
    _keep(k_grad + head * keys * rank, of_keys, key, keys, rank, rank)
    _keep(v_grad + head * keys * rank, of_values, key, keys, rank, rank)


_TRITON = (_tile, _keep, _attend_kernel, _query_kernel, _key_kernel)


@torch.library.custom_op("vfmadapt::lowrank_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax(q kᵀ) v for q (B, N, heads, r) and k, v (B, M, r), and log2 of each softmax's denominator."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    out, norm = _empty(q, k, v)
    _, _, attend, _, _ = jit(_TRITON)
    with on_device(q):
        attend[_grid(q, q.shape[1])](q, k, v, out, norm, *_sizes(q, k), **_constants(q))
    return out, norm


@_attend.register_fake
def _empty(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("vfmadapt::lowrank_attention_backward", mutates_args=())
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grad, q, k, v = (t.contiguous() for t in (grad, q, k, v))
    delta = (grad.float() * out).sum(-1)
    q_grad, heads = torch.empty_like(q), q.shape[2]
    shares = [q.new_empty(len(q), heads, *k.shape[1:], dtype=torch.float32) for _ in range(2)]
    *_, of_queries, of_keys = jit(_TRITON)
    given = (q, k, v, grad, norm, delta)
    with on_device(q):
        of_queries[_grid(q, q.shape[1])](*given, q_grad, *_sizes(q, k), **_constants(q))
        of_keys[_grid(q, k.shape[1])](*given, *shares, *_sizes(q, k), **_constants(q))
    k_grad, v_grad = (share.sum(1).to(k.dtype) for share in shares)
    return q_grad, k_grad, v_grad


@_gradients.register_fake
def _empty_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _grid(q: Tensor, rows: int) -> tuple[int]:
    return (q.shape[0] * q.shape[2] * -(-rows // _block(q)),)


def _block(q: Tensor) -> int:
    return 32 if q.dtype == torch.float32 else 64


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return q.shape[1], k.shape[1], q.shape[2], q.shape[3]


def _constants(q: Tensor) -> dict[str, Any]:
    padded = max(16, 1 << (q.shape[3] - 1).bit_length())  # at least what the tensor cores take
    return {"operand": operand(q.dtype), "padded": padded, "block": _block(q), "log2_e": math.log2(math.e), **OPTIONS}


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = _gradients(grad, *ctx.saved_tensors)
    return q_grad, k_grad, v_grad


_attend.register_autograd(_backward, setup_context=_save)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int
) -> Tensor:
    queries, mix = _narrowed(q, q_up, k_up, v_up, down, heads)
    return _attend(*autocast(queries, k, v))[0].flatten(2) @ mix


def _triton_reason(
    q: Tensor, k: Tensor, v: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int
) -> str:
    if not 0 < q.shape[2] <= WIDEST:
        return f"takes ranks of 1 to {WIDEST}, not {q.shape[2]}"
    return unsupported(*autocast(q, k, v, q_up, k_up, v_up, down)) if k.shape[1] else "there are no keys"


def _work(
    q: Tensor, k: Tensor, v: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int
) -> tuple[Work, Work]:
    moved = sum(t.numel() * t.element_size() for t in (q, q, k, v, q_up, k_up, v_up, down))
    product = 2 * q.numel() * k.shape[1] * heads  # of the 2 forward and 5 backward
    return Work(moved, 2 * product), Work(3 * moved, 7 * product)


def _case(device: Literal["cpu", "cuda"], batch: int, tokens: int, rank: int) -> Case:
    heads, width = 8, 64

    def make(where: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        inner = heads * width
        shapes = [(batch, tokens, rank)] * 3 + [(inner, rank)] * 3 + [(rank, inner)]
        return *(torch.randn(s, device=where, dtype=dtype) / rank**0.5 for s in shapes), heads

    return Case(f"{batch} x {tokens} tokens, {heads} heads of {width}, rank {rank}", device, make)


CASES = [
    _case("cpu", 2, 256, 16),
    _case("cpu", 1, 1024, 16),
    _case("cuda", 2048, 1024, 16),
    _case("cuda", 512, 4096, 16),
]
OPERATION = Operation(
    "lowrank_attention",
    lowrank_attention_reference,
    (Implementation("triton", _triton_reason, _triton),),
    _work,
    CASES,
    {"direct": lowrank_attention_direct},
)
