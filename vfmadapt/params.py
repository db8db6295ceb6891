"""How many numbers a choice of backbone, adapter and head trains and stores, without building real weights."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vfmadapt.contracts import ClassSpec, DataSpec, Owned

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vfmadapt.host import AdaptedBackbone

log = logging.getLogger(__name__)


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Count, on the meta device.

    Returns:
        adapter_params: trained, added by the adapter; unfrozen_params: trained copies of the backbone's own tensors;
        head_params; backbone_params: frozen; adapter_bytes: tensors of adapter and head in the adapter file;
        mergeable: whether the adapter folds into plain weights.
    """
    model = build(cfg)
    result = {"adapter": str(cfg.adapter["_target_"]).rpartition(".")[2], "backbone": model.backbone.spec.name}
    result |= counts(model.backbone)
    result["head_params"] = sum(p.numel() for p in model.head.parameters() if p.requires_grad)
    result["adapter_bytes"] = sum(t.numel() * t.element_size() for t in model.adapter_state().values())
    for key in ("adapter_params", "unfrozen_params", "head_params", "backbone_params", "adapter_bytes"):
        log.info("%-18s%15s", key, f"{result[key]:,}")
    log.info("%-18s%15s", "mergeable", "yes" if result["mergeable"] else "no")
    return result


def build(cfg: Any) -> Any:
    """The model of a config (nodes `backbone`, `adapter`, `head`; `bands`, `classes`) on the meta device."""
    from vfmadapt.build import build_model, plain

    nodes = {key: plain(cfg[key]) for key in ("backbone", "adapter", "head")}
    nodes["backbone"] |= {"pretrained": False, "weights": None}
    bands = tuple(cfg.bands)
    spec = DataSpec(
        name="none",
        bands=bands,
        classes=tuple(ClassSpec(str(i), (0, 0, 0)) for i in range(cfg.classes)),
        mean=(0.0,) * len(bands),
        std=(1.0,) * len(bands),
    )
    with torch.device("meta"):
        return build_model(nodes, spec)


def counts(backbone: "AdaptedBackbone") -> dict[str, Any]:
    """adapter_params, unfrozen_params, backbone_params and mergeable of a backbone with its adapters."""
    copies: dict[int, nn.Parameter] = {}
    for name in backbone.active:
        for site in backbone.sites(name):
            if isinstance(site, Owned):
                copies |= {id(p): p for p in site.tensors.values()}
    trained = {id(p): p for p in backbone.trainable_parameters()}
    every = {id(p): p for p in backbone.backbone.parameters()} | backbone.replaced()
    return {
        "adapter_params": sum(p.numel() for key, p in trained.items() if key not in copies),
        "unfrozen_params": sum(p.numel() for p in copies.values()),
        "backbone_params": sum(p.numel() for key, p in every.items() if key not in trained),
        "mergeable": all(not a.unmergeable for a in backbone.active_adapters()),
    }
