"""The released numbers of PEGO (https://arxiv.org/abs/2407.15085)."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.adapters.pego import Pego
from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Backbone, OnLinear
from vfmadapt.testing import vit_spec


def replay_pego_group(golden: Golden) -> dict[str, Tensor]:
    """One fused qkv layer on tokens."""
    settings, x = golden.settings, golden.inputs["x"]
    adapter = Pego(vit_spec(settings["dim"]), group=settings["group"], rank=settings["rank"])
    _load(adapter, golden.params, [""])
    deltas = {site.role: site.fn(x) for site in adapter.sites() if isinstance(site, OnLinear)}
    y = F.linear(x, golden.params["qkv.weight"], golden.params["qkv.bias"]) + _between_zeros(deltas, dim=-1)
    golden.backward(y)
    changes = {role: layer.delta_weight() for role, _, layer in adapter.layers.each()}
    weight = golden.params["qkv.weight"] + _between_zeros(changes, dim=0)
    assert x.grad is not None
    return {**_gradients(adapter, [""]), "grad_input/x": x.grad, "output/y": y, "output/weight": weight}


def _between_zeros(parts: Mapping[str, Tensor], dim: int) -> Tensor:
    """The parts of q and v as they lie in the fused qkv, k being 0."""
    return torch.cat([parts["q"], torch.zeros_like(parts["q"]), parts["v"]], dim)


def replay_pego_loss(golden: Golden) -> dict[str, Tensor]:
    """The loss over the blocks of a ViT."""
    settings = golden.settings
    backbone = _backbone(settings["dim"], settings["blocks"], golden.params)
    adapter = Pego(backbone.spec, group=settings["group"], rank=settings["rank"], weight=1.0)
    adapter.bind(backbone)
    prefixes = [f"blocks.{index}." for index in range(settings["blocks"])]
    _load(adapter, golden.params, prefixes)
    y = adapter.aux_loss()
    assert y is not None
    golden.backward(y.reshape(1))
    base, mutual = (part.detach().reshape(1) for part in adapter.orthogonality())
    return {**_gradients(adapter, prefixes), "output/y": y.reshape(1), "output/base": base, "output/mutual": mutual}


def _backbone(dim: int, blocks: int, params: Mapping[str, Tensor]) -> Backbone:
    """A tiny ViT with the stored qkv weights."""
    settings = {"embed_dim": dim, "depth": blocks, "num_heads": 1}
    backbone = timm_backbone("vit_tiny_patch16_224", pretrained=False, settings=settings)
    assert isinstance(backbone, Backbone)
    for index in range(blocks):
        weight = backbone.place("qkv", index).module.get_parameter("weight")
        weight.data.copy_(params[f"blocks.{index}.qkv.weight"])
    return backbone


def _named(adapter: Pego, prefixes: list[str], *, gradients: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(published name, view of our tensor or of its gradient)."""
    for role, index, layer in adapter.layers.each():
        down, up = (p.grad if gradients else p.data for p in (layer.down, layer.up))
        assert down is not None
        assert up is not None
        for number, part in enumerate(down.chunk(adapter.group)):
            yield f"{prefixes[index]}linear_a_{role}.{number}.weight", part
        for number, part in enumerate(up.chunk(adapter.group, dim=1)):
            yield f"{prefixes[index]}linear_b_{role}.{number}.weight", part


@torch.no_grad()
def _load(adapter: Pego, params: Mapping[str, Tensor], prefixes: list[str]) -> None:
    for name, part in _named(adapter, prefixes):
        part.copy_(params[name])


def _gradients(adapter: Pego, prefixes: list[str]) -> dict[str, Tensor]:
    return {f"grad_param/{name}": part for name, part in _named(adapter, prefixes, gradients=True)}
