"""Tiny backbones of every family and what the contract suite does with an adapter; for tests of one's own adapters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vfmadapt.build import adapter, entry
from vfmadapt.contracts import Adapter, BackboneSpec
from vfmadapt.host import AdaptedBackbone

_VIT: Mapping[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2}
BACKBONES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "no_prefix": ("vit_tiny_patch16_224", {**_VIT, "class_token": False, "global_pool": "avg"}),
    "vit": ("vit_tiny_patch16_224", _VIT),
    "two_blocks": ("vit_tiny_patch16_224", {**_VIT, "depth": 2}),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", _VIT),
    "clip": ("vit_base_patch16_clip_224.openai", _VIT),
    "dinov3": ("vit_small_patch16_dinov3", _VIT),
    "samvit": (
        "samvit_base_patch16",
        {**_VIT, "img_size": 64, "window_size": 3, "global_attn_indexes": (2,)},
    ),
    "sam2_hiera": (
        "sam2_hiera_tiny",
        {
            "embed_dim": 16,
            "stages": (1, 1, 2, 1),
            "num_heads": 1,
            "window_spec": (4, 2, 2, 2),
            "global_att_blocks": (3,),
        },
    ),
    "sam2_video": (
        "sam2_video",
        {
            "size": 64,
            "trunk": {"width": 16, "heads": 1, "blocks": (1, 1, 2, 1), "windows": (4, 2, 2, 2), "global_blocks": (3,)},
            "width": 128,
            "memory_layers": 2,
            "hidden": 64,
        },
    ),
}
"""{family: (timm name, settings that make it tiny)}: prefix tokens 0, 1 and 5, RoPE, windows, widths that grow.

"sam2_video" is transformers' whole video model.
"""


def vit_spec(channels: int, depth: int = 1) -> BackboneSpec:
    """A plain ViT's spec of a width and depth, for adapters that are built by themselves."""
    linears = dict.fromkeys(("q", "k", "v", "proj"), ((channels, channels),) * depth)
    linears |= {"qkv": ((channels, 3 * channels),) * depth}
    linears |= {"fc1": ((channels, 4 * channels),) * depth, "fc2": ((4 * channels, channels),) * depth}
    return BackboneSpec(
        name=f"ViT of width {channels}",
        dims=(channels,) * depth,
        strides=(16,) * depth,
        prefix_tokens=1,
        bands=3,
        mean=None,
        std=None,
        weights_hash="",
        licence="",
        linears=linears,
        embed_dim=channels,
        windowed=(False,) * depth,
    )


def tiny_backbone(family: str, *, seed: int = 0, **settings: Any) -> Any:
    """A frozen backbone of a family of `BACKBONES`, with random weights of a seed."""
    from vfmadapt.backbones.timm_models import timm_backbone

    name, tiny = BACKBONES[family]
    if family == "sam2_video":
        from vfmadapt.backbones.sam2_video import sam2_video

        return sam2_video(name, pretrained=False, seed=seed, **tiny, **settings)
    return timm_backbone(name, pretrained=False, seed=seed, settings=dict(tiny), **settings)


def adapted(
    name: str, family: str = "vit", *, seed: int = 0, settings: Mapping[str, Any] | None = None
) -> AdaptedBackbone:
    """The entry `name` of conf/adapter on a tiny backbone, in evaluation mode; its weights drawn from `seed`."""
    frozen = tiny_backbone(family)
    node = {**entry("adapter", name), **(settings or {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Adapter = adapter(node, frozen)
        return AdaptedBackbone(frozen, {"main": made}, config={"adapter": node})


def perturb(model: AdaptedBackbone, *, amount: float = 0.02) -> None:
    """Move every trainable parameter off its start, where zeros would hide gradients."""
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * amount)


def grids(model: AdaptedBackbone, image: Tensor) -> list[Tensor]:
    """Features (B, C, h, w) of the first and the last block."""
    return list(model(image, [0, model.spec.depth - 1]).grids)


def loss(model: AdaptedBackbone, image: Tensor) -> Tensor:
    """Something to minimise that depends on every feature, tasks' own included, with the adapter's auxiliary losses."""
    features = model(image, [0, model.spec.depth - 1])
    total = torch.stack([g.square().mean() + g.mean() for g in (*features.grids, *features.streams.values())]).sum()
    aux = model.aux_loss()
    return total if aux is None else total + aux
