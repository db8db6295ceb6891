"""A head that is asked about objects, its prompts and its answers."""

from dataclasses import dataclass

from torch import Tensor

from vfmadapt.contracts.backbone import Features
from vfmadapt.contracts.head import Head
from vfmadapt.errors import UserError


@dataclass(frozen=True)
class MaskPrompts:
    """What singles out M objects in each of B images; places in pixels, x before y, (0, 0) the first pixel's centre.

    `points` (B, M, N, 2) with `labels` (B, M, N): 1 on the object, 0 off it, -1 where there is no point. `boxes` (B, M,
    4): x0, y0, x1, y1. `masks` (B, M, h', w'): the `coarse` logits of an earlier answer, chosen from its alternatives.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None


@dataclass(frozen=True)
class PromptedMasks:
    """Answers to prompts: T alternatives for each of M objects in B images.

    `logits` (B, M, T, H, W), above 0 on the object; `scores` (B, M, T): the IoU that the model expects; `coarse` (B,
    M, T, h', w'): the logits at the resolution at which they can be a prompt again.
    """

    logits: Tensor
    scores: Tensor
    coarse: Tensor

    def best(self) -> "PromptedMasks":
        """Of each object the alternative with the highest score (T = 1)."""
        return self.take(self.scores.argmax(-1, keepdim=True))

    def take(self, index: Tensor) -> "PromptedMasks":
        """The alternatives `index` (B, M, 1) (T = 1)."""
        wide = index[..., None, None]
        return PromptedMasks(
            logits=self.logits.take_along_dim(wide, 2),
            scores=self.scores.take_along_dim(index, 2),
            coarse=self.coarse.take_along_dim(wide, 2),
        )


@dataclass(frozen=True)
class PointGrid:
    """How every object of an image is asked for: by a grid of points, and by which of the answers count.

    `points` per side of the image; `quality`: the least IoU that the model must expect of a mask; `stability`: the
    least IoU of a mask that is drawn a little wider with the same drawn a little tighter. By default as published for
    SAM. Raises UserError for other numbers.
    """

    points: int = 32
    quality: float = 0.88
    stability: float = 0.95

    def __post_init__(self) -> None:
        if self.points < 1 or not 0 <= self.quality <= 1 or not 0 <= self.stability <= 1:
            raise UserError(
                f"points={self.points} quality={self.quality:g} stability={self.stability:g}: points is at least 1, "
                "the others are from 0 to 1"
            )


class PromptHead(Head):
    """A head that is asked about objects: features once per image, then any number of prompts.

    `grid`: how all objects of an image are asked for.
    """

    grid = PointGrid()

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Refused: raises UserError, there are no classes to label pixels with."""
        raise UserError(
            "this head answers prompts and labels no pixels: train it with task=promptable and ask it with "
            "model.set_image(...) and model.predict(points=..., boxes=...), or map all objects with tools/predict.py; "
            "for label maps take another head"
        )

    def embed(self, features: Features) -> Tensor:
        """Features -> image embedding (B, C, h, w)."""
        raise NotImplementedError  # abstract

    def decode(self, embedding: Tensor, prompts: MaskPrompts, size: tuple[int, int], *, several: bool) -> PromptedMasks:
        """Masks of the objects that the prompts single out, for images of `size` (H, W).

        With `several` the alternatives for prompts that may mean several things, else one mask (T = 1).
        """
        raise NotImplementedError  # abstract
