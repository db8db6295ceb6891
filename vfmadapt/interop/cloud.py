"""Cloud-Adapter's official state dict (https://arxiv.org/abs/2411.13127)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vfmadapt.adapters.cloud import Cloud
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Adapter, AfterBlock, OnImage
from vfmadapt.interop import Strict
from vfmadapt.testing import vit_spec

PARTS = {
    "perception.first.": "cnn.proj_1x1.",
    "perception.levels.": "cnn.spp_dw.",
    ".spatial.": ".conv_dw.",
    ".mix.": ".conv_pw.",
    ".norm1.": ".bn1.",
    ".norm2.": ".bn2.",
    ".query.": ".attn.to_q.loramlp.",
    ".key.": ".attn.to_k.loramlp.",
    ".value.": ".attn.to_v.loramlp.",
    ".out.": ".attn.to_out.loramlp.",
}
"""Our part of a name -> the published one."""


def load_cloud(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Official layout: `cnn.*` (running statistics included) and `net.I.attn.*`, I counting the adapted blocks."""
    assert isinstance(adapter, Cloud)
    strict = Strict(state, "cloud")
    own = adapter.state_dict()
    for name, key in _published(adapter, own).items():
        strict.copy(own[name], key)
    strict.done()


def _published(adapter: Cloud, names: Mapping[str, object]) -> dict[str, str]:
    """{our name: published name}."""
    positions = {f"layers.{block}.": f"net.{position}." for position, block in enumerate(adapter.layers)}
    found = {}
    for name in names:
        key = name
        for ours, theirs in {**positions, **PARTS}.items():
            key = key.replace(ours, theirs)
        found[name] = key
    return found


def replay_cloud(golden: Golden) -> dict[str, Tensor]:
    """The context of a batch of images, then interactions in turn on a class token and a square grid."""
    image, x, settings = golden.inputs["image"], golden.inputs["x"], golden.settings
    depth = 1 + max(int(key.split(".")[1]) for key in golden.params if key.startswith("net."))
    spec = replace(vit_spec(x.shape[-1], depth), bands=image.shape[1])
    adapter = Cloud(spec, rank=settings["rank"], context_dim=settings["context_dim"]).eval()
    load_cloud(adapter, golden.params)
    perception, *blocks = adapter.sites()
    assert isinstance(perception, OnImage)
    context, side = perception.fn(image), round((x.shape[1] - 1) ** 0.5)
    prefix, grid = x[:, :1], x[:, 1:].unflatten(1, (side, side))
    for block in settings["layers"]:
        site = blocks[block]
        assert isinstance(site, AfterBlock)
        grid = site.fn(grid, context)
    y = torch.cat([prefix, grid.flatten(1, 2)], 1)
    golden.backward(y)
    names = _published(adapter, dict(adapter.named_parameters()))
    grads = {names[name]: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert isinstance(context, Tensor)
    found = {"output/y": y, "output/context": context, **{f"grad_param/{key}": g for key, g in grads.items()}}
    return found | {f"grad_input/{key}": leaf.grad for key, leaf in golden.inputs.items() if leaf.grad is not None}
