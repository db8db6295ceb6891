"""SAM2's memory attention on transformers' weights, with less work than layer by layer and object by object.

What all objects share, self-attention of the first layer, is done once. Memories have a quarter of the channels of what
is read from them, so values are weighed before they are projected: rows of the attention sum to 1, so A (M V + b) =
(A M) V + b.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CELLS = 256  # of objects that are read for together on a CPU
_ROWS = 256  # queries of which the weights are in memory at a time where there is no fused kernel


def attend(
    attention: Any, frame: Tensor, memory: Tensor, position: Tensor, turns: Tensor, pointer_tokens: int
) -> Tensor:
    """A frame's tokens conditioned on the memories of N objects: (N, h * w, C).

    Args:
        attention: transformers' `Sam2VideoMemoryAttention` with one head.
        frame: tokens (1, h * w, C), their position included.
        memory: tokens (N, L, 64), those of the pointers last.
        position: likewise, their position embedding.
        turns: `rotations` of the frame's grid.
        pointer_tokens: how many tokens are of pointers, which have no place in the frame.
    """
    first = _look_around(attention.layers[0], frame, turns)
    # A CPU's caches hold what one object needs of a large frame, or several of a small one; a GPU wants all at once.
    size = max(_CELLS // frame.shape[1], 1) if memory.device.type == "cpu" else len(memory)
    done = []
    for own, at in zip(memory.split(size), position.split(size), strict=True):
        x = first.expand(len(own), -1, -1)
        for number, layer in enumerate(attention.layers):
            x = x if number == 0 else _look_around(layer, x, turns)
            x = x + _look_back(layer, layer.layer_norm2(x), own, at, turns, pointer_tokens)
            x = x + layer.linear2(layer.activation(layer.linear1(layer.layer_norm3(x))))
        done.append(attention.layer_norm(x))
    return torch.cat(done)


def rotations(attention: Any, like: Tensor) -> Tensor:
    """Cosines and sines of the rotary embedding for the frame's grid: (h * w, C / 2, 2)."""
    cosine, sine = attention.rotary_emb(like, attention.position_ids)
    return torch.stack([cosine[0, :, ::2], sine[0, :, ::2]], -1)


def _look_around(layer: Any, x: Tensor, turns: Tensor) -> Tensor:
    """Self-attention with its residual: (N, h * w, C)."""
    part, normed = layer.self_attn, layer.layer_norm1(x)
    query, key = _turned(part.q_proj(normed), turns), _turned(part.k_proj(normed), turns)
    read = F.scaled_dot_product_attention(query[:, None], key[:, None], part.v_proj(normed)[:, None])
    return x + part.o_proj(read[:, 0])


def _look_back(layer: Any, x: Tensor, memory: Tensor, position: Tensor, turns: Tensor, pointer_tokens: int) -> Tensor:
    """Cross attention to the memories: (N, h * w, C)."""
    part = layer.cross_attn_image
    key = part.k_proj(memory + position)
    placed = key.shape[1] - pointer_tokens
    key = torch.cat([_turned(key[:, :placed], turns), key[:, placed:]], 1)
    return part.o_proj(part.v_proj(_weighed(_turned(part.q_proj(x), turns), key, memory)))


def _weighed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Values (N, L, c) by the attention of queries (N, P, C) to keys (N, L, C): (N, P, c)."""
    if query.is_cuda:
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    scaled, turned = query * query.shape[-1] ** -0.5, key.transpose(1, 2)
    return torch.cat([(rows @ turned).softmax(-1) @ value for rows in scaled.split(_ROWS, 1)], 1)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding of tokens (N, k * h * w, C), the grid repeated k times."""
    pairs = torch.view_as_complex(x.float().unflatten(2, (-1, 2)).unflatten(1, (-1, len(turns))))
    turned: Tensor = torch.view_as_real(pairs * torch.view_as_complex(turns.float()))
    return turned.flatten(3).flatten(1, 2).type_as(x)
