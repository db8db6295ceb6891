"""DD-Adapter's official state dict, DD-SAM2's (https://arxiv.org/abs/2507.14613)."""

import re
from collections.abc import Mapping

from torch import Tensor

from vfmadapt.adapters.dd import DD, Branch
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Adapter
from vfmadapt.interop import Strict
from vfmadapt.testing import vit_spec

PART = re.compile(r"(?:^|\.)blocks\.(\d+)\.(?:.+\.)?((?:pw|dw)[\d_]+\.0\.(?:weight|bias))$")


def load_dd(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Official layout: `...blocks.I. ... .{pw1,dw2_1,dw2_2,pw2}.0.{weight,bias}`.

    Other tensors (frozen encoder, mask decoder, memory) are not the adapter's and are left alone.
    """
    assert isinstance(adapter, DD)
    found = [(match[1], match[2], tensor) for key, tensor in state.items() if (match := PART.search(key))]
    strict = Strict({f"blocks.{block}.{name}": tensor for block, name, tensor in found}, "dd")
    for i, layer in enumerate(adapter.layers):
        assert isinstance(layer, Branch)
        for name, target in _tensors(layer).items():
            strict.copy(target, f"blocks.{i}.{name}")
    strict.done()


def _tensors(layer: Branch) -> dict[str, Tensor]:
    """Our tensors under their published names, in the shapes of 1 x 1 and depthwise convolutions."""
    return _named(layer.down.weight, layer.down.bias, layer.weight, layer.bias, layer.up.weight, layer.up.bias)


def _named(
    down: Tensor, down_bias: Tensor, weight: Tensor, bias: Tensor, up: Tensor, up_bias: Tensor
) -> dict[str, Tensor]:
    found = {"pw1.0.weight": down[..., None, None], "pw1.0.bias": down_bias}
    for rate in range(len(weight)):
        found |= {f"dw2_{rate + 1}.0.weight": weight[rate].unsqueeze(1), f"dw2_{rate + 1}.0.bias": bias[rate]}
    return found | {"pw2.0.weight": up[..., None, None], "pw2.0.bias": up_bias}


def replay_dd(golden: Golden) -> dict[str, Tensor]:
    """What one block's adapter adds to a grid."""
    x = golden.inputs["x"]
    adapter = DD(vit_spec(x.shape[-1]), **golden.settings)
    load_dd(adapter, {f"blocks.0.{name}": tensor for name, tensor in golden.params.items()})
    (layer,) = adapter.layers
    assert isinstance(layer, Branch)
    y = layer.correction(x)
    golden.backward(y)
    tensors = (layer.down.weight, layer.down.bias, layer.weight, layer.bias, layer.up.weight, layer.up.bias)
    grads = [tensor.grad for tensor in (x, *tensors)]
    assert all(grad is not None for grad in grads)
    named = _named(*grads[1:])  # type: ignore[arg-type]
    return {"output/y": y, "grad_input/x": grads[0], **{f"grad_param/{k}": g for k, g in named.items()}}  # type: ignore[dict-item]
