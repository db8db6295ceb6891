"""Published numbers of the linear adapters that merge: Hydra, RepAdapter, ZeroI2V (links in the adapters' files).

Each replay attaches the adapter to a ViT of one block and looks at one layer of it.
"""

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from vfmadapt.adapters._affine import AffineBottleneck
from vfmadapt.adapters.hydra_lora import HydraLora
from vfmadapt.adapters.linear import LinearAdapters
from vfmadapt.adapters.repadapter import RepAdapter
from vfmadapt.backbones.timm_models import wrap_timm
from vfmadapt.backbones.timm_vit import TimmBackbone
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Adapter
from vfmadapt.host import AdaptedBackbone
from vfmadapt.interop._vit import through, vit
from vfmadapt.testing import vit_spec


def replay_hydra_linear(golden: Golden) -> dict[str, Tensor]:
    """Both branches at a linear layer, as fc2."""
    settings = golden.settings
    frozen = _one_block(settings["out_features"], hidden=settings["in_features"])
    adapter = HydraLora(frozen.spec, rank=settings["rank"], scale=settings["scale"])
    ours = _linear(frozen, "fc2", "fc2")
    ours |= _bottleneck(adapter, "parallel.fc2.0", "hydra_mlp_par.down_proj", "hydra_mlp_par.up_proj")
    ours |= _bottleneck(adapter, "sequential.fc2.0", "hydra_mlp_seq.down_proj", "hydra_mlp_seq.up_proj")
    return _replay(golden, frozen, adapter, "fc2", ours)


def replay_repadapter_linear(golden: Golden) -> dict[str, Tensor]:
    """A bottleneck before a linear layer, as fc1."""
    settings = golden.settings
    frozen = _one_block(settings["in_features"], hidden=settings["out_features"])
    sizes = {"dim": settings["hidden_dim"], "groups": settings["groups"], "scale": settings["scale"]}
    adapter = RepAdapter(frozen.spec, **sizes)
    ours = _linear(frozen, "fc1", "linear")
    ours |= _bottleneck(adapter, "bottlenecks.fc1.0", "adapter.conv_A", "adapter.conv_B")
    return _replay(golden, frozen, adapter, "fc1", ours)


def replay_repadapter_2d(golden: Golden) -> dict[str, Tensor]:
    """The bottleneck by itself, on a map (B, C, H, W)."""
    settings, x = golden.settings, golden.inputs["x"]
    sizes = {"dim": settings["hidden_dim"], "groups": settings["groups"], "scale": settings["scale"]}
    adapter = RepAdapter(vit_spec(settings["in_features"]), **sizes)
    ours = _bottleneck(adapter, "bottlenecks.fc1.0", "conv_A", "conv_B")
    _fill(golden, ours)
    bottleneck = cast(AffineBottleneck, adapter.get_submodule("bottlenecks.fc1.0"))
    y = bottleneck.residual(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    golden.backward(y)
    return {"output/y": y, **_gradients(golden, ours)}


def replay_zeroi2v_pre(golden: Golden) -> dict[str, Tensor]:
    """A bottleneck before a linear layer, as fc1."""
    return _replay_zeroi2v(golden, "fc1", golden.settings["in_features"], golden.settings["out_features"])


def replay_zeroi2v_post(golden: Golden) -> dict[str, Tensor]:
    """A bottleneck after a linear layer, as fc2."""
    return _replay_zeroi2v(golden, "fc2", golden.settings["out_features"], golden.settings["in_features"])


def _replay_zeroi2v(golden: Golden, role: str, width: int, hidden: int) -> dict[str, Tensor]:
    frozen = _one_block(width, hidden=hidden)
    adapter = LinearAdapters(frozen.spec, ratio=golden.settings["mlp_ratio"], scale=golden.settings["scale"])
    ours = _linear(frozen, role, "linear")
    ours |= _bottleneck(adapter, f"bottlenecks.{role}.0", "adapter.D_fc1", "adapter.D_fc2")
    return _replay(golden, frozen, adapter, role, ours)


def replay_zeroi2v_stdha(golden: Golden) -> dict[str, Tensor]:
    """Attention of a frozen block with keys and values shifted in time; x is (tokens, videos * frames, C)."""
    settings = golden.settings
    frozen = _one_block(settings["embed_dim"], hidden=settings["embed_dim"], heads=settings["num_heads"])
    attention = frozen.place("attn", 0).module
    ours = {
        f"{theirs}{kind}": attention.get_parameter(f"{name}.{kind}")
        for theirs, name, kind in [
            ("in_proj_", "qkv", "weight"),
            ("in_proj_", "qkv", "bias"),
            ("out_proj.", "proj", "weight"),
            ("out_proj.", "proj", "bias"),
        ]
    }
    _fill(golden, ours)
    adapter = LinearAdapters(frozen.spec, frames=settings["num_frames"], shift_div=settings["shift_div"])
    model = AdaptedBackbone(frozen, {"main": adapter})
    attention.requires_grad_(True)
    y = through(model, "attn", golden.inputs["x"].transpose(0, 1)).transpose(0, 1)
    golden.backward(y)
    return {"output/y": y, **_gradients(golden, ours)}


def _one_block(width: int, *, hidden: int, heads: int = 1) -> TimmBackbone:
    # timm rounds width * mlp_ratio down
    return vit(embed_dim=width, depth=1, num_heads=heads, mlp_ratio=(hidden + 0.5) / width)


def _linear(frozen: TimmBackbone, role: str, published: str) -> dict[str, Tensor]:
    module = frozen.place(role, 0).module
    return {f"{published}.{kind}": module.get_parameter(kind) for kind in ("weight", "bias")}


def _bottleneck(adapter: Adapter, ours: str, down: str, up: str) -> dict[str, Tensor]:
    """Our tensors of a bottleneck by their published names."""
    found = adapter.get_submodule(ours)
    names = {
        f"{down}.weight": "down.weight",
        f"{down}.bias": "down.bias",
        f"{up}.weight": "up",
        f"{up}.bias": "up_bias",
    }
    return {published: found.get_parameter(name) for published, name in names.items()}


def _fill(golden: Golden, ours: Mapping[str, Tensor]) -> None:
    for name, tensor in ours.items():
        grouped = tensor.ndim == 3  # (groups, dim / groups, out / groups) for the published (out, dim / groups)
        value = golden.params[name]
        tensor.data.copy_(value.reshape(tensor.mT.shape).mT if grouped else value.reshape(tensor.shape))


def _gradients(golden: Golden, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in ours.items():
        if tensor.grad is not None:
            grad = tensor.grad.mT if tensor.ndim == 3 else tensor.grad
            found[f"grad_param/{name}"] = grad.reshape(golden.params[name].shape)
    x = golden.inputs["x"]
    assert x.grad is not None
    return {**found, "grad_input/x": x.grad}


def _replay(
    golden: Golden, frozen: TimmBackbone, adapter: Adapter, role: str, ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    _fill(golden, ours)
    model = AdaptedBackbone(frozen, {"main": adapter})
    y = through(model, role, golden.inputs["x"])
    golden.backward(y)
    merged = wrap_timm(model.merge()).place(role, 0).module
    kinds = ("weight", "bias")
    folded = {f"output/merged_{kind}": merged.get_parameter(kind) for kind in kinds}
    return {"output/y": y, **folded, **_gradients(golden, ours)}
