"""The host: a frozen backbone with adapters hooked in."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vfmadapt._hooks import Hooks, Pass
from vfmadapt._shared_batch import of_each_copy, repeated, rows_of_copies, rows_of_samples
from vfmadapt._sites import check_batchable, check_called, check_patchwise, first_block
from vfmadapt._state import load_state, swap
from vfmadapt.contracts import (
    Adapter,
    Backbone,
    BackboneSpec,
    Blank,
    Features,
    Head,
    OnImage,
    Owned,
    PatchBackbone,
    Prompts,
    Site,
)
from vfmadapt.errors import UserError
from vfmadapt.merging import Merging


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
        self._hooks = Hooks(self.backbone)
        self._losses: list[Tensor] = []
        self._sites: dict[str, list[Site]] = {}
        self._frozen: dict[str, nn.Parameter] = {}
        self.backbone.recompute_context = self._hooks.resume  # type: ignore[assignment]  # mypy takes module attributes for tensors
        for name, adapter in adapters.items():
            self._attach(name, adapter)
        self.use(*adapters)
        self.train(False)
        self._check(*adapters)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the auxiliary losses of the last forward, which hang on its graph."""
        return {**self.__dict__, "_losses": []}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters in use, and of a head that acts in the blocks."""
        return self._hooks.active

    @property
    def spec(self) -> BackboneSpec:
        """The frozen backbone's spec."""
        return self.backbone.spec

    def forward(self, image: Tensor, layers: Sequence[int]) -> Features:
        """Normalised image (B, bands, H, W) -> adapted features of the blocks `layers`."""
        return self._forward(image, layers, Pass(self.backbone.grid_size(*image.shape[-2:])))

    def tokens(self, image: Tensor, *, keep: Tensor | None = None, blank: Blank | None = None) -> Tensor:
        """Adapted tokens (B, P + N, C) of patches of which some are hidden, see `PatchBackbone`.

        Raises:
            UserError: the backbone cannot hide patches, or an adapter acts on the whole image or grid.
        """
        if not isinstance(self.backbone, PatchBackbone):
            raise UserError(f"{self.spec.name} attends within windows, so patches cannot be hidden; take a plain ViT")
        for name in self.active:
            check_patchwise(name, self._sites[name])
        with self._hooks.running(Pass(self.backbone.grid_size(*image.shape[-2:]))):
            return self.backbone.tokens(image, keep=keep, blank=blank)

    def _forward(self, image: Tensor, layers: Sequence[int], state: Pass) -> Features:
        with self._hooks.running(state):
            for name in self.active:
                rows = state.routes.get(name, (0, 0)) if state.routes is not None and state.copies == 1 else None
                for site in self._sites[name]:
                    if isinstance(site, OnImage):
                        state.contexts[name] = site.fn(image if rows is None else image[slice(*rows)])
            features: Features = self.backbone(image, layers)
        self._losses = [*state.losses]  # a copy: blocks that are computed again add theirs again
        of_head = {index: tokens for (name, index), tokens in state.prompts.items() if name not in self.adapters}
        return replace(features, prompts=of_head, streams=state.streams, image=image)

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
        shared = min((first_block(self._sites[name]) for group in groups for name in group), default=0)
        routes = rows_of_copies(groups, batch)
        state = Pass(self.backbone.grid_size(*image.shape[-2:]), routes, copies * batch, copies)
        first = self.backbone.place("patch_embed", 0).module if shared < 0 else self.backbone.blocks()[shared]
        with repeated(first, copies):
            features = self._forward(image, layers, state)
        return of_each_copy(features, image, copies)

    @torch.no_grad()
    def routed(self, image: Tensor, layers: Sequence[int], groups: Sequence[Sequence[str]]) -> Features:
        """Features of a batch in which sample i goes through the adapters `groups[i]` (none: the bare backbone).

        Samples of one group must follow one another. Raises as `each` does.
        """
        self._use_together(groups)
        routes = rows_of_samples(groups)
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

    def serve(self, head: Head, *, name: str = "head", adapters: Sequence[str] | None = None) -> tuple[str, ...]:
        """Let a head act in the blocks, beside some adapters (by default those in use).

        Returns:
            What `use` takes for these adapters with the head: their names, and the head's where it has sites.

        Raises:
            UserError: a head of that name acts already.
        """
        names = self.active if adapters is None else tuple(adapters)
        sites = list(head.sites([*self._among(names)]))
        if not sites:
            return names
        if name in self._sites:
            raise UserError("a head acts in these blocks already: build a backbone of its own for another one")
        self._sites[name] = sites
        self._hooks.attach(name, sites)
        return (*names, name)

    def use(self, *names: str) -> None:
        """Switch to these adapters, in place: the others stay attached and do nothing.

        Raises:
            UserError: a name that is not attached.
        """
        if unknown := [n for n in names if n not in self._sites]:
            raise UserError(f"no adapter {unknown[0]!r} is attached; there are: {', '.join(self.adapters) or 'none'}")
        for key, frozen in self._frozen.items():
            swap(self.backbone, key, frozen)
        self._frozen.clear()
        for sites, sign in ((self._active_sites(self.active), -1), (self._active_sites(names), 1)):
            for site in sites:
                if isinstance(site, Prompts):
                    self.backbone.widen_prefix(site.index, sign * site.count)
        self._hooks.active = names
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

    def training_state(self) -> dict[str, Tensor]:
        """The adapters' own tensors that only a resumed training needs: `NAME.KEY`; `load_state` copies into them."""
        names = zip(self.adapters, self._each(), strict=True)
        return {f"{name}.{key}": tensor for name, a in names for key, tensor in a.training_state().items()}

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
        self._hooks.remove()
        for adapter in self._each():
            adapter.release(self.backbone)
        self.backbone.recompute_context = nullcontext
        return self.backbone

    def merge(self) -> nn.Module:
        """The active adapters folded into a copy of the library's own network: a plain checkpoint, no adapter left.

        Raises:
            UserError: an adapter that is not linear in the weights, and why.
        """
        named = [name for name in self.active if name in self.adapters]
        for name, adapter in zip(named, self.active_adapters(), strict=True):
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
        return self._among(self.active)

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

    def _among(self, names: Iterable[str]) -> Iterator[Adapter]:
        """The adapters of these names, without a head's."""
        for name in names:
            if name in self.adapters:
                adapter = self.adapters[name]
                assert isinstance(adapter, Adapter)
                yield adapter

    def _active_sites(self, names: Iterable[str]) -> list[Site]:
        return [site for name in names for site in self._sites[name]]

    def _attach(self, name: str, adapter: Adapter) -> None:
        adapter.bind(self.backbone)
        self.adapters[name] = adapter
        self._sites[name] = list(adapter.sites())
        self._hooks.attach(name, self._sites[name])

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
        self._hooks.fired = set()
        with torch.no_grad(), self._evaluating():
            self(image, [self.spec.depth - 1])
        fired, self._hooks.fired, self._losses = self._hooks.fired, None, []
        for name in names:
            check_called(name, self._sites[name], fired, self.spec.name)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was = self.training
        self.train(False)
        yield
        self.train(was)
