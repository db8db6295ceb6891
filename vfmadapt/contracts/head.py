"""A head: from features to logits, and to the objects of an image where it tells them apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vfmadapt.contracts.adapter import Adapter
from vfmadapt.contracts.backbone import Features
from vfmadapt.contracts.sites import Site
from vfmadapt.errors import UserError


@dataclass(frozen=True)
class Instances:
    """The objects that were told apart in one image, surest first; they may overlap.

    `masks`: bool (n, H, W); `classes`: int64 (n,); `scores`: (n,), 0..1.
    """

    masks: Tensor
    classes: Tensor
    scores: Tensor


class Head(nn.Module):
    """Features -> logits. `layers` are the blocks whose grids it wants, in order.

    `regions`: it has learned to tell the connected regions of a class apart, so that `instances` are objects.
    """

    layers: tuple[int, ...]
    regions = False

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features -> logits (B, K, H, W) for `size` = (H, W) of the image."""
        raise NotImplementedError  # abstract

    def supervised(self, features: Features, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """All logits (B, K, H, W) that training compares with the labels: `forward`'s, then a head's coarser ones."""
        return (self(features, size),)

    def loss(self, features: Features, mask: Tensor, *, ignore_index: int) -> Mapping[str, Tensor] | None:
        """A loss of the head's own against labels (B, H, W), or None: the task's, on the logits of `supervised`.

        {"loss": what is minimised, name: a part of it before its weight, without gradient, ...}.
        """
        return None

    def instances(self, features: Features, size: tuple[int, int]) -> list[Instances]:
        """The objects of each image of `size` (H, W); raises UserError where the head does not tell them apart."""
        raise UserError(f"{type(self).__name__} labels pixels and tells no objects apart; train head=eomt for these")

    def sites(self, adapters: Sequence[Adapter]) -> Sequence[Site]:
        """Where the head acts in the blocks themselves; called once, when it joins a backbone with these adapters."""
        return ()

    def after_step(self, step: int, total: int) -> None:
        """Called after optimiser step `step` of `total`."""
