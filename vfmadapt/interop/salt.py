"""The released numbers of SALT and S-SAM (https://arxiv.org/abs/2503.16055)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.adapters.salt import Salt, SingularUpdate
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import OnWeight
from vfmadapt.testing import vit_spec

NAMES = {"trainable_X": "mix_out", "trainable_Y": "mix_in", "trainable_scale_A": "scale", "trainable_shift_B": "shift"}
SSAM_NAMES = {"trainable_scale": "scale", "trainable_shift": "shift"}
"""{published name: ours}."""


def replay_salt_linear(golden: Golden) -> dict[str, Tensor]:
    """One linear layer on tokens; only the diagonal is rectified."""
    return _linear(golden, published=False)


def replay_salt_linear_signed(golden: Golden) -> dict[str, Tensor]:
    """The same with every entry rectified, as released."""
    return _linear(golden, published=True)


def _linear(golden: Golden, *, published: bool) -> dict[str, Tensor]:
    rank = golden.settings["r_lora"]
    adapter = _adapter(golden, mode="salt", top=golden.settings["ratio_salt"], rank=rank, published=published)
    return _replay(golden, adapter, NAMES)


def replay_ssam_linear(golden: Golden) -> dict[str, Tensor]:
    """One linear layer of S-SAM on tokens."""
    return _replay(golden, _adapter(golden, mode="ssam", top=1.0, rank=1, published=False), SSAM_NAMES)


def replay_salt_conv2d(golden: Golden) -> dict[str, Tensor]:
    """One convolution: the same function of the flattened kernel."""
    settings, weight = golden.settings, golden.params["weight"]
    layer = SingularUpdate(
        weight.flatten(1).shape[1], weight.shape[0], settings["rank"], rank=settings["r_lora"], scaled=True
    )
    _load(layer, golden, NAMES)
    x, bias = golden.inputs["x"], golden.params["bias"]
    y = F.conv2d(x, layer(weight), bias, stride=settings["stride"], padding=settings["padding"])
    golden.backward(y)
    return {**_gradients(layer, x, NAMES), "output/y": y, "output/reg": layer.penalty().detach().reshape(1)}


def _adapter(golden: Golden, *, mode: str, top: float, rank: int, published: bool) -> Salt:
    """An adapter of one layer with the regulariser at weight 1."""
    size = (golden.settings["in_features"], golden.settings["out_features"])
    spec = replace(vit_spec(size[0]), linears={"proj": (size,)})
    return Salt(spec, mode=mode, roles=["proj"], top=top, rank=rank, weight=1.0, published=published)


def _replay(golden: Golden, adapter: Salt, names: dict[str, str]) -> dict[str, Tensor]:
    (site,) = adapter.sites()
    ((_, _, layer),) = adapter.layers.each()
    _load(layer, golden, names)
    assert isinstance(site, OnWeight)
    x, weight = golden.inputs["x"], site.fn(golden.params["weight"])
    y = F.linear(x, weight, golden.params["bias"])
    golden.backward(y)
    regulariser = adapter.aux_loss()
    assert regulariser is not None
    found = {"output/y": y, "output/weight": weight, "output/reg": regulariser.detach().reshape(1)}
    return {**_gradients(layer, x, names), **found}


@torch.no_grad()
def _load(layer: SingularUpdate, golden: Golden, names: dict[str, str]) -> None:
    """Copy the published tensors; the stored singular vectors are used, since the result depends on their signs."""
    buffers = {"U": layer.left, "S": layer.values, "Vt": layer.right}
    for name, target in [*buffers.items(), *((n, layer.get_parameter(ours)) for n, ours in names.items())]:
        target.copy_(golden.params[name])


def _gradients(layer: SingularUpdate, x: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
    found = {f"grad_param/{name}": layer.get_parameter(ours).grad for name, ours in names.items()}
    return {key: grad for key, grad in {**found, "grad_input/x": x.grad}.items() if grad is not None}
