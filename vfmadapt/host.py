"""The host: a frozen backbone with adapters hooked in."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vfmadapt.contracts import (
    Adapter,
    AfterBlock,
    Backbone,
    BackboneSpec,
    Features,
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
)
from vfmadapt.errors import UserError
from vfmadapt.merging import Merging

Key = tuple[str, int]
"""An adapter's name and the number of its site."""


@dataclass
class Pass:
    """State of one forward: nothing of it outlives the forward but the auxiliary losses."""

    grid: tuple[int, int]
    routes: Mapping[str, tuple[int, int]] | None = None  # by adapter: its samples, (first, last + 1) of `samples`
    samples: int = 0
    copies: int = 1  # of the image in the batch, from block `shared` on
    shared: int = 0
    contexts: dict[str, Any] = field(default_factory=dict)  # by adapter: what OnImage made
    residuals: dict[int, Tensor] = field(default_factory=dict)  # by block: the stream before its second norm
    prompts: dict[Key, Tensor] = field(default_factory=dict)  # by adapter and block: what became of its prompts
    windows: dict[Key, tuple[int, int]] = field(default_factory=dict)  # by site: the grid that its attention is given
    losses: list[Tensor] = field(default_factory=list)


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
        adapters: {name: adapter}; sites of one module act in this order.
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
        self.adapters = nn.ModuleDict()
        self.config = dict(config or {})
        self.active: tuple[str, ...] = ()
        self.current: Pass | None = None
        self._losses: list[Tensor] = []
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._sites: dict[str, list[Site]] = {}
        self._frozen: dict[str, nn.Parameter] = {}
        self._forwards: dict[nn.Module, list[tuple[Key, OnWeight | Instead, Place]]] = {}
        self._fired: set[Key] | None = None
        self.backbone.recompute_context = self._resume  # type: ignore[assignment]  # mypy takes module attributes for tensors
        for name, adapter in adapters.items():
            self._attach(name, adapter)
        self.use(*adapters)
        self.train(False)
        self._check(*adapters)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the auxiliary losses of the last forward, which hang on its graph."""
        return {**self.__dict__, "_losses": []}

    @property
    def spec(self) -> BackboneSpec:
        """The frozen backbone's spec."""
        return self.backbone.spec

    def forward(self, image: Tensor, layers: Sequence[int]) -> Features:
        """Normalised image (B, bands, H, W) -> adapted features of the blocks `layers`."""
        return self._forward(image, layers, Pass(self.backbone.grid_size(*image.shape[-2:])))

    def _forward(self, image: Tensor, layers: Sequence[int], state: Pass) -> Features:
        with _Running(self, state):
            for name in self.active:
                rows = state.routes.get(name, (0, 0)) if state.routes is not None and state.copies == 1 else None
                for site in self._sites[name]:
                    if isinstance(site, OnImage):
                        state.contexts[name] = site.fn(image if rows is None else image[slice(*rows)])
            features: Features = self.backbone(image, layers)
        self._losses = [*state.losses]  # a copy: blocks that are computed again add theirs again
        return features

    @torch.no_grad()
    def each(self, image: Tensor, layers: Sequence[int], groups: Sequence[Sequence[str]]) -> list[Features]:
        """Features of one batch of images under each group of adapters; what lies before their first site runs once.

        Args:
            image: normalised, (B, bands, H, W).
            layers: blocks whose features are wanted.
            groups: names of adapters that act together.

        Raises:
            UserError: adapters that cannot share a batch, by name (`check_batchable`).
        """
        self._use_together(groups)
        batch, copies = image.shape[0], len(groups)
        routes = {name: (k * batch, (k + 1) * batch) for k, group in enumerate(groups) for name in group}
        shared = min((first_block(self._sites[name]) for group in groups for name in group), default=0)
        state = Pass(self.backbone.grid_size(*image.shape[-2:]), routes, copies * batch, copies, shared)
        handle = self.backbone.blocks()[shared].register_forward_pre_hook(partial(_repeat, copies), prepend=True)
        try:
            features = self._forward(image, layers, state)
        finally:
            handle.remove()
        whole = replace(
            features,
            grids=tuple(_whole(grid, copies * batch) for grid in features.grids),
            prefix=tuple(_whole(prefix, copies * batch) for prefix in features.prefix),
        )
        return [whole.rows(k * batch, (k + 1) * batch) for k in range(copies)]

    @torch.no_grad()
    def routed(self, image: Tensor, layers: Sequence[int], groups: Sequence[Sequence[str]]) -> Features:
        """Features of a batch in which sample i goes through the adapters `groups[i]` (none: the bare backbone).

        Samples of one group must follow one another. Raises as `each` does.
        """
        self._use_together(groups)
        routes: dict[str, tuple[int, int]] = {}
        for sample, group in enumerate(groups):
            for name in group:
                first, last = routes.get(name, (sample, sample))
                if last != sample:
                    raise ValueError(f"samples of adapter {name} do not follow one another")
                routes[name] = first, sample + 1
        return self._forward(image, layers, Pass(self.backbone.grid_size(*image.shape[-2:]), routes, len(groups)))

    def _use_together(self, groups: Sequence[Sequence[str]]) -> None:
        names = tuple(dict.fromkeys(name for group in groups for name in group))
        for name in names:
            check_batchable(name, self._sites[name])
        if set(names) != set(self.active):
            self.use(*names)

    def train(self, mode: bool = True) -> "AdaptedBackbone":
        """Set the adapters' mode; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def add(self, name: str, adapter: Adapter) -> None:
        """Attach one more adapter, switched off; `use` switches it on."""
        before = self.active
        self._attach(name, adapter)
        self.use(name)
        adapter.eval()
        self._check(name)
        self.use(*before)

    def use(self, *names: str) -> None:
        """Switch to these adapters, in place: the others stay attached and do nothing.

        Raises:
            UserError: a name that is not attached.
        """
        if unknown := [n for n in names if n not in self.adapters]:
            raise UserError(f"no adapter {unknown[0]!r} is attached; there are: {', '.join(self.adapters) or 'none'}")
        for key, frozen in self._frozen.items():
            swap(self.backbone, key, frozen)
        self._frozen.clear()
        for sites, sign in ((self._active_sites(self.active), -1), (self._active_sites(names), 1)):
            if count := prompt_count(sites):
                self.backbone.widen_prefix(sign * count)
        self.active = names
        for site in self._active_sites(names):
            if isinstance(site, Owned):
                for key, parameter in site.tensors.items():
                    self._frozen.setdefault(key, swap(self.backbone, key, parameter))

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
        """Sum of the active adapters' auxiliary losses, those of the last forward included, or None."""
        own = [loss for a in self.active_adapters() if (loss := a.aux_loss()) is not None]
        losses = [*own, *self._losses]
        return torch.stack(losses).sum() if losses else None

    def after_step(self, step: int, total: int) -> None:
        """Tell every active adapter that optimiser step `step` of `total` is done."""
        for adapter in self.active_adapters():
            adapter.after_step(step, total)

    def initialise(self, batches: Iterable[Tensor]) -> None:
        """Give the adapters that start from data (`from_data`) normalised images (B, bands, H, W), all adapters off."""
        before, waiting = self.active, list(self.from_data())
        self.use()
        for adapter in waiting:
            adapter.initialise(batches)
        self.use(*before)

    def from_data(self) -> Iterator[Adapter]:
        """The active adapters with a data-driven start."""
        return (a for a in self.active_adapters() if type(a).initialise is not Adapter.initialise)

    def detach(self) -> Backbone:
        """Take the adapters off and give back the frozen backbone, bit for bit as it was."""
        self.use()
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        for module in self._forwards:
            del module.forward
        for adapter in self._each():
            adapter.release(self.backbone)
        self._handles.clear()
        self._forwards.clear()
        self.backbone.recompute_context = nullcontext
        return self.backbone

    def merge(self) -> nn.Module:
        """The active adapters folded into a copy of the library's own network: a plain checkpoint, no adapter left.

        Raises:
            UserError: an adapter that is not linear in the weights, and why.
        """
        for name, adapter in zip(self.active, self.active_adapters(), strict=True):
            if adapter.unmergeable:
                raise UserError(f"adapter {name} ({type(adapter).__name__}) cannot be merged: {adapter.unmergeable}")
        from copy import deepcopy

        other = deepcopy(self)
        adapters, frozen = list(other.active_adapters()), other.detach()
        with torch.no_grad():
            for adapter in adapters:
                adapter.merge(Merging(frozen))
        return frozen.exported()

    def active_adapters(self) -> Iterator[Adapter]:
        """The adapters in use, in order."""
        for name in self.active:
            adapter = self.adapters[name]
            assert isinstance(adapter, Adapter)
            yield adapter

    def replaced(self) -> dict[int, nn.Parameter]:
        """The frozen parameters that a trained copy stands in for at present, by id."""
        return {id(p): p for p in self._frozen.values()}

    def sites(self, name: str) -> Sequence[Site]:
        """The sites that an adapter declared."""
        return self._sites[name]

    def _each(self) -> Iterator[Adapter]:
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            yield adapter

    def _active_sites(self, names: Iterable[str]) -> list[Site]:
        return [site for name in names for site in self._sites[name]]

    # --- attaching -------------------------------------------------------------------------------------------------

    def _attach(self, name: str, adapter: Adapter) -> None:
        adapter.bind(self.backbone)
        self.adapters[name] = adapter
        self._handles[name], self._sites[name] = [], list(adapter.sites())
        captured: set[int] = set()
        for number, site in enumerate(self._sites[name]):
            key = (name, number)
            if isinstance(site, OnImage | Owned):
                continue
            if isinstance(site, ParallelMLP) and site.index not in captured:
                captured.add(site.index)
                norm = self.backbone.place("norm2", site.index).module
                hook = partial(self._capture, name, site.index)
                self._handles[name].append(norm.register_forward_pre_hook(hook))
            self._hook(key, site)

    def _hook(self, key: Key, site: Site) -> None:
        handles, blocks = self._handles[key[0]], self.backbone.blocks()
        if isinstance(site, AfterBlock):
            hook = partial(self._after_block, key, site)
            handles.append(blocks[site.index].register_forward_hook(hook))
        elif isinstance(site, ParallelMLP):
            handles.append(blocks[site.index].register_forward_hook(partial(self._parallel, key, site)))
        elif isinstance(site, Prompts):
            block = blocks[site.index]
            handles.append(block.register_forward_pre_hook(partial(self._insert, key, site)))
            handles.append(block.register_forward_hook(partial(self._take_out, key, site), prepend=True))
        elif isinstance(site, OnLinear | OnInput | OnOutput | OnWeight | Instead):
            place = self.backbone.place(site.role, site.index)
            if isinstance(site, OnLinear):
                if site.spatial and self.spec.windowed[site.index] and site.role not in ("fc1", "fc2"):
                    attention = self.backbone.place("attn", site.index).module
                    handles.append(attention.register_forward_pre_hook(partial(self._see_window, key)))
                handles.append(place.module.register_forward_hook(partial(self._add, key, site, place)))
            elif isinstance(site, OnOutput):
                handles.append(place.module.register_forward_hook(partial(self._output, key, site, place)))
            elif isinstance(site, OnInput):
                handles.append(place.module.register_forward_pre_hook(partial(self._input, key, site)))
            else:
                self._forwards.setdefault(place.module, []).append((key, site, place))
                place.module.forward = partial(self._forward_of, place.module)
        else:
            raise TypeError(f"adapter {key[0]}: unknown site {site!r}")

    # --- hooks: each returns None (nothing changes) while its adapter is switched off ---------------------------------

    def _on(self, key: Key) -> Pass | None:
        """The running forward if the adapter is active in it."""
        if key[0] not in self.active:
            return None
        if self.current is None:
            raise RuntimeError("call the AdaptedBackbone, not the backbone inside it (or detach() it first)")
        if self.current.routes is not None and key[0] not in self.current.routes:
            return None
        if self._fired is not None:
            self._fired.add(key)
        return self.current

    def _change(self, state: Pass, name: str, fn: Callable[..., Tensor], old: Tensor, *like: Tensor) -> Tensor:
        """fn(old, *like) on the rows of the batch that are the adapter's (all of them without routes)."""
        if state.routes is None:
            return fn(old, *like)
        first, last = (
            bound * old.shape[0] // state.samples for bound in state.routes[name]
        )  # windows: several rows each
        rows = fn(old[first:last], *(x[first:last] for x in like))
        return torch.cat([old[:first], rows, old[last:]])

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
            prefix, extra = self.spec.prefix_tokens, stream.shape[1] - tokens.shape[1]
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
        first = (
            site.prefix_fn(prefix)
            if site.prefix_fn is not None
            else delta.new_zeros(*prefix.shape[:2], delta.shape[-1])
        )
        return torch.cat([first, delta], dim=1)

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
        for key, site, _ in on:
            y = self._change(self.current, key[0], partial(_second, site.fn), y, x)
        return y

    def _weighted(self, module: Any, on: Iterable[tuple[Key, Any, Place]], x: Tensor) -> Tensor:
        weight: Tensor = module.weight
        for _, site, place in on:
            if place.rows is None:
                weight = site.fn(weight)
            else:
                first, last = place.rows
                weight = torch.cat([weight[:first], site.fn(weight[first:last]), weight[last:]])
        return F.linear(x, weight, module.bias)

    def _insert(self, key: Key, site: Prompts, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if (state := self._on(key)) is None:
            return None
        tokens, prefix = args[0], self.spec.prefix_tokens
        prompts = site.fn(state.prompts.get((key[0], site.index - 1)))
        prompts = prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return (torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], dim=1), *args[1:])

    def _take_out(self, key: Key, site: Prompts, _module: nn.Module, _args: Any, tokens: Tensor) -> Tensor | None:
        if (state := self._on(key)) is None:
            return None
        first = self.spec.prefix_tokens
        state.prompts[key[0], site.index] = tokens[:, first : first + site.count]
        return torch.cat([tokens[:, :first], tokens[:, first + site.count :]], dim=1)

    def _resume(self) -> AbstractContextManager[None]:
        """The context in which a checkpointed block is computed again, after the forward's own has ended."""
        return nullcontext() if self.current is None else _Running(self, self.current)

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check(self, *names: str) -> None:
        """One dry forward: every declared site must be called, and something must be trainable."""
        adapters = [a for a in (self.adapters[name] for name in names) if isinstance(a, Adapter)]
        trained = any(p.requires_grad for a in adapters for p in a.parameters())
        if not trained and not all(a.trains_nothing for a in adapters):
            raise UserError(f"adapter {', '.join(names)}: nothing is trainable; use adapter=frozen for the control")
        like, side = next(self.backbone.parameters()), 2 * max(self.spec.strides)
        if like.device.type == "meta":
            return
        image = torch.zeros(1, self.spec.bands, side, side + side // 2, device=like.device, dtype=like.dtype)
        self._fired = set()
        with torch.no_grad(), self._evaluating():
            self(image, [self.spec.depth - 1])
        fired, self._fired, self._losses = self._fired, None, []
        for name in names:
            declared = [i for i, s in enumerate(self._sites[name]) if not isinstance(s, OnImage | Owned)]
            if missed := [i for i in declared if (name, i) not in fired]:
                raise UserError(
                    f"adapter {name}: {len(missed)} of {len(declared)} sites are never called by {self.spec.name}, "
                    f"the first is {_describe(self._sites[name][missed[0]])}; this pair does not work together"
                )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was = self.training
        self.train(False)
        yield
        self.train(was)


def check_batchable(name: str, sites: Iterable[Site]) -> None:
    """Raises UserError unless the adapter leaves weights and sequence length alone, so that it can act on some rows."""
    for site in sites:
        if isinstance(site, Owned | OnWeight | Prompts):
            what = "changes the sequence's length" if isinstance(site, Prompts) else "changes the frozen weights"
            raise UserError(
                f"adapter {name} {what}, so it cannot share a batch with others: run it by itself with use()"
            )


def first_block(sites: Iterable[Site]) -> int:
    """The first block on which an adapter acts; what lies before is the frozen backbone's alone."""
    return min((getattr(site, "index", 0) for site in sites if not isinstance(site, OnImage)), default=0)


def _whole(tensor: Tensor, samples: int) -> Tensor:
    """Features from before the batch was repeated serve every copy."""
    return tensor.repeat(samples // tensor.shape[0], *(1,) * (tensor.ndim - 1))


def _repeat(copies: int, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].repeat(copies, *(1,) * (args[0].ndim - 1)), *args[1:])


def _second(fn: Callable[[Tensor], Tensor], _old: Tensor, x: Tensor) -> Tensor:
    return fn(x)


def prompt_count(sites: Iterable[Site]) -> int:
    """Prompt tokens that attention sees at once."""
    return max((site.count for site in sites if isinstance(site, Prompts)), default=0)


def _describe(site: Site) -> str:
    role, index = getattr(site, "role", ""), getattr(site, "index", "")
    return " ".join(filter(None, [type(site).__name__, role, f"at block {index}" if index != "" else ""]))


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
