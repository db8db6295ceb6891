"""What a user says about an object in one frame: points, a box or a mask."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vfmadapt.errors import UserError
from vfmadapt.tracking.model import Asked

_KEYS = ("frame", "object", "points", "labels", "box", "mask")


@dataclass(frozen=True)
class Prompt:
    """An object in a frame: points, a box, both, or a mask.

    Places are pixels, x before y, from (0, 0), the image's corner. `frame` counts from 0, `object` is the label of the
    structure, from 1. `points` ((x, y), ...) with `labels`: 1 on the object, 0 off it; all 1 by default. `box`: x0, y0,
    x1, y1. `mask`: bool (H, W).

    Raises:
        UserError: numbers that cannot be meant, an empty mask, nothing at all; places are checked by `check`.
    """

    frame: int
    object: int = 1
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.points and not self.labels:
            object.__setattr__(self, "labels", (1,) * len(self.points))
        if self.frame < 0 or self.object < 1:
            raise UserError(f"{self._name}: frames count from 0, objects from 1")
        if self.mask is not None and (self.points or self.box):
            raise UserError(f"{self._name}: a mask says it all; leave points and box out")
        if self.mask is None and not self.points and self.box is None:
            raise UserError(f"{self._name}: nothing is asked; give points, a box or a mask")
        if len(self.labels) != len(self.points) or set(self.labels) - {0, 1}:
            raise UserError(
                f"{self._name}: labels={list(self.labels)} for {len(self.points)} points; give one for each: 1 on the "
                "object, 0 off it"
            )
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise UserError(
                f"{self._name}: box={_shown(self.box)} is empty; write x0, y0, x1, y1 with x0 < x1, y0 < y1"
            )
        if self.mask is not None and (self.mask.ndim != 2 or not self.mask.any()):
            raise UserError(f"{self._name}: the mask is empty or not (H, W); give one with the object in it")

    def check(self, size: tuple[int, int], frames: int | None = None) -> None:
        """Raise UserError unless the prompt lies within frames of `size` (H, W), and in one of the `frames`."""
        height, width = size
        if frames is not None and self.frame >= frames:
            raise UserError(f"{self._name}: there are {frames} frames, counted from 0 to {frames - 1}")
        if self.mask is not None and self.mask.shape != size:
            raise UserError(
                f"{self._name}: the mask is {self.mask.shape[0]} x {self.mask.shape[1]}, frames are {height} x {width}"
            )
        corners = () if self.box is None else (self.box[:2], self.box[2:])
        for x, y in (*self.points, *corners):
            if not (math.isfinite(x) and math.isfinite(y) and 0 <= x <= width and 0 <= y <= height):
                raise UserError(
                    f"{self._name}: {_shown((x, y))} lies outside the frame; x is 0 to {width}, y 0 to {height}"
                )

    @property
    def _name(self) -> str:
        return f"prompt for object {self.object} in frame {self.frame}"

    @property
    def kind(self) -> tuple[bool, int]:
        """Prompts of one kind can be asked in one batch: (is it a mask, number of points with a box's corners)."""
        return self.mask is not None, len(self.points) + (0 if self.box is None else 2)


def read_prompt(settings: Mapping[str, Any]) -> Prompt:
    """A prompt from plain settings, as a config or a JSON file has them: `{frame: 3, box: [10, 20, 50, 60]}`.

    Raises:
        UserError: unknown keys, values of another kind, and as `Prompt` does.
    """
    if unknown := sorted(map(str, settings.keys() - set(_KEYS))):
        raise UserError(f"prompt: unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    if "frame" not in settings:
        raise UserError("prompt: the frame is missing; write frame=N, counted from 0")
    try:
        box = settings.get("box")
        mask = settings.get("mask")
        return Prompt(
            frame=int(settings["frame"]),
            object=int(settings.get("object", 1)),
            points=tuple((float(x), float(y)) for x, y in settings.get("points") or ()),
            labels=tuple(int(label) for label in settings.get("labels") or ()),
            box=None if box is None else _box(box),
            mask=None if mask is None else np.asarray(mask) > 0,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"prompt: {dict(settings)} cannot be read ({error}); write points: [[x, y], ...] or box: [x0, y0, x1, y1]"
        ) from error


def _box(values: Sequence[Any]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(v) for v in values)
    return x0, y0, x1, y1


def asked(prompts: Sequence[Prompt], size: tuple[int, int], side: int, device: torch.device) -> Asked:
    """Prompts of one kind in frames of `size` (H, W) -> the same in the model's frames of `side` x `side`."""
    if prompts[0].mask is not None:
        masks = torch.stack([torch.as_tensor(p.mask, dtype=torch.float32) for p in prompts]).to(device)
        return Asked(masks=squared(masks, side))
    scale = torch.tensor([side / size[1], side / size[0]])
    corners = [[] if p.box is None else [p.box[:2], p.box[2:]] for p in prompts]
    places = torch.tensor([[*c, *p.points] for c, p in zip(corners, prompts, strict=True)], dtype=torch.float32)
    labels = torch.tensor([[*((2, 3) if p.box is not None else ()), *p.labels] for p in prompts])
    return Asked(points=(places * scale).to(device), labels=labels.to(device))


def squared(masks: Tensor, side: int) -> Tensor:
    """Masks (N, H, W) of 0 and 1 -> (N, side, side) of 0 and 1; one too small for a pixel keeps its densest one."""
    if masks.shape[-2:] == (side, side):
        return masks
    share = F.interpolate(masks[:, None], size=(side, side), mode="bilinear", align_corners=False, antialias=True)[:, 0]
    limit = share.flatten(1).amax(1).clamp(max=0.5)
    return (share >= limit[:, None, None]).float()


def _shown(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values) + ")"
