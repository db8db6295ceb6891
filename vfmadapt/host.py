"""The host: a frozen backbone with adapters hooked in."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vfmadapt.contracts import Adapter, AfterBlock, Backbone, BackboneSpec, Features, GridFn, Owned
from vfmadapt.errors import UserError


@dataclass(frozen=True)
class Pass:
    """State of one forward: the token grid (h, w)."""

    grid: tuple[int, int]


class _Running(AbstractContextManager[None]):
    """While entered, the host is in the forward `state`; re-entrant, since checkpointing may compute a block twice."""

    def __init__(self, host: "AdaptedBackbone", state: Pass) -> None:
        self.host, self.state = host, state
        self.before: list[Pass | None] = []

    def __enter__(self) -> None:
        self.before.append(self.host.current)
        self.host.current = self.state

    def __exit__(self, *_: object) -> None:
        self.host.current = self.before.pop()


class AdaptedBackbone(nn.Module):
    """A frozen backbone with adapters attached at the sites that they declare.

    Sites are forward hooks, so no module of the backbone is replaced and its state-dict keys never change. The
    backbone is frozen and stays in evaluation mode. One object runs one forward at a time.

    Args:
        backbone: the frozen part; frozen here if it was not.
        adapters: {name: adapter}; sites of one block act in this order.
        config: how to build it again, for the adapter file.

    Raises:
        UserError: nothing to train (but for the control), or a site that the backbone never calls.
    """

    def __init__(
        self, backbone: Backbone, adapters: Mapping[str, Adapter], *, config: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone is a {type(backbone).__name__}, not an nn.Module")
        self.backbone: Any = backbone.requires_grad_(False)
        self.adapters = nn.ModuleDict(adapters)
        self.config = dict(config or {})
        self.current: Pass | None = None
        self._handles: list[RemovableHandle] = []
        self._frozen: dict[str, nn.Parameter] = {}
        self._declared: set[tuple[str, int]] = set()
        self._fired: set[tuple[str, int]] | None = None
        self.backbone.recompute_context = self._resume  # type: ignore[assignment]  # mypy takes module attributes for tensors
        for name, adapter in adapters.items():
            self._attach(name, adapter)
        self.train(False)
        self._check()

    @property
    def spec(self) -> BackboneSpec:
        """The frozen backbone's spec."""
        return self.backbone.spec

    def forward(self, image: Tensor, layers: Sequence[int]) -> Features:
        """Normalised image (B, bands, H, W) -> adapted features of the blocks `layers`."""
        with _Running(self, Pass(self.backbone.grid_size(*image.shape[-2:]))):
            return self.backbone(image, layers)

    def train(self, mode: bool = True) -> "AdaptedBackbone":
        """Set the adapters' mode; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser may change: the adapters' parameters that require a gradient."""
        return [p for p in self.adapters.parameters() if p.requires_grad]

    def adapter_state(self) -> dict[str, Tensor]:
        """What was trained and the buffers that belong to it: `adapters.NAME.KEY`."""
        return {f"adapters.{k}": v for k, v in self.adapters.state_dict().items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `adapter_state`; raises UserError unless keys and shapes are the same."""
        load_state(self.adapter_state(), state)

    def aux_loss(self) -> Tensor | None:
        """Sum of the adapters' auxiliary losses of the last forward, or None."""
        losses = [loss for a in self._each() if (loss := a.aux_loss()) is not None]
        return torch.stack(losses).sum() if losses else None

    def after_step(self, step: int, total: int) -> None:
        """Tell every adapter that optimiser step `step` of `total` is done."""
        for adapter in self._each():
            adapter.after_step(step, total)

    def detach(self) -> Backbone:
        """Take the adapters off and give back the frozen backbone, bit for bit as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.backbone.recompute_context = nullcontext  # type: ignore[assignment]
        for name, frozen in self._frozen.items():
            _swap(self.backbone, name, frozen)
        self._frozen.clear()
        return self.backbone

    def _each(self) -> Iterator[Adapter]:
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            yield adapter

    def _attach(self, name: str, adapter: Adapter) -> None:
        adapter.bind(self.backbone)
        blocks = self.backbone.blocks()
        for site in adapter.sites():
            if isinstance(site, AfterBlock):
                self._declared.add((name, site.index))
                hook = partial(self._after_block, (name, site.index), site.fn)
                self._handles.append(blocks[site.index].register_forward_hook(hook))
            elif isinstance(site, Owned):
                for key, parameter in site.tensors.items():
                    self._frozen[key] = _swap(self.backbone, key, parameter)
            else:
                raise TypeError(f"adapter {name}: unknown site {site!r}")

    def _after_block(self, key: tuple[str, int], fn: GridFn, _module: nn.Module, _args: Any, tokens: Tensor) -> Tensor:
        if self.current is None:
            raise RuntimeError("call the AdaptedBackbone, not the backbone inside it (or detach() it first)")
        if self._fired is not None:
            self._fired.add(key)
        prefix, grid = self.backbone.split(tokens, self.current.grid)
        return self.backbone.join(prefix, fn(grid))

    def _resume(self) -> AbstractContextManager[None]:
        """The context in which a checkpointed block is computed again, after the forward's own has ended."""
        assert self.current is not None
        return _Running(self, self.current)

    def _check(self) -> None:
        """One dry forward: every declared site must be called, and something must be trainable."""
        if not self.trainable_parameters() and not all(a.trains_nothing for a in self._each()):
            raise UserError(
                f"adapter {', '.join(self.adapters)}: nothing is trainable; use adapter=frozen for the control"
            )
        like, side = next(self.backbone.parameters()), 2 * max(self.spec.strides)
        image = torch.zeros(1, self.spec.bands, side, side + side // 2, device=like.device, dtype=like.dtype)
        self._fired = set()
        with torch.no_grad():
            self(image, [self.spec.depth - 1])
        missed, self._fired = sorted(self._declared - self._fired), None
        if missed:
            raise UserError(
                f"adapter {missed[0][0]}: {len(missed)} of {len(self._declared)} sites are never called by "
                f"{self.spec.name}, the first at block {missed[0][1]}; this pair does not work together"
            )


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


def _swap(module: nn.Module, name: str, new: nn.Parameter) -> nn.Parameter:
    """Put `new` in the place of the parameter `name` and return what was there."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    if old.shape != new.shape:
        raise ValueError(f"{name} has the shape {tuple(old.shape)}, its trained copy {tuple(new.shape)}")
    owner.register_parameter(leaf, new)
    return old
