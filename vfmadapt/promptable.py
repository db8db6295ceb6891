"""A model that is asked about objects: an image once, then points, boxes or masks as often as one likes."""

import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np
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
        """Take an image (C, H, W) in sensor units, `valid` bool (H, W), that the next prompts are about.

        Raises:
            UserError: no real numbers, another shape, or no pixel that is valid and finite.
        """
        read, bands = _numbers("image", image, self.mean.device), self.spec.bands
        if read.ndim != 3 or len(read) != len(bands) or 0 in read.shape:
            wanted = f"({len(bands)}, H, W) with the bands {', '.join(bands)}, of at least one pixel"
            raise UserError(f"image: the shape is {tuple(read.shape)}; give {wanted}")
        size = (read.shape[1], read.shape[2])
        usable = None if valid is None else _numbers("valid", valid, read.device) != 0
        if usable is not None and tuple(usable.shape) != size:
            raise UserError(f"valid: the shape is {tuple(usable.shape)}; give one value per pixel of the image, {size}")
        if not bool((read.isfinite() if usable is None else read.isfinite() & usable).any()):
            raise UserError("image: no pixel is both valid and finite; give an image that shows something")
        self._image = self.encode(read[None], None if usable is None else usable[None]), size

    @torch.no_grad()
    def predict(
        self, *, points: Any = None, labels: Any = None, boxes: Any = None, masks: Any = None, several: bool = False
    ) -> ObjectMasks:
        """Masks of the objects that the prompts single out in the image of `set_image`.

        Places are pixels, x before y, (0, 0) the centre of the first pixel. All that is given is about the same M
        objects; at least one of points, boxes and masks is.

        Args:
            points: (M, N, 2), or (N, 2) for one object; x from -0.5 to below W - 0.5, y to below H - 0.5.
            labels: (M, N) or (N,): 1 on the object, 0 off it; all 1 by default.
            boxes: (M, 4), or (4,) for one object: x0, y0, x1, y1; begins where points may lie, ends at W, H at most.
            masks: (M, h', w'): `coarse` of an earlier answer, one alternative each.
            several: give the alternatives for prompts that mean several things; else one mask per object (T = 1).

        Raises:
            UserError: no image, or a prompt that is outside the image, empty, not of finite real numbers or of another
                shape.
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
        _check_points(at, size)
    corners = _read("boxes", boxes, (4,), 2, device)
    if corners is not None:
        _check_boxes(corners, size)
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
    read = _numbers(name, values, device)
    given = tuple(read.shape)
    read = read[None] if read.ndim == axes - 1 else read
    if read.ndim != axes or tuple(read.shape[-len(last) :]) != last:
        wanted = ", ".join(["M", *(["N"] if axes - len(last) == 2 else []), *map(str, last)])
        raise UserError(f"{name}: the shape is {given}; give ({wanted})")
    if 0 in read.shape[1:]:
        raise UserError(f"{name}: the shape is {given}; give at least one for each object")
    if not bool(read.isfinite().all()):
        raise UserError(f"{name}: a value is NaN or infinite; give finite numbers")
    return read


def _numbers(name: str, values: Any, device: torch.device) -> Tensor:
    """Real numbers, in whatever holds them, as float32; UserError where it holds anything else."""
    real: Tensor | None = None
    if isinstance(values, Tensor):
        real = None if values.is_complex() else values
    else:
        try:
            array = np.asarray(values)
        except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors on another device
            array = np.asarray(None)
        if array.dtype.kind in "biuf":
            with np.errstate(over="ignore"):  # infinite, which is refused
                real = torch.from_numpy(array.astype(np.float32, order="C"))
    if real is None:
        given = " ".join(reprlib.repr(values).split())
        raise UserError(
            f"{name}: {given} given; give real numbers of at most 64 bits, as lists of equal lengths, an array or a "
            "tensor"
        )
    return real.to(device, torch.float32)


def _outside(places: Tensor, size: tuple[int, int]) -> Tensor:
    """Which of (..., 2) lie on no pixel of an image of `size` (H, W): bool (...)."""
    edge = places.new_tensor([size[1], size[0]]) - 0.5
    return ((places < -0.5) | (places >= edge)).any(-1)


def _check_points(places: Tensor, size: tuple[int, int]) -> None:
    if bool((outside := _outside(places, size)).any()):
        raise UserError(
            f"points: {_shown(places[outside][0])} lies outside the image; x is -0.5 to below {size[1] - 0.5}, "
            f"y -0.5 to below {size[0] - 0.5}"
        )


def _check_boxes(corners: Tensor, size: tuple[int, int]) -> None:
    height, width = size
    beyond = (corners[:, 2:] > corners.new_tensor([width, height])).any(-1)
    if bool((outside := _outside(corners[:, :2], size) | beyond).any()):
        raise UserError(
            f"boxes: {_shown(corners[outside][0])} lies outside the image; x0 is -0.5 to below {width - 0.5}, "
            f"y0 -0.5 to below {height - 0.5}, x1 at most {width}, y1 at most {height}"
        )


def _read_labels(labels: Any, points: Tensor) -> Tensor:
    if labels is None:
        return points.new_ones(points.shape[:2])
    read = _numbers("labels", labels, points.device)
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
