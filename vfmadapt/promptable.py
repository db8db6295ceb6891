"""A model that is asked about objects: an image once, then points, boxes or masks as often as one likes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vfmadapt.contracts import DataSpec, MaskPrompts, PromptedMasks, PromptHead
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.model import AdaptedModel

FINER = 4  # SAM's `coarse` masks have 4 x 4 values for each cell of the embedding


@dataclass(frozen=True)
class ObjectMasks:
    """What was found: M objects, T alternatives each.

    `masks`: bool (M, T, H, W); `scores` (M, T): the IoU that the model expects; `coarse` (M, T, h', w'): logits, to be
    given back as `masks=` once one alternative is chosen.
    """

    masks: Tensor
    scores: Tensor
    coarse: Tensor


class PromptableModel(AdaptedModel):
    """Image in sensor units and prompts -> a mask per object.

    Args:
        backbone: the frozen backbone with its adapters.
        head: answers the prompts.
        spec: bands, classes and the per-band mean and std of the data that the model is for.
    """

    def __init__(self, backbone: AdaptedBackbone, head: PromptHead, *, spec: DataSpec) -> None:
        super().__init__(backbone, head, spec=spec)
        self._image: tuple[Tensor, tuple[int, int]] | None = None

    @property
    def asked(self) -> PromptHead:
        """The head, which answers prompts."""
        assert isinstance(self.head, PromptHead)
        return self.head

    def encode(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in sensor units, `valid` bool (B, H, W) -> embeddings (B, C', h, w) for `answer`."""
        return self.asked.embed(self.features(image, valid))

    def answer(self, embedding: Tensor, prompts: MaskPrompts, size: tuple[int, int]) -> PromptedMasks:
        """One mask per object (T = 1) for images of `size` (H, W), from their embeddings.

        A single point may mean a thing, a part of it or what it belongs to: of the alternatives for these, the one with
        the highest score. Everything else means one thing.
        """
        several = is_ambiguous(prompts)
        answer = self.asked.decode(embedding, prompts, size, several=several)
        return answer.best() if several else answer

    @torch.no_grad()
    def set_image(self, image: Any, valid: Any = None) -> None:
        """Take an image (C, H, W) in sensor units, `valid` bool (H, W), that the next prompts are about."""
        device = self.mean.device
        batch = torch.as_tensor(image, dtype=torch.float32, device=device)[None]
        usable = None if valid is None else torch.as_tensor(valid, dtype=torch.bool, device=device)[None]
        self._image = self.encode(batch, usable), (batch.shape[-2], batch.shape[-1])

    @torch.no_grad()
    def predict(
        self, *, points: Any = None, labels: Any = None, boxes: Any = None, masks: Any = None, several: bool = False
    ) -> ObjectMasks:
        """Masks of the objects that the prompts single out in the image of `set_image`.

        Places are pixels, x before y, (0, 0) the centre of the first pixel. All that is given is about the same M
        objects; at least one of points, boxes and masks is.

        Args:
            points: (M, N, 2), or (N, 2) for one object.
            labels: (M, N) or (N,): 1 on the object, 0 off it; all 1 by default.
            boxes: (M, 4), or (4,) for one object: x0, y0, x1, y1.
            masks: (M, h', w'): `coarse` of an earlier answer, one alternative each.
            several: give the alternatives for prompts that mean several things; else one mask per object (T = 1).

        Raises:
            UserError: no image, or a prompt that is outside the image, empty, not finite or of another shape.
        """
        if self._image is None:
            raise UserError("there is no image to ask about: call set_image(image) first")
        embedding, size = self._image
        coarse = (FINER * embedding.shape[2], FINER * embedding.shape[3])
        prompts = read_prompts(points, labels, boxes, masks, size=size, coarse=coarse, device=embedding.device)
        if several:
            answer = self.asked.decode(embedding, prompts, size, several=True)
        else:
            answer = self.answer(embedding, prompts, size)
        return ObjectMasks(masks=answer.logits[0] > 0, scores=answer.scores[0], coarse=answer.coarse[0])


def is_ambiguous(prompts: MaskPrompts) -> bool:
    """Whether a single point is all that is known of each object."""
    alone = prompts.boxes is None and prompts.masks is None
    return alone and prompts.points is not None and prompts.points.shape[2] == 1


def read_prompts(
    points: Any,
    labels: Any,
    boxes: Any,
    masks: Any,
    *,
    size: tuple[int, int],
    coarse: tuple[int, int],
    device: torch.device,
) -> MaskPrompts:
    """Prompts as `PromptableModel.predict` takes them -> those of one image of `size` (H, W).

    `coarse`: (h', w') of masks. Raises UserError as `predict` does.
    """
    if points is None and boxes is None and masks is None:
        raise UserError("nothing is asked: give points=, boxes= or masks=")
    if labels is not None and points is None:
        raise UserError("labels= say what points mean: give points=, too")
    at = _read("points", points, (2,), 3, device)
    if at is not None:
        _check_inside("points", at, size)
    corners = _read("boxes", boxes, (4,), 2, device)
    if corners is not None:
        _check_inside("boxes", corners.unflatten(-1, (2, 2)), size)
        if bool((empty := (corners[:, 2:] <= corners[:, :2]).any(1)).any()):
            raise UserError(f"boxes: {_shown(corners[empty][0])} is empty; write x0, y0, x1, y1 with x0 < x1, y0 < y1")
    logits = _read("masks", masks, coarse, 3, device)
    asked = {name: t for name, t in (("points", at), ("boxes", corners), ("masks", logits)) if t is not None}
    if len({len(t) for t in asked.values()}) > 1 or not all(len(t) for t in asked.values()):
        counts = ", ".join(f"{name} of {len(t)}" for name, t in asked.items())
        raise UserError(f"prompts: {counts} objects; give all of the same objects, at least one")
    return MaskPrompts(
        points=None if at is None else at[None],
        labels=None if at is None else _read_labels(labels, at)[None],
        boxes=None if corners is None else corners[None],
        masks=None if logits is None else logits[None],
    )


def _read(name: str, values: Any, last: tuple[int, ...], axes: int, device: torch.device) -> Tensor | None:
    """Numbers of the shape (..., *last) with `axes` axes, the first of which may be left out."""
    if values is None:
        return None
    read = torch.as_tensor(values, dtype=torch.float32, device=device)
    given = tuple(read.shape)
    read = read[None] if read.ndim == axes - 1 else read
    if read.ndim != axes or tuple(read.shape[-len(last) :]) != last:
        wanted = ", ".join(["M", *(["N"] if axes - len(last) == 2 else []), *map(str, last)])
        raise UserError(f"{name}: the shape is {given}; give ({wanted})")
    if not bool(read.isfinite().all()):
        raise UserError(f"{name}: a value is NaN or infinite; give finite numbers")
    return read


def _check_inside(name: str, places: Tensor, size: tuple[int, int]) -> None:
    height, width = size
    limit = places.new_tensor([width, height])
    outside = ((places < 0) | (places > limit)).any(-1)
    if bool(outside.any()):
        raise UserError(
            f"{name}: {_shown(places[outside][0])} lies outside the image; x is 0 to {width}, y 0 to {height}"
        )


def _read_labels(labels: Any, points: Tensor) -> Tensor:
    if labels is None:
        return points.new_ones(points.shape[:2])
    read = torch.as_tensor(labels, dtype=torch.float32, device=points.device)
    given = tuple(read.shape)
    read = read[None] if read.ndim == 1 else read
    if read.shape != points.shape[:2]:
        raise UserError(f"labels: the shape is {given}; give one for each of the points, {tuple(points.shape[:2])}")
    if not bool(((read == 0) | (read == 1)).all()):
        wrong = read[(read != 0) & (read != 1)][0].item()
        raise UserError(f"labels: {wrong:g} is not known; give 1 for a point on the object, 0 for one off it")
    return read


def _shown(values: Tensor) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values.tolist()) + ")"
