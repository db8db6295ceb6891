"""Sites as hooks on the modules of a frozen backbone, and the state of the forward that they act in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vfmadapt._streams import Parting
from vfmadapt.contracts import (
    AfterBlock,
    Instead,
    OnImage,
    OnInput,
    OnLinear,
    OnOutput,
    OnWeight,
    Owned,
    ParallelMLP,
    Place,
    Prompts,
    Site,
    Streams,
)
from vfmadapt.errors import UserError
from vfmadapt.kernels.grouped_lora import grouped_lora

Key = tuple[str, int]
"""An adapter's name and the number of its site."""


@dataclass
class Pass:
    """State of one forward: nothing of it outlives the forward but the auxiliary losses."""

    grid: tuple[int, int]
    routes: Mapping[str, tuple[int, int]] | None = None  # by adapter: its samples, (first, last + 1) of `samples`
    samples: int = 0
    copies: int = 1  # of the image in the batch, from the first adapted block on
    contexts: dict[str, Any] = field(default_factory=dict)  # by adapter: what OnImage made
    residuals: dict[int, Tensor] = field(default_factory=dict)  # by block: the stream before its second norm
    prompts: dict[Key, Tensor] = field(default_factory=dict)  # by adapter and block: what became of its prompts
    windows: dict[Key, tuple[int, int]] = field(default_factory=dict)  # by site: the grid that its attention is given
    parted: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)  # by adapter, role and block: see Parting
    streams: dict[Key, Tensor] = field(default_factory=dict)  # by task and block: its grid (B, C, h, w)
    losses: list[Tensor] = field(default_factory=list)


class _Running(AbstractContextManager[None]):
    """While entered, the hooks act in the forward `state`; re-entrant, as checkpointing may compute a block twice."""

    def __init__(self, hooks: "Hooks", state: Pass) -> None:
        self.hooks, self.state = hooks, state
        self.before: list[Pass | None] = []

    def __enter__(self) -> None:
        self.before.append(self.hooks.current)
        self.hooks.current = self.state

    def __exit__(self, *_: object) -> None:
        self.hooks.current = self.before.pop()


class Hooks:
    """The sites of all adapters on one backbone. A hook changes nothing while its adapter is not active.

    Args:
        backbone: the frozen backbone, an nn.Module.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.active: tuple[str, ...] = ()
        self.current: Pass | None = None
        self.fired: set[Key] | None = None  # while a set, the sites that were called are put into it
        self._handles: list[RemovableHandle] = []
        self._forwards: dict[nn.Module, list[tuple[Key, OnWeight | Instead, Place]]] = {}

    def running(self, state: Pass) -> AbstractContextManager[None]:
        """The context of a forward."""
        return _Running(self, state)

    def resume(self) -> AbstractContextManager[None]:
        """The context in which a checkpointed block is computed again, after the forward's own has ended."""
        return nullcontext() if self.current is None else _Running(self, self.current)

    def attach(self, name: str, sites: Sequence[Site]) -> None:
        """Hook the sites of an adapter; `OnImage` and `Owned` are not hooks."""
        captured: set[int] = set()
        for number, site in enumerate(sites):
            if isinstance(site, OnImage | Owned):
                continue
            if isinstance(site, ParallelMLP) and site.index not in captured:
                captured.add(site.index)
                self._before(self.backbone.place("norm2", site.index).module, partial(self._capture, name, site.index))
            if isinstance(site, Streams):
                parting = Parting(site, partial(self._on, (name, number)), self.backbone, name)
                self._handles += parting.attach()
            elif isinstance(site, AfterBlock | ParallelMLP | Prompts):
                self._at_block((name, number), site)
            else:
                self._at_layer((name, number), site)

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        for module in self._forwards:
            del module.forward
        self._handles.clear()
        self._forwards.clear()

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook))

    def _after(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> None:
        self._handles.append(module.register_forward_hook(hook, prepend=first))

    def _at_block(self, key: Key, site: AfterBlock | ParallelMLP | Prompts) -> None:
        block = self.backbone.blocks()[site.index]
        if isinstance(site, AfterBlock):
            self._after(block, partial(self._after_block, key, site))
        elif isinstance(site, ParallelMLP):
            self._after(block, partial(self._parallel, key, site))
        else:
            insert = partial(self._insert, key, site)
            self._handles.append(block.register_forward_pre_hook(insert, with_kwargs=True))
            self._after(block, partial(self._take_out, key, site), first=True)

    def _at_layer(self, key: Key, site: OnLinear | OnInput | OnOutput | OnWeight | Instead) -> None:
        place = self.backbone.place(site.role, site.index)
        if isinstance(site, OnLinear):
            if site.spatial and self.backbone.spec.windowed[site.index] and site.role not in ("fc1", "fc2"):
                self._before(self.backbone.place("attn", site.index).module, partial(self._see_window, key))
            self._after(place.module, partial(self._add, key, site, place))
        elif isinstance(site, OnOutput):
            self._after(place.module, partial(self._output, key, site, place))
        elif isinstance(site, OnInput):
            self._before(place.module, partial(self._input, key, site))
        else:
            self._forwards.setdefault(place.module, []).append((key, site, place))
            place.module.forward = partial(self._forward_of, place.module)

    def _on(self, key: Key) -> Pass | None:
        """The running forward if the adapter is active in it."""
        if key[0] not in self.active:
            return None
        if self.current is None:
            raise RuntimeError("call the AdaptedBackbone, not the backbone inside it (or detach() it first)")
        if self.current.routes is not None and key[0] not in self.current.routes:
            return None
        if self.fired is not None:
            self.fired.add(key)
        return self.current

    def _change(self, state: Pass, name: str, fn: Callable[..., Tensor], old: Tensor, *like: Tensor) -> Tensor:
        """fn(old, *like) on the rows of the batch that are the adapter's (all of them without routes)."""
        if state.routes is None:
            return fn(old, *like)
        mine = self._rows(state, name, old)
        return torch.cat([old[: mine.start], fn(old[mine], *(x[mine] for x in like)), old[mine.stop :]])

    def _after_block(self, key: Key, site: AfterBlock, _module: nn.Module, _args: Any, tokens: Tensor) -> Tensor | None:
        if (state := self._on(key)) is None:
            return None
        extra = (state.contexts[key[0]],) if site.context else ()

        def act(tokens: Tensor) -> Tensor:
            prefix, grid = self.backbone.split(tokens, state.grid)
            return self.backbone.join(prefix, site.fn(grid, *extra))

        return self._change(state, key[0], act, tokens)

    def _capture(self, name: str, index: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if name in self.active and self.current is not None:
            self.current.residuals[index] = args[0]

    def _parallel(self, key: Key, site: ParallelMLP, _module: nn.Module, _args: Any, tokens: Tensor) -> Tensor | None:
        if (state := self._on(key)) is None:
            return None
        stream = state.residuals[site.index]
        if stream.ndim == 3 and tokens.ndim == 3 and stream.shape[1] > tokens.shape[1]:  # prompts are in it
            prefix, extra = self.backbone.spec.prefix_tokens, stream.shape[1] - tokens.shape[1]
            stream = torch.cat([stream[:, :prefix], stream[:, prefix + extra :]], dim=1)
        stream = stream.reshape(tokens.shape)
        return self._change(state, key[0], lambda old, h: old + site.fn(h), tokens, stream)

    def _add(self, key: Key, site: OnLinear, place: Place, _module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        if (state := self._on(key)) is None:
            return None
        return self._change(state, key[0], partial(self._plus, key, site, place, state), y, args[0])

    def _see_window(self, key: Key, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Windowed attention is given (B * windows, h, w, C), which it may flatten before its linear layers."""
        if key[0] in self.active and self.current is not None:
            self.current.windows[key] = args[0].shape[1], args[0].shape[2]

    def _plus(self, key: Key, site: OnLinear, place: Place, state: Pass, y: Tensor, x: Tensor) -> Tensor:
        flat = site.spatial and x.ndim == 3
        size = state.windows.get(key, state.grid)
        delta = self._spatial(site, x, size, state) if flat else self._delta(site, x, state)
        if place.rows is None:
            return y + delta
        return F.pad(delta, (place.rows[0], y.shape[-1] - place.rows[1])).add_(y)

    def _delta(self, site: OnLinear, x: Tensor, state: Pass) -> Tensor:
        if not site.loss:
            delta: Tensor = site.fn(x)
            return delta
        delta, loss = site.fn(x)
        if loss is not None:
            state.losses.append(loss)
        return delta

    def _spatial(self, site: OnLinear, x: Tensor, size: tuple[int, int], state: Pass) -> Tensor:
        """Tokens (B, N, C), the last h*w of them a grid."""
        cells = size[0] * size[1]
        prefix, grid = x[:, : x.shape[1] - cells], x[:, x.shape[1] - cells :].unflatten(1, size)
        delta = self._delta(site, grid, state).flatten(1, 2)
        if not prefix.shape[1]:
            return delta
        if site.prefix_fn is None:
            return F.pad(delta, (0, 0, prefix.shape[1], 0))
        return torch.cat([site.prefix_fn(prefix), delta], dim=1)

    def _output(self, key: Key, site: OnOutput, place: Place, _module: nn.Module, _args: Any, y: Any) -> Tensor | None:
        if (state := self._on(key)) is None:
            return None
        if place.rows is None:
            return self._change(state, key[0], site.fn, y)
        before, mine, after = y.split([place.rows[0], place.rows[1] - place.rows[0], y.shape[-1] - place.rows[1]], -1)
        return torch.cat([before, self._change(state, key[0], site.fn, mine), after], dim=-1)

    def _input(self, key: Key, site: OnInput, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if (state := self._on(key)) is None:
            return None
        return (self._change(state, key[0], site.fn, args[0]), *args[1:])

    def _forward_of(self, module: Any, x: Tensor) -> Tensor:
        """The forward of a module that has OnWeight or Instead sites."""
        on = [(key, site, place) for key, site, place in self._forwards[module] if self._on(key) is not None]
        if not on:
            return type(module).forward(module, x)
        if not any(isinstance(site, Instead) for _, site, _ in on):
            return self._weighted(module, on, x)
        assert self.current is not None
        if self.current.routes is None:
            if len(on) > 1:
                names, site = " and ".join(key[0] for key, *_ in on), on[0][1]
                raise UserError(f"{names} both stand in for {site.role} of block {site.index}: use one at a time")
            return on[0][1].fn(x)
        y = type(module).forward(module, x)
        pairs = [pair for _, site, _ in on if isinstance(site, Instead) and site.pair and (pair := site.pair())]
        if len(pairs) == len(on):
            return self._updated([key[0] for key, *_ in on], pairs, y, x)
        for key, site, _ in on:
            y = self._change(self.current, key[0], partial(_second, site.fn), y, x)
        return y

    def _updated(
        self, names: Sequence[str], pairs: Sequence[tuple[Tensor, Tensor, float]], y: Tensor, x: Tensor
    ) -> Tensor:
        """The low-rank updates of several adapters, each on its own rows of the batch, in one go."""
        assert self.current is not None
        group = torch.full((len(x),), -1)
        for number, name in enumerate(names):
            group[self._rows(self.current, name, x)] = number
        rank = max(len(a) for a, *_ in pairs)
        down = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a, *_ in pairs])
        up = torch.stack([F.pad(b, (0, rank - b.shape[1])) for _, b, _ in pairs])
        scale = down.new_tensor([s for *_, s in pairs])
        tokens, flat = x.flatten(1, -2).to(down.dtype), y.flatten(1, -2)
        return grouped_lora(flat, tokens, down, up, scale, group.to(x.device)).view_as(y)

    def _rows(self, state: Pass, name: str, x: Tensor) -> slice:
        """An adapter's rows of the batch; under windowed attention a sample has several."""
        assert state.routes is not None
        return slice(*(bound * len(x) // state.samples for bound in state.routes[name]))

    def _weighted(self, module: Any, on: Iterable[tuple[Key, Any, Place]], x: Tensor) -> Tensor:
        weight: Tensor = module.weight
        for _, site, place in on:
            if place.rows is None:
                weight = site.fn(weight)
            else:
                first, last = place.rows
                weight = torch.cat([weight[:first], site.fn(weight[first:last]), weight[last:]])
        return F.linear(x, weight, module.bias)

    def _insert(
        self, key: Key, site: Prompts, _module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if (state := self._on(key)) is None:
            return None
        tokens, prefix = args[0], self.backbone.spec.prefix_tokens
        prompts = site.fn(state.prompts.get((key[0], site.index - 1)))
        prompts = prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        longer = torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], dim=1)
        if site.sees is not None:
            cells = state.grid[0] * state.grid[1]
            grid = tokens[:, tokens.shape[1] - cells :].unflatten(1, state.grid)
            if (seen := site.sees(prompts, grid)) is not None:
                mask = seen.new_ones(len(tokens), 1, longer.shape[1], longer.shape[1])
                mask[:, 0, prefix : prefix + site.count, -cells:] = seen.flatten(2)
                settings = {**settings, "attn_mask": mask}
        return (longer, *args[1:]), settings

    def _take_out(self, key: Key, site: Prompts, _module: nn.Module, _args: Any, tokens: Tensor) -> Tensor | None:
        if (state := self._on(key)) is None:
            return None
        first = self.backbone.spec.prefix_tokens
        state.prompts[key[0], site.index] = tokens[:, first : first + site.count]
        return torch.cat([tokens[:, :first], tokens[:, first + site.count :]], dim=1)


def _second(fn: Callable[[Tensor], Tensor], _old: Tensor, x: Tensor) -> Tensor:
    return fn(x)
