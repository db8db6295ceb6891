"""Multi-head cross-attention whose projections have rank r: the interaction of Cloud-Adapter.

Equations (q, k, v: inputs already projected to r channels; U_h, K_h, V_h: (d, r), head h's rows of the widening
projections; O_h: (r, d), its columns of the narrowing one):
    P_h = softmax(q U_hᵀ K_h kᵀ / √d)
    y   = Σ_h P_h v V_hᵀ O_hᵀ
Source: Cloud-Adapter, https://arxiv.org/abs/2411.13127.
"""

import torch.nn.functional as F
from torch import Tensor


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
    width = _check(q, k, v, q_up, k_up, v_up, down, heads)
    q_head, k_head, v_head = (t.unflatten(0, (heads, width)) for t in (q_up, k_up, v_up))
    score = q_head.transpose(1, 2) @ k_head * width**-0.5  # (heads, r, r)
    mix = v_head.transpose(1, 2) @ down.t().unflatten(0, (heads, width))
    queries = (q @ score.transpose(0, 1).flatten(1)).unflatten(-1, (heads, -1)).transpose(1, 2)
    # one head to a view, not one long head of all queries: backward passes run in parallel over heads
    keys, values = (t.unsqueeze(1).expand(-1, heads, -1, -1) for t in (k, v))
    attended = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    return attended.transpose(1, 2).flatten(2) @ mix.flatten(0, 1)


def lowrank_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int
) -> Tensor:
    """Attend as published, among the d channels of each head: oracle and baseline, same arguments."""
    _check(q, k, v, q_up, k_up, v_up, down, heads)
    queries, keys, values = (
        F.linear(t, up).unflatten(-1, (heads, -1)).transpose(1, 2) for t, up in ((q, q_up), (k, k_up), (v, v_up))
    )
    attended = F.scaled_dot_product_attention(queries, keys, values)
    return F.linear(attended.transpose(1, 2).flatten(2), down)


def _check(q: Tensor, k: Tensor, v: Tensor, q_up: Tensor, k_up: Tensor, v_up: Tensor, down: Tensor, heads: int) -> int:
    """The width d of a head that the shapes agree on."""
    rank, inner = down.shape
    fit = q.ndim == k.ndim == 3 and q.shape[-1] == k.shape[-1] == rank and q.shape[0] == k.shape[0]
    fit = fit and k.shape == v.shape and q_up.shape == k_up.shape == v_up.shape == (inner, rank)
    if not fit or heads < 1 or inner % heads:
        shapes = [tuple(t.shape) for t in (q, k, v, q_up, k_up, v_up, down)]
        raise ValueError(f"lowrank_attention: q, k, v, q_up, k_up, v_up, down {shapes} do not fit {heads} heads")
    return inner // heads
