"""The part of the frames that a tracker looks at: small structures fill a window around them, not a cell of a frame."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.errors import UserError
from vfmadapt.tracking.prompts import Prompt

_LEAST = 1 / 6  # of a frame's shorter side: breath moves the smallest structures by more than their own size


@dataclass(frozen=True)
class Region:
    """`height` x `width` pixels of a frame of `frame` (H, W), from row `top` and column `left` on."""

    frame: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def crop(self, prompt: Prompt) -> Prompt:
        """The prompt of a frame in places of the region.

        Raises:
            UserError: a part of it lies outside.
        """
        if self.size == self.frame:
            return prompt
        x0, y0, x1, y1 = extent([prompt])
        bottom, right = self.top + self.height, self.left + self.width
        if x0 < self.left or y0 < self.top or x1 > right or y1 > bottom:
            raise UserError(
                f"prompt for object {prompt.object} in frame {prompt.frame}: it lies outside the window that is "
                f"followed, x {self.left} to {right}, y {self.top} to {bottom}; give it before the first frame, or "
                "focus=null for whole frames"
            )
        box = prompt.box
        return replace(
            prompt,
            points=tuple((x - self.left, y - self.top) for x, y in prompt.points),
            box=None if box is None else (box[0] - self.left, box[1] - self.top, box[2] - self.left, box[3] - self.top),
            mask=None if prompt.mask is None else prompt.mask[self.window],
        )

    def paste(self, values: Tensor, outside: float) -> Tensor:
        """Values (O, height, width) in frames of `outside`, (O, H, W)."""
        below, right = self.frame[0] - self.top - self.height, self.frame[1] - self.left - self.width
        return F.pad(values, (self.left, right, self.top, below), value=outside)


def whole(frame: tuple[int, int]) -> Region:
    """All of a frame (H, W)."""
    return Region(frame, 0, 0, *frame)


def around(
    box: tuple[float, float, float, float],
    frame: tuple[int, int],
    focus: float,
    aside: tuple[float, float] = (0.0, 0.0),
) -> Region:
    """A square with a box (x0, y0, x1, y1) in its middle and `focus` times its longer side, moved into the frame.

    At least a sixth of the frame's shorter side; where the frame is smaller than the square, all of it. `aside`: shares
    of its side by which the square is off the middle, in x and y.
    """
    side = max(focus * max(box[2] - box[0], box[3] - box[1]), _LEAST * min(frame))
    (left, width), (top, height) = (
        _span((box[axis] + box[axis + 2]) / 2 + aside[axis] * side, side, frame[1 - axis]) for axis in (0, 1)
    )
    return Region(frame, top, left, height, width)


def _span(middle: float, side: float, whole: int) -> tuple[int, int]:
    """First pixel and number of pixels, within `whole`."""
    length = min(math.ceil(side), whole)
    return min(max(round(middle - length / 2), 0), whole - length), length


def focused(prompts: Sequence[Prompt], frame: tuple[int, int], focus: float | None) -> Region:
    """The region for objects with these prompts: around them all, see `around`.

    All of the frame without `focus`, and where an object is known by points alone, which tell no extent.

    Raises:
        UserError: a focus below 1.
    """
    check_focus(focus)
    known = {prompt.object for prompt in prompts if prompt.mask is not None or prompt.box is not None}
    if focus is None or not known or known < {prompt.object for prompt in prompts}:
        return whole(frame)
    return around(extent(prompts), frame, focus)


def check_focus(focus: float | None) -> None:
    """Raise UserError unless a window can be `focus` times as wide as what it is around."""
    if focus is not None and not 1 <= focus < math.inf:
        raise UserError(f"focus={focus}: a window is at least as wide as the prompts; give 1 or more, or null")


def extent(prompts: Sequence[Prompt]) -> tuple[float, float, float, float]:
    """The box (x0, y0, x1, y1) around all that prompts mark."""
    boxes = [box for prompt in prompts for box in _boxes(prompt)]
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def _boxes(prompt: Prompt) -> list[tuple[float, float, float, float]]:
    boxes = [(x, y, x, y) for x, y in prompt.points] + ([] if prompt.box is None else [prompt.box])
    if prompt.mask is not None:
        rows, columns = np.flatnonzero(prompt.mask.any(1)), np.flatnonzero(prompt.mask.any(0))
        boxes.append((float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)))
    return boxes
