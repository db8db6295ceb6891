"""The released numbers of FLoRA (https://arxiv.org/abs/2405.14739)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.adapters.flora_tucker import FloraTucker, TuckerUpdate
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import OnLinear
from vfmadapt.testing import vit_spec


def replay_flora_linear(golden: Golden) -> dict[str, Tensor]:
    """One linear layer on tokens."""
    settings, x = golden.settings, golden.inputs["x"]
    size = (settings["in_features"], settings["out_features"])
    spec = replace(vit_spec(size[0]), linears={"proj": (size,)})
    adapter = FloraTucker(spec, roles=["proj"], ranks=tuple(settings["r"]), scale=settings["scale"]).eval()
    (site,) = adapter.sites()
    ((_, _, layer),) = adapter.layers.each()
    _load(layer, golden)
    assert isinstance(site, OnLinear)
    y = F.linear(x, golden.params["base_layer.weight"], golden.params["base_layer.bias"])
    return _found(layer, golden, y + site.fn(x))


def replay_flora_conv2d(golden: Golden) -> dict[str, Tensor]:
    """One convolution."""
    settings, x = golden.settings, golden.inputs["x"]
    sizes = (settings["in_channels"], settings["out_channels"], *settings["kernel_size"])
    layer = TuckerUpdate(sizes, settings["r"], scale=settings["scale"])
    _load(layer, golden)
    kernel = golden.params["base_layer.weight"] + layer.delta()
    how = {name: settings[name] for name in ("stride", "padding", "dilation")}
    return _found(layer, golden, F.conv2d(x, kernel, golden.params["base_layer.bias"], **how))


def _named(layer: TuckerUpdate) -> dict[str, Tensor]:
    """{published name: our parameter}."""
    factors = {f"flora_layer.param_{axis}": factor for axis, factor in enumerate(layer.factors)}
    return {"flora_layer.param_G": layer.core, **factors}


@torch.no_grad()
def _load(layer: TuckerUpdate, golden: Golden) -> None:
    for name, parameter in _named(layer).items():
        parameter.copy_(golden.params[name])


def _found(layer: TuckerUpdate, golden: Golden, y: Tensor) -> dict[str, Tensor]:
    golden.backward(y)
    tensors = {f"grad_param/{name}": parameter.grad for name, parameter in _named(layer).items()}
    tensors["grad_input/x"] = golden.inputs["x"].grad
    gradients = {key: grad for key, grad in tensors.items() if grad is not None}
    return {**gradients, "output/y": y, "output/delta": layer.delta()}
