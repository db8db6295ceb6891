"""The released numbers of MapSAM (https://arxiv.org/abs/2411.06971)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters.mapsam_dora import MapSamDora
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import OnWeight
from vfmadapt.heads._mapsam import (
    attended_cells,
    make_generator,
    mean_where,
    score_tokens,
    select_points,
    two_way,
)
from vfmadapt.heads._sam import make_mask_decoder
from vfmadapt.testing import vit_spec

NAMES = {"lora_A": "up", "lora_B": "down", "m": "magnitude"}
"""{published name before the role: ours}."""

MASKED = -1e9  # what the release adds where no attention may go


def replay_mapsam_dora(golden: Golden) -> dict[str, Tensor]:
    """The fused qkv layer of one block on grids."""
    x, frozen = golden.inputs["x"], golden.params["weight"]
    adapter = MapSamDora(vit_spec(golden.settings["dim"]), rank=golden.settings["rank"])
    named = {
        f"{name}_{role}": layer.get_parameter(ours)
        for role, _, layer in adapter.layers.each()
        for name, ours in NAMES.items()
    }
    _load(named, golden.params)
    parts = dict(zip("qkv", frozen.chunk(3), strict=True))
    for site in adapter.sites():
        assert isinstance(site, OnWeight)
        parts[site.role] = site.fn(parts[site.role])
    weight = torch.cat([*parts.values()])
    y = F.linear(x, weight, golden.params["bias"])
    golden.backward(y)
    return {"output/y": y, "output/weight": weight, **_gradients(named, {"x": x})}


def replay_mapsam_spgen(golden: Golden) -> dict[str, Tensor]:
    """One head of the prompt generator."""
    x = golden.inputs["x"]
    generator = make_generator(x.shape[1], classes=1)
    named = _named(generator, "hint.")
    _load(named, golden.params)
    y = generator(x)
    golden.backward(y)
    return {"output/y": y, **_gradients(named, {"x": x})}


def replay_mapsam_prompts(golden: Golden) -> dict[str, Tensor]:
    """Points, semantic prompt and mask from an image embedding and three states."""
    states, size = golden.inputs, golden.settings["image_size"]
    sources = {"spgen": "image_embedding", "spgen1": "state0", "spgen2": "state1", "spgen3": "state2"}
    named: dict[str, Tensor] = {}
    found = []
    for name, source in sources.items():
        generator = make_generator(states[source].shape[1], classes=1)
        own = _named(generator, f"{name}.hint.")
        _load(own, golden.params)
        named |= own
        found.append(generator(states[source]))
    coarse = torch.stack(found).mean(0)
    y = F.interpolate(coarse, (size // 4, size // 4), mode="bilinear", align_corners=False)
    golden.backward(y)
    points, labels = select_points(F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False))
    cells = attended_cells(coarse)
    return {
        "output/y": y,
        "output/points": points[:, 0].float(),
        "output/labels": labels[:, 0].float(),
        "output/target_embedding": mean_where(cells, states["image_embedding"])[:, 0],
        "output/attn_bias": _bias(cells)[:, 0],
        **_gradients(named, states),
    }


def replay_mapsam_semantic(golden: Golden) -> dict[str, Tensor]:
    """A two-way transformer of one layer with the semantic prompt and without a mask."""
    settings, inputs = golden.settings, golden.inputs
    decoder = make_mask_decoder(settings["embedding_dim"], settings["mlp_dim"], settings["num_heads"], masks=0)
    transformer = decoder.transformer
    transformer.layers = transformer.layers[: settings["depth"]]
    _load(_named(transformer), golden.params)
    image, places = (inputs[key].flatten(2).mT for key in ("image_embedding", "image_pe"))
    tokens = inputs["point_embedding"]
    everywhere = torch.ones(len(image), 1, image.shape[1], dtype=torch.bool)
    owners = torch.ones(tokens.shape[1], 1)
    y, keys = two_way(transformer, image, places, tokens, inputs["target_embedding"], owners=owners, cells=everywhere)
    golden.backward(y)
    scores = score_tokens(transformer, tokens[:, 1:2], image + places)
    return {
        "output/y": y,
        "output/keys": keys,
        "output/mask_bias": _bias(attended_cells(scores))[:, 0],
        **_gradients(_named(transformer), inputs),
    }


def _bias(cells: Tensor) -> Tensor:
    return torch.zeros(cells.shape).masked_fill(~cells, MASKED)


def _named(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: parameter for name, parameter in module.named_parameters()}


@torch.no_grad()
def _load(named: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    for name, target in named.items():
        target.copy_(params[name])


def _gradients(named: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {f"grad_param/{name}": tensor.grad for name, tensor in named.items()}
    found |= {f"grad_input/{name}": tensor.grad for name, tensor in inputs.items()}
    return {key: grad for key, grad in found.items() if grad is not None}
