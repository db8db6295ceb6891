"""An adapter, and the plain weights that it may fold itself into."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from vfmadapt.contracts.backbone import Backbone, Place
from vfmadapt.contracts.sites import Site
from vfmadapt.errors import UserError


class Merger(Protocol):
    """Plain weights that an adapter folds itself into."""

    def place(self, role: str, index: int) -> Place:
        """The module of a role in the copy that is merged into."""
        ...

    def weight(self, role: str, index: int) -> Tensor:
        """The weight of a layer at present, (out, in) where it is linear."""
        ...

    def bias(self, role: str, index: int) -> Tensor:
        """The bias (out,) that a layer itself adds: zeros where it has none."""
        ...

    def add(self, role: str, index: int, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Add to a linear layer's weight (out, in) and bias (out,); a bias is made where there was none."""
        ...

    def put(self, role: str, index: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replace a linear (or norm, or patch embedding) layer's weight and, where given, bias."""
        ...

    def replace(self, name: str, tensor: Tensor) -> None:
        """Replace the tensor of a name in the backbone's state dict."""
        ...


class Adapter(nn.Module):
    """A method: parameters and the sites at which they act; subclasses take `spec`, then keyword-only settings."""

    unmergeable: str = "it is not linear in the frozen weights"
    """Why `merge` is refused; "" where the method implements it."""

    hint: str = ""
    """A line for who trains it with labels, where another tool may be what is meant."""

    forwards_per_step: int = 1
    """Forwards of each batch in a training step: 1, or 2 where the method compares them (`consistency`)."""

    def sites(self) -> Sequence[Site]:
        """Where the method acts; called once, when it is attached."""
        return ()

    def bind(self, backbone: Backbone) -> None:
        """Copy what the method needs from the frozen weights (trained copies); called once, before `sites`."""

    def release(self, backbone: Backbone) -> None:
        """Undo what `bind` changed in the backbone, if anything; called when the adapter is taken off."""

    def initialise(self, batches: Iterable[Tensor]) -> None:
        """Data-driven start: normalised images (B, bands, H, W); called once before training where it is overridden.

        All adapters are off meanwhile, so that the backbone of `bind` can be called by itself.
        """

    def aux_loss(self) -> Tensor | None:
        """A loss on the adapter's own weights, or None; losses on activations come from `OnLinear(loss=True)`."""
        return None

    def consistency(self, first: Tensor, second: Tensor) -> Tensor:
        """Loss on the logits (B, K, H, W) of two forwards of one batch; asked for where `forwards_per_step` is 2."""
        raise NotImplementedError  # abstract

    def after_step(self, step: int, total: int) -> None:
        """Called after optimiser step `step` of `total`."""

    def queries(self) -> Tensor:
        """Tokens (n, C) for a head whose queries come from the adapter; raises UserError where there are none."""
        raise UserError(
            f"{type(self).__name__} has no queries for the head; use adapter=rein adapter.link_queries=true, or leave "
            "head.linked=false"
        )

    def training_state(self) -> Mapping[str, Tensor]:
        """What a resumed training needs beside the state dict (running averages): kept in checkpoints, in no file."""
        return {}

    def merge(self, into: Merger) -> None:
        """Fold the method into plain weights; only where `unmergeable` is ""."""
        raise NotImplementedError  # abstract

    @property
    def trains_nothing(self) -> bool:
        """True only for the control without an adapter, and for one whose weights are fixed codes by now."""
        return False
