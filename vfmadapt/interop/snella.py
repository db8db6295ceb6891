"""The released numbers of SNELL and SNELLA (https://arxiv.org/abs/2510.24037)."""

from dataclasses import replace

import torch
from torch import Tensor

from vfmadapt.adapters.snella import Snella
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import OnLinear
from vfmadapt.testing import vit_spec

NAMES = {"In_Qs": "inputs", "Out_Qs": "outputs", "alpha": "alpha", "beta": "beta", "gamma": "gamma"}
"""{published name: ours}; the published `shared_coeff_fc` is the constant KERNEL_SCALE with both signs."""


def replay_snell_delta(golden: Golden) -> dict[str, Tensor]:
    """The update of one linear layer."""
    return _replay(golden, "snell")


def replay_snella_delta(golden: Golden) -> dict[str, Tensor]:
    """The update of one linear layer with the mixed kernel."""
    return _replay(golden, "snella")


def _replay(golden: Golden, mode: str) -> dict[str, Tensor]:
    settings, x = golden.settings, golden.inputs["x"]
    size = (settings["in_features"], settings["out_features"])
    spec = replace(vit_spec(size[0]), linears={"proj": (size,)})
    adapter = Snella(spec, mode=mode, roles=["proj"], rank=settings["rank"], sparsity=settings["threshold"]).eval()
    (site,) = adapter.sites()
    ((_, _, layer),) = adapter.layers.each()
    names = {theirs: ours for theirs, ours in NAMES.items() if theirs in golden.params}
    with torch.no_grad():
        layer.sparsity.fill_(settings["threshold"])
        for theirs, ours in names.items():
            layer.get_parameter(ours).copy_(golden.params[theirs])
    assert isinstance(site, OnLinear)
    y = site.fn(x)
    golden.backward(y)
    tensors = {f"grad_param/{theirs}": layer.get_parameter(ours).grad for theirs, ours in names.items()}
    tensors["grad_input/x"] = x.grad
    gradients = {key: grad for key, grad in tensors.items() if grad is not None}
    return {**gradients, "output/y": y, "output/delta": layer.delta()}
