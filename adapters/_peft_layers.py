"""PEFT's layers around frozen modules that stay where they are.

PEFT puts its layers into a network in the place of the modules that they wrap. Here it gets a stand-in for each
module instead, and the layers that it made come back without it: the network is never touched.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from vfmadapt.adapters._peft_tuners import fitted, known
from vfmadapt.contracts import UserError

NAME = "default"
"""What PEFT calls the only adapter of its layers."""


def shadow(module: nn.Module) -> Any:
    """The same tensors in a module of its own, without what is hooked to `module`: what that computes by itself."""
    made = copy.copy(module)
    made.__dict__ |= {key: value for key, value in vars(nn.Module()).items() if "hooks" in key}
    made.__dict__.pop("forward", None)
    return made


def stand_in(module: nn.Module, *, clone: bool = False) -> Any:
    """A shadow with parameters of its own, over the same memory unless `clone`d; real memory for a meta module."""
    made = shadow(module)
    made._parameters = {key: _own(p, clone) for key, p in module._parameters.items()}
    return made


def _own(parameter: Tensor | None, clone: bool) -> nn.Parameter | None:
    if parameter is None:
        return None
    tensor = torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter.detach()
    return nn.Parameter(tensor.clone() if clone else tensor, requires_grad=False)


Keyed = Iterator[tuple[str, nn.Module]]
"""Layers one by one with their keys, so that what is in them for PEFT alone can go before the next is made."""


def wrap(name: str, options: Mapping[str, Any], modules: Mapping[str, nn.Module], **more: Any) -> Keyed:
    """PEFT's layers for modules by key ("INDEX/ROLE"); their base layers are `modules`, out of the module tree.

    Args:
        name: of the tuner.
        options: all of them, as set.
        modules: stand-ins, since PEFT writes into them.
        more: further settings of PEFT's config.

    Raises:
        UserError: what PEFT does not take.
    """
    groups = [modules] if known(name).shared else [{key: module} for key, module in modules.items()]
    for group in groups:
        yield from _wrap(name, options, group, more)


def _wrap(name: str, options: Mapping[str, Any], modules: Mapping[str, nn.Module], more: Mapping[str, Any]) -> Keyed:
    import peft

    tuner, holder = known(name), nn.ModuleDict(modules)
    key, module = next(iter(modules.items()))
    if isinstance(module, nn.Linear):
        options = fitted(name, options, module.in_features, module.out_features)
    if "feedforward_modules" in options:
        is_feedforward = key.partition("/")[2] in options["feedforward_modules"]
        options = {**options, "feedforward_modules": [key] if is_feedforward else []}
    try:
        with _undisturbed(), torch.device("cpu"):
            kind = getattr(peft, tuner.config)
            taken = {field.name for field in fields(kind)}  # other options are for our own starts
            settings = {k: v for k, v in {**options, **tuner.fixed, **more}.items() if k in taken}
            peft.get_peft_model(holder, kind(target_modules=list(modules), **settings))
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{name} at {key}: PEFT says {' '.join(str(error).split())}") from error
    for key, layer in holder.items():
        layer.__dict__["base_layer"] = layer._modules.pop("base_layer")
        yield key, layer


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither PEFT's advice, which is followed or does not apply, nor BOFT's CUDA extension.

    BOFT would compile it on first use where there is a GPU, and train another function where there is none.
    """
    from peft.tuners.boft import layer as boft

    before, boft._FBD_CUDA = boft._FBD_CUDA, False  # type: ignore[assignment]  # None: not tried yet
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        boft._FBD_CUDA = before
