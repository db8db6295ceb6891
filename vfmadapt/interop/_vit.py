"""A plain ViT of given weights, for replays that hold a whole network or a part of one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.backbones.timm_vit import TimmBackbone


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
