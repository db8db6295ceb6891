"""The seam of an objective: what it cuts from an image, its loss, and what it does between steps."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from vfmadapt.host import AdaptedBackbone


class Objective(nn.Module):
    """A self-supervised loss with the parts that it trains beside the backbone; these are thrown away afterwards.

    Subclasses take the adapted backbone (not kept), then keyword-only settings.
    """

    window: int
    """Side in pixels of the squares that samples are cut from; smaller images give smaller squares."""

    smallest: int
    """Least side in pixels of an image: that of its largest crop."""

    least_batch: int = 1
    """Images that a step needs at least."""

    def sample(self, square: Tensor, draw: np.random.Generator, epoch: int) -> dict[str, Tensor]:
        """What a step needs of a normalised square (C, s, s); the same generator gives the same."""
        raise NotImplementedError  # abstract

    def forward(self, backbone: AdaptedBackbone, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Samples, stacked -> {"loss": what is minimised, name: a figure to be logged, without gradient, ...}."""
        raise NotImplementedError  # abstract

    def before_step(self) -> None:
        """Called when the gradients of a step are there."""

    def collapse(self, figures: Mapping[str, float]) -> str | None:
        """What the figures of a step say about a collapse, and what to do; None where all is well."""
        return None

    def after_step(self, backbone: AdaptedBackbone, step: int, total: int) -> None:
        """Called after optimiser step `step` of `total`."""
