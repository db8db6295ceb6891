"""Earth-Adapter's official state dict (https://arxiv.org/abs/2504.06220)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vfmadapt.adapters.earth import Bottleneck, Earth, FrequencyMixture
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Adapter
from vfmadapt.interop import Strict
from vfmadapt.testing import vit_spec


def load_earth(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Official layout: `mlp_listK.L.{0,2}.{weight,bias}`, `router.L.{weight,bias}`, `scale` (one per layer).

    Layers that our adapter does not build (experts and routers that no forward uses) may be in the file.
    """
    assert isinstance(adapter, Earth)
    strict = Strict({k: v for k, v in state.items() if _is_used(adapter, k)}, "earth")
    scale = strict.take("scale")
    for number, layer in adapter.layers.items():
        assert isinstance(layer, Bottleneck | FrequencyMixture)
        layer.scale.data.copy_(scale[int(number)])
        for target, key in _tensors(layer, number):
            transpose = isinstance(layer, FrequencyMixture) and key.endswith("2.weight")
            strict.copy(target, key, transpose=transpose)
    strict.done()


def _is_used(adapter: Earth, key: str) -> bool:
    """Published files hold all three experts and a router for every layer; only mixtures have them all."""
    kind, _, rest = key.partition(".")
    layer = adapter.layers[rest.split(".")[0]] if rest and rest.split(".")[0] in adapter.layers else None
    return isinstance(layer, FrequencyMixture) or kind in ("mlp_list1", "scale")


def _tensors(layer: Bottleneck | FrequencyMixture, number: str) -> list[tuple[Tensor, str]]:
    """(our tensor or a view of it, published name)."""
    if isinstance(layer, Bottleneck):
        ours = {"0.weight": layer.down.weight, "0.bias": layer.down.bias}
        ours |= {"2.weight": layer.up.weight, "2.bias": layer.up.bias}
        return [(tensor, f"mlp_list1.{number}.{name}") for name, tensor in ours.items()]
    return _views(layer.down, layer.down_bias, layer.up, layer.up_bias, number)


def _views(down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, number: str) -> list[tuple[Tensor, str]]:
    dim, found = up.shape[0] // 3, []
    for k in range(3):
        rows = slice(k * dim, (k + 1) * dim)
        found += [
            (down[rows], f"mlp_list{k + 1}.{number}.0.weight"),
            (down_bias[rows], f"mlp_list{k + 1}.{number}.0.bias"),
            (up[rows], f"mlp_list{k + 1}.{number}.2.weight"),
            (up_bias[k], f"mlp_list{k + 1}.{number}.2.bias"),
        ]
    return [
        *found,
        (down[3 * dim :], f"router.{number}.weight"),
        (down_bias[3 * dim :], f"router.{number}.bias"),
    ]


def replay_earth(golden: Golden) -> dict[str, Tensor]:
    """One layer on a class token and a square grid."""
    settings, x = golden.settings, golden.inputs["x"]
    number, depth, side = settings["layer"], len(golden.params["scale"]), round((x.shape[1] - 1) ** 0.5)
    adapter = Earth(
        vit_spec(x.shape[-1], depth), dim=settings["dim"], cutoff_ratio=settings["cutoff_ratio"], fft_layers=[0]
    )
    layer = adapter.layers[str(number)]
    assert isinstance(layer, Bottleneck | FrequencyMixture)
    mixed = isinstance(layer, FrequencyMixture)
    for target, key in _tensors(layer, str(number)):
        target.data.copy_(golden.params[key].T if mixed and key.endswith("2.weight") else golden.params[key])
    layer.scale.data.copy_(golden.params["scale"][number])
    y = torch.cat([x[:, :1], layer(x[:, 1:].unflatten(1, (side, side))).flatten(1, 2)], 1)
    golden.backward(y)
    found: dict[str, Tensor] = {"output/y": y}
    if isinstance(layer, FrequencyMixture):
        down, down_bias, up, up_bias = (p.grad for p in (layer.down, layer.down_bias, layer.up, layer.up_bias))
        named = _views(down, down_bias, up, up_bias, str(number))  # type: ignore[arg-type]
    else:
        named = [(p.grad, f"mlp_list1.{number}.{n}") for n, p in _published_bottleneck(layer)]  # type: ignore[misc]
    for tensor, key in named:
        found[f"grad_param/{key}"] = tensor.T if mixed and key.endswith("2.weight") else tensor
    gradient = torch.zeros(depth)
    assert layer.scale.grad is not None
    gradient[number] = layer.scale.grad
    assert x.grad is not None
    return {**found, "grad_param/scale": gradient, "grad_input/x": x.grad}


def _published_bottleneck(layer: Bottleneck) -> list[tuple[str, Tensor]]:
    down, up = layer.down, layer.up
    return [("0.weight", down.weight), ("0.bias", down.bias), ("2.weight", up.weight), ("2.bias", up.bias)]
