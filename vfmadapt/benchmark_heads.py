"""What every head costs: parameters, the time of its forward, and of what it adds to the backbone's."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vfmadapt.benchmark import interleaved
from vfmadapt.build import adapter, entry, instantiate, names
from vfmadapt.contracts import Head, PromptHead
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

CLASSES = 19  # as Cityscapes has


def heads(cfg: "DictConfig") -> dict[str, Any]:
    """Parameters and forward time of each head that labels pixels, on `cfg.network` and images of `cfg.size` pixels.

    Returns:
        {head: {"params", "ms": of the head alone, "backbone": time of the backbone's forward relative to the bare
        one's, where the head acts in the blocks}} and the set-up. Medians of interleaved runs.
    """
    from vfmadapt.backbones.timm_models import timm_backbone

    before = torch.get_num_threads()
    torch.set_num_threads(int(cfg.threads))
    try:
        torch.manual_seed(int(cfg.seed))
        image = torch.randn(int(cfg.batch), 3, int(cfg.size), int(cfg.size))
        frozen = timm_backbone(cfg.network, pretrained=False)
        found: dict[str, Any] = {}
        log.info("%-14s%14s%10s%10s", "head", "parameters", "ms", "backbone")
        for name in list(cfg.only or names("head")):
            backbone = AdaptedBackbone(frozen, {"main": adapter(entry("adapter", "frozen"), frozen)})
            try:
                head: Head = instantiate(entry("head", name), backbone.spec, num_classes=CLASSES)
            except UserError as error:
                found[name] = {"refused": str(error)}
                log.info("%-14srefused: %s", name, error)
            else:
                if not isinstance(head, PromptHead):
                    found[name] = _cost(head.eval(), backbone, image, int(cfg.repeats))
                    params, ms, backbone_ratio = (found[name].get(key, 1.0) for key in ("params", "ms", "backbone"))
                    log.info("%-14s%14s%10d%10.2f", name, f"{params:,}", ms, backbone_ratio)
            finally:
                backbone.detach()
    finally:
        torch.set_num_threads(before)
    setup = {key: cfg[key] for key in ("network", "size", "batch", "threads", "repeats")}
    result = {"setup": setup | {"classes": CLASSES}, "heads": found}
    if cfg.output:
        Path(cfg.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


@torch.no_grad()
def _cost(head: Head, backbone: AdaptedBackbone, image: Tensor, repeats: int) -> dict[str, Any]:
    bare, serving = backbone.active, backbone.serve(head)
    head.after_step(1, 1)  # as when training is done
    backbone.use(*serving)
    features = backbone(image, head.layers)
    alone, _ = interleaved((partial(head, features, (image.shape[-2], image.shape[-1])), _nothing), repeats)
    cost: dict[str, Any] = {"params": sum(p.numel() for p in head.parameters() if p.requires_grad), "ms": round(alone)}
    if serving != bare:
        run = partial(_forward, backbone, image)
        with_head, without = interleaved((partial(run, serving), partial(run, bare)), repeats)
        cost["backbone"] = round(with_head / without, 2)
    return cost


def _forward(backbone: AdaptedBackbone, image: Tensor, names: tuple[str, ...]) -> None:
    backbone.use(*names)
    backbone(image, [backbone.spec.depth - 1])


def _nothing() -> None:
    """What a head is compared with."""
