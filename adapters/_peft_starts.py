"""Starts of LoRA that look at data: what the frozen layers get as input, or how a loss would change them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vfmadapt.adapters._peft_layers import NAME, Keyed, stand_in, wrap
from vfmadapt.contracts import Backbone, UserError

Modules = Mapping[str, nn.Linear]


@contextmanager
def _watched(modules: Modules, see: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """While entered, `see` gets the key and the inputs (N, in) of every call of a module."""
    handles = [m.register_forward_pre_hook(partial(_show, see, key)) for key, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _show(see: Callable[[str, Tensor], Any], key: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    see(key, args[0].detach().flatten(0, -2).float())


def _feed(backbone: Backbone, batches: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for image in batches:
            backbone(image, [backbone.spec.depth - 1])


def eva(backbone: Backbone, modules: Modules, batches: Iterable[Tensor], rank: int, rho: float) -> dict[str, Tensor]:
    """A (round(rank * rho), in) of every layer: the principal directions of its inputs that explain most of them.

    The ranks of all layers add up to rank * layers; rows that a layer does not get are zero.
    """
    from peft.utils.incremental_pca import IncrementalPCA

    rows = round(rank * rho)
    found = {key: IncrementalPCA(n_components=rows, lowrank=True, lowrank_seed=0) for key in modules}
    try:
        with _watched(modules, partial(_fit, found)):
            _feed(backbone, batches)
    except ValueError as error:  # fewer inputs than components
        raise UserError(f"eva: {str(error).splitlines()[0]}; larger batches or images give more tokens") from error
    shares = torch.cat([pca.explained_variance_ratio_ for pca in found.values()])
    kept = torch.zeros_like(shares)
    kept[shares.argsort(descending=True)[: rank * len(found)]] = 1
    return {
        key: pca.components_ * mine[:, None] for (key, pca), mine in zip(found.items(), kept.split(rows), strict=True)
    }


def _fit(found: Mapping[str, Any], key: str, x: Tensor) -> None:
    found[key].partial_fit(x)


def corda(backbone: Backbone, modules: Modules, batches: Iterable[Tensor], options: Mapping[str, Any]) -> Keyed:
    """PEFT's layers, started from the singular vectors of weight times covariance of the inputs.

    PEFT's own collection works for one sample of tokens only, so every batch is given to it as one.
    """
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    holder = nn.ModuleDict({key: stand_in(module, clone=True) for key, module in modules.items()})
    how: dict[str, Any] = {
        "init_lora_weights": "corda",
        "corda_config": CordaConfig(corda_method=options["corda_method"]),
    }

    def collect() -> None:
        with _watched(modules, lambda key, x: holder[key](x[None])):
            _feed(backbone, batches)

    preprocess_corda(holder, LoraConfig(r=options["r"], target_modules=list(modules), **how), collect)
    return wrap("corda", options, dict(holder.items()), **how)


def lora_ga(backbone: Backbone, modules: Modules, batches: Iterable[Tensor], options: Mapping[str, Any]) -> Keyed:
    """PEFT's layers, started from the singular vectors of a loss's gradient by the weights.

    The loss needs no labels: the mean square of the last block's features.
    """
    from peft import LoraGAConfig

    weights = [module.weight for module in modules.values()]
    total, count = [torch.zeros_like(weight) for weight in weights], 0
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for count, image in enumerate(batches, 1):  # noqa: B007 - how many there were
            with torch.enable_grad():
                loss = backbone(image, [backbone.spec.depth - 1]).grids[0].square().mean()
                for summed, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
                    summed += gradient
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    stand_ins = {key: stand_in(module, clone=True) for key, module in modules.items()}
    for module, gradient in zip(stand_ins.values(), total, strict=True):
        module._peft_loraga_grad = gradient / count
    how = {key: options[key] for key in ("direction", "scale", "stable_gamma")}
    return wrap("lora_ga", options, stand_ins, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**how))


class Start(nn.Module):
    """What a layer adds at its start, scale * B A x, to be taken off what it adds later.

    PEFT takes it off the frozen weight; kept apart, the weight stays what it was, for every adapter that shares it.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.down: Tensor
        self.up: Tensor
        self.scale: float = layer.scaling[NAME]
        self.register_buffer("down", layer.lora_A[NAME].weight.detach().clone())
        self.register_buffer("up", layer.lora_B[NAME].weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.scale
