"""VPT's official state dict (https://arxiv.org/abs/2203.12119)."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from vfmadapt.adapters.vpt import VPT
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Adapter
from vfmadapt.host import AdaptedBackbone
from vfmadapt.interop import Strict
from vfmadapt.interop._vit import keep, vit


def load_vpt(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Official layout: `prompt_embeddings` (1, n, C) and, deep, `deep_prompt_embeddings` (blocks - 1, n, C)."""
    assert isinstance(adapter, VPT)
    strict = Strict({key.rpartition(".")[2]: v for key, v in state.items() if key.endswith("prompt_embeddings")}, "vpt")
    strict.copy(adapter.prompts[:1], "prompt_embeddings")
    if len(adapter.prompts) > 1:
        strict.copy(adapter.prompts[1:], "deep_prompt_embeddings")
    strict.done()


def replay_vpt_deep(golden: Golden) -> dict[str, Tensor]:
    """A whole ViT, its final norm included; the stored tokens include the prompts, which the features leave out."""
    settings, image = golden.settings, golden.inputs["image"]
    width, depth = settings["hidden_size"], settings["num_layers"]
    backbone = vit(
        _timm_names(golden.params, depth),
        img_size=tuple(settings["img_size"]),
        patch_size=settings["patch_size"],
        embed_dim=width,
        depth=depth,
        num_heads=settings["num_heads"],
        mlp_ratio=settings["mlp_dim"] / width,
    )
    adapter = VPT(backbone.spec, prompts=settings["prompts"])
    load_vpt(adapter, golden.params)
    model = AdaptedBackbone(backbone, {"main": adapter})
    tokens: list[Tensor] = []
    # prepended: it runs before the hook of the host that takes the prompts out
    backbone.blocks()[-1].register_forward_hook(partial(keep, tokens), prepend=True)
    model(image, [depth - 1])
    y = backbone.net.norm(tokens[0])
    golden.backward(y)
    assert adapter.prompts.grad is not None
    assert image.grad is not None
    return {
        "output/y": y,
        "grad_input/image": image.grad,
        "grad_param/prompt_embeddings": adapter.prompts.grad[:1],
        "grad_param/deep_prompt_embeddings": adapter.prompts.grad[1:],
    }


def _timm_names(params: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The published frozen weights under timm's names."""
    modules = {"embeddings.patch_embeddings": "patch_embed.proj", "encoder.encoder_norm": "norm"}
    for i in range(depth):
        inner = {"attention_norm": "norm1", "attn.out": "attn.proj", "ffn_norm": "norm2"}
        inner |= {"ffn.fc1": "mlp.fc1", "ffn.fc2": "mlp.fc2"}
        modules |= {f"encoder.layer.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in inner.items()}
    found = {"cls_token": params["embeddings.cls_token"], "pos_embed": params["embeddings.position_embeddings"]}
    for kind in ("weight", "bias"):
        found |= {f"{ours}.{kind}": params[f"{theirs}.{kind}"] for theirs, ours in modules.items()}
        for i in range(depth):
            fused = [params[f"encoder.layer.{i}.attn.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(fused)
    return found
