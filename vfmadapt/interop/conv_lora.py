"""Conv-LoRA's official state dict, AutoGluon's (https://arxiv.org/abs/2401.17868)."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from vfmadapt.adapters.conv_lora import ConvLoRA, ConvLowRank
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Adapter, OnLinear
from vfmadapt.interop import Strict
from vfmadapt.testing import vit_spec

LAYER = "vision_encoder.layers.{}.attn.qkv."
"""What stands before a tensor's name in block i; the file may have more before it."""


def load_conv_lora(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Official layout: `...vision_encoder.layers.I.attn.qkv.lora_*`.

    Tensors without "lora_" in their names are not the adapter's (frozen encoder, mask decoder) and are left alone, as
    AutoGluon itself tells them apart.
    """
    assert isinstance(adapter, ConvLoRA)
    before = re.compile(r"^.*?(?=vision_encoder\.)")
    strict = Strict({before.sub("", key): t for key, t in state.items() if "lora_" in key}, "conv_lora")
    for i, layer in enumerate(adapter.layers):
        assert isinstance(layer, ConvLowRank)
        for name, target in _tensors(layer).items():
            strict.copy(target, LAYER.format(i) + name)
        for constant in ("mean", "std"):  # of the standard normal distribution
            strict.take(LAYER.format(i) + f"lora_moe_gating.{constant}")
    strict.done()


def _tensors(layer: ConvLowRank) -> dict[str, Tensor]:
    """Our tensors under their published names."""
    found: dict[str, Tensor] = {"lora_A": layer.pair.down, "lora_B": layer.pair.up}
    found |= {"lora_moe_gating.w_gate": layer.gate.weight, "lora_moe_gating.w_noise": layer.gate.noise}
    for name, tensor in layer.experts.named_parameters():
        found[f"lora_moe_experts.{name.replace('conv', '0')}"] = tensor
    return found


def replay_conv_lora(golden: Golden) -> dict[str, Tensor]:
    """One linear layer on grids, in evaluation mode; both gates give the published numbers."""
    weight, bias, x = golden.params["weight"], golden.params["bias"], golden.inputs["x"]
    spec = replace(vit_spec(x.shape[-1]), linears={"qkv": ((weight.shape[1], weight.shape[0]),)})
    adapter = ConvLoRA(spec, **golden.settings).eval()
    load_conv_lora(adapter, {LAYER.format(0) + key: tensor for key, tensor in golden.params.items()})
    (site,), (layer,) = adapter.sites(), adapter.layers
    assert isinstance(site, OnLinear)
    assert isinstance(layer, ConvLowRank)
    delta, loss = site.fn(x)
    y = F.linear(x, weight, bias) + delta
    golden.backward(y)
    assert x.grad is not None
    assert bias.grad is not None
    grads = {name: tensor.grad for name, tensor in _tensors(layer).items() if tensor.grad is not None}
    return {
        "output/y": y,
        "output/gates": layer.gate(layer.narrow(x).mean((2, 3)))[0],
        "output/moe_loss": loss.reshape(1),
        "grad_input/x": x.grad,
        "grad_param/bias": bias.grad,
        **{f"grad_param/{name}": grad for name, grad in grads.items()},
    }
