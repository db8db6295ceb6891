"""A plain ViT of given weights, for replays that hold a whole network or a part of one."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.backbones.timm_vit import TimmBackbone
from vfmadapt.host import AdaptedBackbone


def vit(state: Mapping[str, Tensor] | None = None, *, final_norm: bool = False, **settings: Any) -> TimmBackbone:
    """A ViT of timm (LayerNorm eps 1e-6) with `settings`, as a backbone; `state` holds all its tensors or is None."""
    backbone = timm_backbone("vit_tiny_patch16_224", pretrained=False, final_norm=final_norm, settings=settings)
    assert isinstance(backbone, TimmBackbone)
    if state is not None:
        backbone.net.load_state_dict(dict(state))
    return backbone


def keep(into: list[Tensor], _module: nn.Module, _args: object, output: Tensor) -> None:
    """A forward hook, once `into` is bound: what the module gives is appended there."""
    into.append(output)


def give(x: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook, once `x` is bound: the module gets it instead of its input."""
    return (x, *args[1:])


def through(model: AdaptedBackbone, role: str | nn.Module, x: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
    """What a module gives for x (B, N, C), put in the place of its own input, in a ViT of patches of 16 pixels.

    `role`: of the module in block 0, or the module itself; `grid`: of the image's patches, by default one row.
    """
    kept: list[Tensor] = []
    module = model.backbone.place(role, 0).module if isinstance(role, str) else role
    handles = [
        module.register_forward_pre_hook(partial(give, x), prepend=True),
        module.register_forward_hook(partial(keep, kept)),
    ]
    rows, columns = grid or (1, x.shape[1] - model.spec.prefix_tokens)
    model(torch.zeros(len(x), 3, 16 * rows, 16 * columns), [0])
    for handle in handles:
        handle.remove()
    return kept[0]
