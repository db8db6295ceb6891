"""Folding adapters into plain weights."""

import torch
from torch import Tensor, nn

from vfmadapt.contracts import Backbone, Place
from vfmadapt.errors import UserError


class Merging:
    """The plain weights of a backbone, changed in place; see `contracts.Merger`.

    Args:
        backbone: a copy of the frozen backbone, without adapters.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def place(self, role: str, index: int) -> Place:
        """The module of a role in the copy that is merged into."""
        return self._backbone.place(role, index)

    def add(self, role: str, index: int, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Add to a linear layer's weight (out, in) and bias (out,)."""
        place = self.place(role, index)
        rows = slice(*place.rows) if place.rows is not None else slice(None)
        if weight is not None:
            _parameter(place.module, "weight")[rows] += weight
        if bias is not None:
            for target, part in self._biases(place, role, index, bias):
                target += part

    def put(self, role: str, index: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replace a layer's weight and, where given, bias."""
        place = self.place(role, index)
        rows = slice(*place.rows) if place.rows is not None else slice(None)
        _parameter(place.module, "weight")[rows] = weight
        if bias is not None:
            for target, part in self._biases(place, role, index, bias):
                target.copy_(part)

    def weight(self, role: str, index: int) -> Tensor:
        """The weight of a layer, (out, in) where it is linear."""
        place = self.place(role, index)
        rows = slice(*place.rows) if place.rows is not None else slice(None)
        return _parameter(place.module, "weight")[rows]

    def bias(self, role: str, index: int) -> Tensor:
        """The bias (out,) that a layer itself adds: zeros where it has none."""
        place = self.place(role, index)
        found = getattr(_layer(place.module), "bias", None)
        whole = _parameter(place.module, "weight").new_zeros(_parameter(place.module, "weight").shape[0])
        whole = whole if found is None else found.data
        return whole[slice(*place.rows)] if place.rows is not None else whole

    def replace(self, name: str, tensor: Tensor) -> None:
        """Replace the tensor of a name in the backbone's state dict."""
        assert isinstance(self._backbone, nn.Module)
        self._backbone.get_parameter(name).copy_(tensor)

    def _biases(self, place: Place, role: str, index: int, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(tensor to change, its part of `bias`); UserError where a part that is not zero has no tensor to go to."""
        length = _parameter(place.module, "weight").shape[0]
        first, last = place.rows or (0, length)
        whole = bias.new_zeros(length)
        whole[first:last] = bias
        held = torch.zeros(length, dtype=torch.bool)
        found = []
        for target, rows in _bias_parts(self._backbone, place, role, index):
            inside = slice(max(rows.start, first), min(rows.stop, last))
            if inside.start >= inside.stop:
                continue
            found.append((target[inside.start - rows.start : inside.stop - rows.start], whole[inside]))
            held[inside] = True
        if whole[~held.to(whole.device)].any():
            raise UserError(
                f"{self._backbone.spec.name} has no bias at {role} of block {index}, and this adapter needs one there: "
                "merged, it would no longer be a plain checkpoint; keep the adapter file"
            )
        return found


def _parameter(module: nn.Module, name: str) -> Tensor:
    found = getattr(_layer(module), name)
    assert isinstance(found, Tensor)
    return found.data


def _layer(module: nn.Module) -> nn.Module:
    """The module that holds the weight: the last one inside, where a patch embedding wraps its convolution."""
    return [m for m in module.modules() if getattr(m, "weight", None) is not None][-1]


def _bias_parts(backbone: Backbone, place: Place, role: str, index: int) -> list[tuple[Tensor, slice]]:
    """The tensors that make up a module's bias and the rows that each covers (timm's Eva keeps q's and v's apart)."""
    length = _parameter(place.module, "weight").shape[0]
    if getattr(_layer(place.module), "bias", None) is not None:
        return [(_parameter(place.module, "bias"), slice(0, length))]
    attention = backbone.place("attn", index).module if role in ("q", "k", "v", "qkv") else None
    third = length // 3
    parts = []
    for number, name in ((0, "q_bias"), (2, "v_bias")):
        if getattr(attention, name, None) is not None and attention is not None:
            parts.append((_parameter(attention, name), slice(number * third, (number + 1) * third)))
    return parts
