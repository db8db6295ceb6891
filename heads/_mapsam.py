"""MapSAM's prompts without a user, and segment-anything's two-way transformer with a semantic prompt and a mask.

Xia et al. 2024, "MapSAM: Adapting Segment Anything Model for Automated Feature Detection in Historical Maps",
https://arxiv.org/abs/2411.06971. Where it has one map of scores for one class, there is one per class here: K classes,
N = h w cells, Q tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

POINTS = 2  # of either sign, as published
TIE = 1e-4  # of the largest score: closer ones count as equal, far above float32's rounding


def make_generator(width: int, classes: int) -> nn.Sequential:
    """A head of the prompt generator: image embedding (B, width, h, w) -> coarse logits (B, classes, h, w)."""
    return nn.Sequential(
        nn.Conv2d(width, width // 4, 1),
        LayerNorm2d(width // 4),
        nn.GELU(),
        nn.Conv2d(width // 4, width // 16, 1),
        LayerNorm2d(width // 16),
        nn.GELU(),
        nn.Conv2d(width // 16, classes, 1),
    )


def margin(scores: Tensor) -> Tensor:
    """By how much each class (B, K, ...) exceeds the best other one; the scores themselves where K = 1.

    Above 0 where a class is the likeliest. For a softmax a number added to all classes means nothing, so the scores
    alone would not do.
    """
    if scores.shape[1] == 1:
        return scores
    best, second = scores.topk(2, dim=1).values.split(1, dim=1)
    return scores - torch.where(scores == best, second, best)


def attended_cells(scores: Tensor) -> Tensor:
    """Coarse logits (B, K, h, w) or scores (B, K, N) -> bool (B, K, N): where a class is the likeliest."""
    return margin(scores).flatten(2) >= 0


def select_points(scores: Tensor, *, published: bool = False) -> tuple[Tensor, Tensor]:
    """The pixels that most and least look like a class: scores (B, K, H, W) -> points (B, K, P, 2), labels (B, K, P).

    x before y; the highest come first, with label 1, then the lowest, with label 0. P = 4, or 2 in an image of a pixel.

    Differs from the release, which takes `topk` of the upsampled scores (`published=True`): these have plateaus, at the
    image's edges where upsampling repeats the outermost cells and over blank areas, and there rounding, and with it the
    size of the batch, would choose. Of pixels within `TIE` of the best the first is taken, in reading order; where
    nothing ties these are the release's pixels.
    """
    flat = margin(scores).flatten(2)
    count = min(POINTS, flat.shape[-1])
    if published:
        places = torch.cat([flat.topk(count).indices, flat.topk(count, largest=False).indices], dim=-1)
    else:
        places = torch.cat([_highest(flat, count), _highest(-flat, count)], dim=-1)
    width = scores.shape[-1]
    points = torch.stack([places % width, places // width], dim=-1)
    return points, (torch.arange(2 * count, device=scores.device) < count).long().expand(places.shape)


def _highest(values: Tensor, count: int) -> Tensor:
    """Indices of the highest values of (..., N), one after the other: (..., count); of almost equal ones the first."""
    slack, found = TIE * values.abs().amax(-1, keepdim=True), []
    for _ in range(count):
        near = values >= values.amax(-1, keepdim=True) - slack
        found.append(near.int().argmax(-1, keepdim=True))
        values = values.scatter(-1, found[-1], float("-inf"))
    return torch.cat(found, dim=-1)


def mean_where(cells: Tensor, embedding: Tensor) -> Tensor:
    """Mean of an embedding (B, C, h, w) over cells, bool (B, K, N) -> (B, K, C); 0 where there is none."""
    weight = cells.float()
    return weight @ embedding.float().flatten(2).mT / weight.sum(-1, keepdim=True).clamp_min(1)


def score_tokens(transformer: Any, tokens: Tensor, keys: Tensor) -> Tensor:
    """How well cells (B, N, C) match tokens (B, K, C) in the midst of the transformer: (B, K, N)."""
    scores: Tensor = transformer.norm_final_attn(tokens) @ keys.mT
    return scores


def two_way(
    transformer: Any,
    image: Tensor,
    places: Tensor,
    tokens: Tensor,
    semantic: Tensor,
    *,
    owners: Tensor,
    cells: Tensor,
    published: bool = False,
) -> tuple[Tensor, Tensor]:
    """segment-anything's `TwoWayTransformer` with MapSAM's semantic prompt and masked attention.

    Args:
        transformer: its weights.
        image: embedding of the cells, (B, N, C).
        places: their positions, (B, N, C) or (1, N, C).
        tokens: (B, Q, C): one of no class, then one for each of the K classes, then prompts.
        semantic: added to the tokens, (B, Q, C) or (B, 1, C).
        owners: (Q, K), above 0 where a token belongs to a class.
        cells: bool (B, K, N), where the tokens of a class attend to in the first layer; in later ones it is where the
            class's own token fits best. Tokens without a cell attend everywhere.
        published: mask after the softmax, as the release does.

    Returns:
        The tokens (B, Q, C) and the embedding (B, N, C) after all layers.
    """
    queries, keys = tokens, image
    for number, layer in enumerate(transformer.layers):
        if number:
            with torch.no_grad():
                cells = attended_cells(score_tokens(transformer, queries[:, 1 : 1 + cells.shape[1]], keys + places))
        attention = partial(_attend, layer.cross_attn_token_to_image, _allowed(cells, owners), published)
        queries, keys = _two_way_layer(layer, attention, queries + semantic, keys, tokens, places)
    found = transformer.final_attn_token_to_image(q=queries + tokens + semantic, k=keys + places, v=keys)
    return transformer.norm_final_attn(queries + found), keys


def _allowed(cells: Tensor, owners: Tensor) -> Tensor:
    """Where each token may attend to: bool (B, 1, Q, N), never nowhere."""
    allowed = (owners @ cells.float()) > 0
    return (allowed | ~allowed.any(-1, keepdim=True)).unsqueeze(1)


def _two_way_layer(
    layer: Any, attention: Callable[..., Tensor], queries: Tensor, keys: Tensor, tokens: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """One `TwoWayAttentionBlock`, with another attention of the tokens to the cells."""
    if layer.skip_first_layer_pe:
        queries = layer.self_attn(q=queries, k=queries, v=queries)
    else:
        placed = queries + tokens
        queries = queries + layer.self_attn(q=placed, k=placed, v=queries)
    queries = layer.norm1(queries)
    queries = layer.norm2(queries + attention(queries + tokens, keys + places, keys))
    queries = layer.norm3(queries + layer.mlp(queries))
    told = layer.cross_attn_image_to_token(q=keys + places, k=queries + tokens, v=queries)
    return queries, layer.norm4(keys + told)


def _attend(attention: Any, allowed: Tensor, published: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """segment-anything's `Attention` within a mask, bool (B, 1, Q, N)."""
    heads = attention.num_heads
    q, k, v = (
        project(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for project, x in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
    )
    if published:
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        seen = weights.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
    else:
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return attention.out_proj(seen.transpose(1, 2).flatten(2))
