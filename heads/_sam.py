"""Parts of segment-anything that several heads are made of, and how they are read from its checkpoints.

Kirillov et al. 2023, "Segment Anything", https://arxiv.org/abs/2304.02643.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, MaskPrompts, UserError
from vfmadapt.heads._checkpoint import copy_strictly, read_checkpoint
from vfmadapt.heads._resize import resolve_layers

MASK_CHANNELS = 16  # of the convolutions that read a mask prompt ...
DEPTH = 2  # ... two-way layers ...
QUALITY_DEPTH = 3  # ... and layers of the head that predicts IoU: all as published

DRAWN = 4.0  # logit of a drawn prompt: as sure as a good mask is, and ...
DOT = 3.0  # ... radius of a drawn point, in values of the mask prompt

_NECK = "image_encoder.neck."
_OWN = (_NECK, "prompt_encoder.", "mask_decoder.")


def deepest_fine_layer(spec: BackboneSpec, layers: Sequence[int] | None) -> int:
    """The one block to read: the last of `layers`, by default the last with at most 16 pixels per cell, as SAM has."""
    if layers is not None:
        return resolve_layers(spec, tuple(layers))[-1]
    fine = [i for i, stride in enumerate(spec.strides) if stride <= 16]
    return fine[-1] if fine else spec.depth - 1


def make_neck(channels: int, width: int) -> nn.Sequential:
    """SAM's neck: a block's grid (B, channels, h, w) -> image embedding (B, width, h, w)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )


def make_prompt_encoder(width: int) -> Any:
    """SAM's prompt encoder for positions in 0..1, so that one serves every size of image."""
    return PromptEncoder(width, image_embedding_size=(1, 1), input_image_size=(1, 1), mask_in_chans=MASK_CHANNELS)


def make_mask_decoder(width: int, mlp_width: int, heads: int, masks: int) -> Any:
    """SAM's mask decoder with one mask token and `masks` more.

    Raises:
        UserError: sizes that do not divide one another.
    """
    if width < 16 or width % 16 or heads < 1 or width // 2 % heads:  # attention halves the width, then splits it
        raise UserError(
            f"head.width={width} head.heads={heads}: width is a multiple of 16 and of twice the heads (published: "
            "256 and 8)"
        )
    transformer = TwoWayTransformer(depth=DEPTH, embedding_dim=width, mlp_dim=mlp_width, num_heads=heads)
    return MaskDecoder(
        transformer_dim=width,
        transformer=transformer,
        num_multimask_outputs=masks,
        iou_head_depth=QUALITY_DEPTH,
        iou_head_hidden_dim=width,
    )


def place_in_grid(points: Tensor, padded: tuple[int, int]) -> Tensor:
    """Pixels (..., 2) as x, y -> positions for `make_prompt_encoder`, which adds half a pixel of its own.

    `padded`: (H, W) that the grid of cells covers.
    """
    size = points.new_tensor([padded[1], padded[0]])
    return (points + 0.5) / size - 0.5


def draw_prompts(prompts: MaskPrompts, cells: tuple[int, int], stride: int) -> Tensor:
    """Points and boxes as a mask prompt (B, M, 4h, 4w): positive on the object, negative off it, 0 unknown.

    They are added to `prompts.masks` where there are some. `cells`: (h, w) of the grid; `stride`: pixels per cell.
    """
    given = prompts.points if prompts.points is not None else prompts.boxes
    if given is None:
        assert prompts.masks is not None
        return prompts.masks
    step = stride / 4
    rows, columns = ((torch.arange(4 * n, device=given.device) + 0.5) * step - 0.5 for n in cells)
    drawn = given.new_zeros(*given.shape[:2], len(rows), len(columns))
    if prompts.masks is not None:
        drawn = drawn + prompts.masks
    if prompts.boxes is not None:
        left, top, right, bottom = prompts.boxes[..., None].unbind(2)
        across, down = (columns >= left) & (columns <= right), (rows >= top) & (rows <= bottom)
        drawn = drawn + DRAWN * (2.0 * (down[..., None] & across[..., None, :]) - 1)
    if prompts.points is not None and prompts.labels is not None:
        x, y = prompts.points[..., None, None].unbind(3)
        dots = (columns - x).square() + (rows[:, None] - y).square() <= (DOT * step) ** 2
        signs = torch.where(prompts.labels < 0, 0.0, 2 * prompts.labels - 1)  # -1: no point
        drawn = drawn + DRAWN * (dots * signs[..., None, None]).sum(2)
    return drawn


def load_official(head: nn.Module, path: str | Path, *, fresh: Sequence[str] = ()) -> None:
    """Fill neck, prompt encoder and mask decoder of `head` from a checkpoint of SAM (.pth, .safetensors).

    Args:
        head: with the modules `neck`, `prompt_encoder` and `mask_decoder`.
        path: the file that the image encoder's weights are in, too.
        fresh: beginnings of names that stay as they are.

    Raises:
        UserError: no such file, not such a checkpoint, or a tensor that is missing, left over or of another shape.
    """
    found = {_own_name(k): v for k, v in read_checkpoint(path).items() if k.startswith(_OWN)}
    wanted = head.state_dict()
    own, state = ({k: v for k, v in s.items() if not k.startswith(tuple(fresh))} for s in (wanted, found))
    copy_strictly(own, state, path, "a checkpoint of SAM (sam_vit_*.pth)")


def _own_name(key: str) -> str:
    return key.removeprefix("image_encoder.")
