"""vfm_tiny: the embedded default backbone, a ViT of 4.8 M parameters whose weights lie in the package.

Pretrained by masked-image modelling on generated satellite, medical and map imagery; recipe and figures in
docs/vfm_tiny.md.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vfmadapt.backbones._weights import RGB, find_weights, load_weights
from vfmadapt.backbones.timm_vit import TimmBackbone
from vfmadapt.contracts import UserError

MEAN, STD = (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)
"""Normalisation of the pretraining, for images in 0..1."""

WEIGHTS = Path(__file__).parent / "weights"


def vfm_tiny_net() -> nn.Module:
    """The bare timm model: patch 8, width 256, 6 blocks, 4 heads, one class token."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=128,
        patch_size=8,
        embed_dim=256,
        depth=6,
        num_heads=4,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
    )


def vfm_tiny(
    *,
    version: int = 1,
    pretrained: bool = True,
    weights: str | None = None,
    seed: int = 0,
    bands: int | Sequence[str] = RGB,
    gradient_checkpointing: bool = False,
    final_norm: bool = False,
) -> TimmBackbone:
    """Build vfm_tiny with the weights of `version` from the package (no network), of a file, or random ones.

    A version's weights never change; later ones get a number of their own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = vfm_tiny_net()
    name = f"vfm_tiny@{version}" if pretrained or weights else "vfm_tiny@random"
    if weights is not None:
        load_weights(net, find_weights(weights), name)
    elif pretrained:
        path = WEIGHTS / f"{name}.safetensors"
        if not path.is_file():
            known = ", ".join(sorted(p.stem.removeprefix("vfm_tiny@") for p in WEIGHTS.glob("vfm_tiny@*.safetensors")))
            raise UserError(f"backbone.version={version}: vfm_tiny has the versions {known}")
        load_weights(net, path, name)
    return TimmBackbone(
        net,
        name=name,
        bands=bands,
        gradient_checkpointing=gradient_checkpointing,
        final_norm=final_norm,
        mean=MEAN,
        std=STD,
        licence="apache-2.0",
    )
