"""EndoDAC's official tensors and published numbers (https://arxiv.org/abs/2405.08672)."""

from collections.abc import Mapping

from torch import Tensor, nn

from vfmadapt.adapters.dv_lora import DVLoRA, Neck
from vfmadapt.check_golden import Golden
from vfmadapt.host import AdaptedBackbone
from vfmadapt.interop._vit import through, vit
from vfmadapt.testing import vit_spec


def replay_endodac_dvlora(golden: Golden) -> dict[str, Tensor]:
    """Low-rank update with its vectors at a linear layer, as fc1; in evaluation all four tensors get a gradient."""
    settings = golden.settings
    width, hidden = settings["in_features"], settings["out_features"]
    frozen = vit(embed_dim=width, depth=1, num_heads=1, mlp_ratio=(hidden + 0.5) / width)  # timm rounds down
    linear = frozen.place("fc1", 0).module
    linear.load_state_dict({kind: golden.params[kind] for kind in ("weight", "bias")})
    adapter = DVLoRA(frozen.spec, rank=settings["rank"], alpha=settings["alpha"], necks=[])
    pair = adapter.get_submodule("updates.fc1.0")
    names = {"lora_A": "down", "lora_B": "up", "lora_U": "inner", "lora_V": "outer"}
    ours = {published: pair.get_parameter(name) for published, name in names.items()}
    fill(ours, golden.params)
    model = AdaptedBackbone(frozen, {"main": adapter})
    x = golden.inputs["x"]
    y = through(model, "fc1", x)
    golden.backward(y)
    merged = model.merge().get_parameter("blocks.0.mlp.fc1.weight")
    return {"output/y": y, "output/weight": merged, **gradients({"x": x}, ours, golden.params)}


def replay_endodac_neck(golden: Golden) -> dict[str, Tensor]:
    """What a neck adds to a map (B, C, H, W)."""
    neck, x = Neck(golden.settings["channels"]), golden.inputs["x"]
    ours = _neck(neck)
    fill(ours, golden.params)
    y = neck.correction(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    golden.backward(y)
    return {"output/y": y, **gradients({"x": x}, ours, golden.params)}


def replay_endodac_neck_tokens(golden: Golden) -> dict[str, Tensor]:
    """A neck after a block that gives its input back; x is a class token and a grid that is not square."""
    settings, x = golden.settings, golden.inputs["x"]
    frozen = vit(embed_dim=settings["dim"], depth=1, num_heads=1, init_values=1e-30)  # timm takes 0 for "no scale"
    adapter = DVLoRA(vit_spec(settings["dim"]), necks=[0])
    neck = adapter.get_submodule("necks.0")
    assert isinstance(neck, Neck)
    ours = {f"residual_.{name}": tensor for name, tensor in _neck(neck).items()}
    fill(ours, golden.params)
    model = AdaptedBackbone(frozen, {"main": adapter})
    block = frozen.blocks()[0]
    y = through(model, block, x, grid=(settings["grid_h"], settings["grid_w"]))
    golden.backward(y)
    return {"output/y": y, **gradients({"x": x}, ours, golden.params)}


def fill(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Copy the published tensors into ours of the same names and, but for axes of length 1, shapes."""
    for name, tensor in ours.items():
        tensor.data.copy_(theirs[name].reshape(tensor.shape))


def gradients(
    inputs: Mapping[str, Tensor], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients under the keys of a golden file, in the published shapes."""
    found = {}
    for kind, tensors in (("input", inputs), ("param", ours)):
        for name, tensor in tensors.items():
            assert tensor.grad is not None
            found[f"grad_{kind}/{name}"] = tensor.grad.reshape(theirs[name].shape) if kind == "param" else tensor.grad
    return found


def _neck(neck: Neck) -> dict[str, Tensor]:
    """A neck's tensors by their published names."""
    layers: list[tuple[str, nn.Module]] = [("conv1", neck.down), ("conv2", neck.conv), ("conv3", neck.up)]
    found: dict[str, Tensor] = {f"{name}.weight": layer.get_parameter("weight") for name, layer in layers}
    for i, norm in enumerate(neck.norms):
        found |= {f"norm{i + 1}.{kind}": norm.get_parameter(kind) for kind in ("weight", "bias")}
    return found
