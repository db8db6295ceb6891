"""timm models by name, or the caller's own, as frozen backbones."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from vfmadapt.backbones._frozen import FrozenNet
from vfmadapt.backbones._roles import Net
from vfmadapt.backbones._weights import RGB, find_weights, load_weights
from vfmadapt.backbones.timm_grid import GridBackbone, keeps_grid
from vfmadapt.backbones.timm_vit import TimmBackbone
from vfmadapt.contracts import UserError

_GRID_MODULES = ("vision_transformer_sam", "hieradet_sam2")
"""timm's files of networks that take any size as they are."""


def timm_backbone(
    name: str,
    *,
    pretrained: bool | None = None,
    weights: str | None = None,
    seed: int = 0,
    bands: int | Sequence[str] = RGB,
    gradient_checkpointing: bool = False,
    final_norm: bool = False,
    settings: dict[str, Any] | None = None,
) -> FrozenNet:
    """Build a timm model by name as a frozen backbone.

    Args:
        name: timm's name, for example vit_small_patch14_dinov2.lvd142m.
        pretrained: True loads the hub's weights (the only case that uses the network), False asks for random weights.
        weights: a file (.safetensors, .pth) or a folder that holds one; takes precedence over the hub.
        seed: of random weights, so that an adapter trained on them can be loaded again.
        bands: number of bands or their names.
        gradient_checkpointing: recompute blocks in the backward pass.
        final_norm: put the network's final norm on the last block's features.
        settings: further arguments of the timm model (tests build tiny ones).

    Raises:
        UserError: unknown name; no weights asked for; no network; weights that do not fit.
    """
    import timm

    if pretrained is None and weights is None:
        raise UserError(
            f"backbone {name} has no weights: pass backbone.weights=FILE or FOLDER, "
            "backbone.pretrained=true (downloads them) "
            "or backbone.pretrained=false (random weights)"
        )
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]
        raise UserError(
            f"timm has no model {name!r}; close names: {', '.join(close) or 'none'}; see timm.list_models()"
        )
    arguments = dict(settings or {})
    if not timm.model_entrypoint(name).__module__.endswith(_GRID_MODULES):
        arguments["dynamic_img_size"] = True
    build = partial(timm.create_model, name, num_classes=0, **arguments)
    if pretrained and weights is None:
        try:
            net = build(pretrained=True)
        except Exception as error:  # the hub's client raises many kinds
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise UserError(
                f"backbone {name}: the hub gave no weights ({reason}); pass backbone.weights=FILE or FOLDER"
            ) from error
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build(pretrained=False)
        if weights is not None:
            load_weights(net, find_weights(weights), name)
    return _wrap(net, name=name, bands=bands, gradient_checkpointing=gradient_checkpointing, final_norm=final_norm)


def wrap_timm(net: Net, **settings: Any) -> FrozenNet:
    """A timm model that the caller built -> frozen backbone; the object itself is used (and frozen), not a copy.

    `settings`: `gradient_checkpointing`, `final_norm`.
    """
    channels = net.patch_embed.proj.in_channels if hasattr(net, "patch_embed") else 3
    if channels != 3:
        raise UserError(f"the model takes {channels} channels; build it with 3 and pass bands= to TimmBackbone")
    name = (getattr(net, "pretrained_cfg", None) or {}).get("architecture", type(net).__name__)
    return _wrap(net, name=name, bands=RGB, **settings)


def _wrap(net: Net, *, name: str, bands: int | Sequence[str], **settings: Any) -> FrozenNet:
    cfg = getattr(net, "pretrained_cfg", None) or {}
    return (GridBackbone if keeps_grid(net) else TimmBackbone)(
        net,
        name=name,
        bands=bands,
        mean=cfg.get("mean"),
        std=cfg.get("std"),
        licence=cfg.get("license") or "unknown",
        **settings,
    )
