"""A frozen network of one ViT block, for golden files that hold a whole block."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.contracts import Adapter
from vfmadapt.host import AdaptedBackbone

BlockNames = Mapping[str, Sequence[str]]
"""{layer of a timm block: its published names}, three of them where q, k and v are apart."""


def adapted_block(adapter: Adapter, params: Mapping[str, Tensor], names: BlockNames, heads: int) -> AdaptedBackbone:
    """A block with the frozen tensors of a golden file and an adapter; evaluation mode."""
    state = {
        f"{ours}.{kind}": torch.cat([params[f"{name}.{kind}"] for name in theirs])
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }
    hidden, channels = state["mlp.fc1.weight"].shape
    ratio = (hidden + 0.5) / channels  # timm multiplies again and rounds down
    settings: dict[str, Any] = {"embed_dim": channels, "num_heads": heads, "mlp_ratio": ratio, "depth": 1}
    settings |= {"patch_size": 1, "class_token": False, "global_pool": "avg", "pos_embed": "none"}
    backbone: Any = timm_backbone("vit_tiny_patch16_224", pretrained=False, bands=channels, settings=settings)
    backbone.net.blocks[0].load_state_dict(state)
    embedding = backbone.net.patch_embed.proj
    with torch.no_grad():  # it hands on its input
        embedding.weight.copy_(torch.eye(channels)[..., None, None])
        embedding.bias.zero_()
    return AdaptedBackbone(backbone, {"main": adapter})


def run_block(model: AdaptedBackbone, tokens: Tensor) -> Tensor:
    """Tokens (B, N, C) -> what the block and its adapter make of them."""
    image = tokens.transpose(1, 2).unsqueeze(2)  # (B, C, 1, N): each token is a patch of one pixel
    return model(image, [0]).grids[0].squeeze(2).transpose(1, 2)
