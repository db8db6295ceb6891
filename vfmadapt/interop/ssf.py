"""SSF's official state dict (https://arxiv.org/abs/2210.08823)."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vfmadapt.adapters.ssf import SSF
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Adapter
from vfmadapt.host import AdaptedBackbone
from vfmadapt.interop import Strict
from vfmadapt.interop._vit import vit

PUBLISHED = {
    "patch_embed": "patch_embed.ssf_{}_1",
    "norm1": "blocks.{i}.ssf_{}_1",
    "qkv": "blocks.{i}.attn.ssf_{}_1",
    "proj": "blocks.{i}.attn.ssf_{}_2",
    "norm2": "blocks.{i}.ssf_{}_2",
    "fc1": "blocks.{i}.mlp.ssf_{}_1",
    "fc2": "blocks.{i}.mlp.ssf_{}_2",
    "norm": "ssf_{}_1",
}
"""Published name of a role's "scale" or "shift"."""


def load_ssf(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Official layout: `ssf_scale_N` and `ssf_shift_N` beside the frozen weights, which may be in the file."""
    assert isinstance(adapter, SSF)
    strict = Strict({k: v for k, v in state.items() if k.rpartition(".")[2].startswith("ssf_")}, "ssf")
    for ours, key in _tensors(adapter):
        strict.copy(ours, key)
    strict.done()


def _tensors(adapter: SSF) -> Iterator[tuple[Tensor, str]]:
    """(our tensor, published name)."""
    for role, index, layer in adapter.layers():
        for kind, ours in (("scale", layer.scale), ("shift", layer.shift)):
            yield ours, PUBLISHED[role].format(kind, i=index)


def replay_ssf_vit(golden: Golden) -> dict[str, Tensor]:
    """A whole ViT, its final norm included."""
    keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    frozen = {k: v for k, v in golden.params.items() if "ssf_" not in k}
    backbone = vit(frozen, final_norm=True, **{key: golden.settings[key] for key in keys})
    adapter = SSF(backbone.spec)
    load_ssf(adapter, golden.params)
    model, last = AdaptedBackbone(backbone, {"main": adapter}), backbone.spec.depth - 1
    features = model(golden.inputs["image"], [last])
    y = torch.cat([features.prefix[0], features.grids[0].flatten(2).mT], dim=1)
    golden.backward(y)
    found = {"output/y": y, "grad_input/image": golden.inputs["image"].grad}
    found |= {f"grad_param/{key}": ours.grad for ours, key in _tensors(adapter)}
    return {key: tensor for key, tensor in found.items() if tensor is not None}
