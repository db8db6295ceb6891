"""Tensors by name: copied in, swapped in."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vfmadapt.errors import UserError


def load_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the tensors `own`; raises UserError unless keys and shapes are the same."""
    if wrong := sorted(own.keys() ^ state.keys()):
        raise UserError(
            f"the adapter file does not fit: {len(own.keys() - state.keys())} tensors missing, "
            f"{len(state.keys() - own.keys())} unknown, first {wrong[0]}"
        )
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise UserError(
                f"the adapter file does not fit: {key} is {tuple(state[key].shape)}, needed {tuple(tensor.shape)}"
            )
        with torch.no_grad():
            tensor.copy_(state[key])


def swap(module: nn.Module, name: str, new: nn.Parameter) -> nn.Parameter:
    """Put `new` in the place of the parameter `name` and return what was there."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    if old.shape != new.shape:
        raise ValueError(f"{name} has the shape {tuple(old.shape)}, its trained copy {tuple(new.shape)}")
    owner.register_parameter(leaf, new)
    return old
