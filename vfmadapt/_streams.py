"""Blocks that give each task features of its own, behind attention that all tasks share.

Inside such a block the batch is the shared rows, then those of each task; attention sees the shared rows alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vfmadapt.contracts import Streams

LINEARS = ("fc1", "fc2")
"""Where every stream has an input of its own."""


class Parting:
    """The hooks of one `Streams` site.

    Args:
        site: what to do.
        running: the forward that the adapter acts in, or None while it is off.
        backbone: the frozen backbone.
        name: of the adapter.
    """

    def __init__(self, site: Streams, running: Callable[[], Any], backbone: Any, name: str) -> None:
        self.site, self.running, self.backbone, self.name = site, running, backbone, name
        self.count = 1 + len(site.tasks)

    def attach(self) -> list[RemovableHandle]:
        """Hook the block, its attention and its linear layers."""
        index, place = self.site.index, self.backbone.place
        block, attention = self.backbone.blocks()[index], place("attn", index).module
        handles = [
            block.register_forward_pre_hook(self.enter),
            attention.register_forward_pre_hook(self.attend),
            place("proj", index).module.register_forward_hook(self.part),
            attention.register_forward_hook(self.spread),
        ]
        for role in LINEARS:
            module = place(role, index).module
            handles.append(module.register_forward_pre_hook(partial(self.share, role)))
            handles.append(module.register_forward_hook(partial(self.add, role)))
        return [*handles, block.register_forward_hook(self.leave, prepend=True)]

    def enter(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the block: every task begins with the shared tokens."""
        if self.running() is None:
            return None
        return (args[0].repeat(self.count, *(1,) * (args[0].ndim - 1)), *args[1:])

    def attend(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the attention: only the shared rows."""
        if self.running() is None:
            return None
        return (args[0][: len(args[0]) // self.count], *args[1:])

    def part(self, _module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        """After the attention's projection: what the shared stream adds, and by how much the tasks' differ from it."""
        if (state := self.running()) is None:
            return None
        added = self.site.fns["proj"](args[0].expand(self.count, *args[0].shape))
        state.parted[self.name, "proj", self.site.index] = added[1:] - added[0]
        return y + added[0]

    def spread(self, _module: nn.Module, _args: Any, y: Tensor) -> Tensor | None:
        """After the attention, which may have changed the shape since its projection: a row for every stream."""
        if (state := self.running()) is None:
            return None
        apart = state.parted.pop((self.name, "proj", self.site.index))
        return torch.cat([y, (y + apart.reshape(-1, *y.shape)).flatten(0, 1)])

    def share(self, role: str, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before a linear layer of the MLP: only the shared rows."""
        if (state := self.running()) is None:
            return None
        streams = args[0].unflatten(0, (self.count, -1))
        state.parted[self.name, role, self.site.index] = streams
        return (streams[0],)

    def add(self, role: str, _module: nn.Module, _args: Any, y: Tensor) -> Tensor | None:
        """After it: what the frozen layer gave, and what each stream adds."""
        if (state := self.running()) is None:
            return None
        streams = state.parted.pop((self.name, role, self.site.index))
        return (y + self.site.fns[role](streams)).flatten(0, 1)

    def leave(self, _module: nn.Module, _args: Any, tokens: Tensor) -> Tensor | None:
        """After the block: the tasks' tokens are kept as features, the shared ones go on."""
        if (state := self.running()) is None:
            return None
        shared, *others = tokens.unflatten(0, (self.count, -1)).unbind(0)
        spec, index = self.backbone.spec, self.site.index
        for task, own in zip(self.site.tasks, others, strict=True):
            if spec.final_norm and index == spec.depth - 1:
                own = self.backbone.place("norm", index).module(own)
            state.streams[task, index] = self.backbone.split(own, state.grid)[1].permute(0, 3, 1, 2)
        return shared
