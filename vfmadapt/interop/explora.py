"""ExPLoRA's published numbers (https://arxiv.org/abs/2406.10973); its released weights are merged: plain ViTs."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.adapters._lora import LowRank
from vfmadapt.adapters.explora import ExPLoRA
from vfmadapt.check_golden import Golden
from vfmadapt.host import AdaptedBackbone
from vfmadapt.interop._vit import give, keep, vit
from vfmadapt.testing import vit_spec


def replay_explora_linear(golden: Golden) -> dict[str, Tensor]:
    """One linear layer with its low-rank update."""
    settings, params, x = golden.settings, golden.params, golden.inputs["x"]
    width = (settings["in_features"], settings["out_features"])
    spec = replace(vit_spec(width[0]), linears={"q": (width,), "v": (width,)})
    pair = _pair(ExPLoRA(spec, rank=settings["rank"], unfrozen=()), "q")
    _fill(pair, golden, "")
    y = F.linear(x, params["weight"], params["bias"]) + pair(x)
    golden.backward(y)
    assert x.grad is not None
    merged = params["weight"] + pair.delta_weight()
    return {"output/y": y, "output/merged_weight": merged, "grad_input/x": x.grad, **_gradients(pair, "")}


def replay_explora_attention(golden: Golden) -> dict[str, Tensor]:
    """Attention of the first of two blocks, which is given the stored input in place of its own."""
    settings, params, x = golden.settings, golden.params, golden.inputs["x"]
    size = {"embed_dim": settings["dim"], "num_heads": settings["num_heads"], "depth": 2}
    backbone = vit(**size, patch_size=16, class_token=False, global_pool="avg")
    attention = backbone.place("attn", 0).module
    weights = {f"proj.{kind}": params[f"proj.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        weights[f"qkv.{kind}"] = torch.cat([params[f"{part}_proj.{kind}"] for part in "qkv"])
    attention.load_state_dict(weights)
    adapter = ExPLoRA(backbone.spec, rank=settings["rank"])
    for role in ("q", "v"):
        _fill(_pair(adapter, role), golden, f"{role}_proj.")
    model = AdaptedBackbone(backbone, {"main": adapter})
    outputs: list[Tensor] = []
    attention.register_forward_pre_hook(partial(give, x))
    attention.register_forward_hook(partial(keep, outputs))
    model(torch.zeros(len(x), 3, 16, 16 * x.shape[1]), [0])  # as many patches as x has tokens
    golden.backward(outputs[0])
    assert x.grad is not None
    gradients = _gradients(_pair(adapter, "q"), "q_proj.") | _gradients(_pair(adapter, "v"), "v_proj.")
    return {"output/y": outputs[0], "grad_input/x": x.grad, **gradients}


def _pair(adapter: ExPLoRA, role: str) -> LowRank:
    pair = adapter.get_submodule(f"updates.0.{role}")
    assert isinstance(pair, LowRank)
    return pair


def _fill(pair: LowRank, golden: Golden, prefix: str) -> None:
    pair.down.data.copy_(golden.params[f"{prefix}lora_A"])
    pair.up.data.copy_(golden.params[f"{prefix}lora_B"])


def _gradients(pair: LowRank, prefix: str) -> dict[str, Tensor]:
    assert pair.down.grad is not None
    assert pair.up.grad is not None
    return {f"grad_param/{prefix}lora_A": pair.down.grad, f"grad_param/{prefix}lora_B": pair.up.grad}
