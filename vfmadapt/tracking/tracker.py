"""Objects followed frame by frame, as the frames come."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip
from vfmadapt.tracking.memory import Limits
from vfmadapt.tracking.model import ABSENT, Encoded, TrackingModel
from vfmadapt.tracking.prompts import Prompt, asked
from vfmadapt.tracking.propagation import Answer, Propagation, Question
from vfmadapt.tracking.regions import Region, check_focus, focused

_TAILS = (0.005, 0.995)  # values beyond are shown black or white: implants and markers must not darken the rest
_LARGEST = 1 << 20  # values that the range is taken from; torch.quantile takes no more than 16 million
_CLAMP = 32.0  # of logits that are corrected, as in the sam2 package


@dataclass(frozen=True)
class StepResult:
    """O objects in one frame, in the order of `Tracker.objects`; on the CPU.

    `logits`: float32 (O, H, W), above 0 on the object; `scores` (O,): the IoU that the model expects, 0 where the
    object is not there.
    """

    logits: Tensor
    scores: Tensor

    @property
    def masks(self) -> Tensor:
        """Where the objects are, bool (O, H, W)."""
        return self.logits > 0

    @property
    def present(self) -> Tensor:
        """Which objects are in the frame, bool (O,)."""
        return self.masks.flatten(1).any(1)


@dataclass(frozen=True)
class _Seen:
    """The frame seen last: coarse logits (O, 4h, 4w) and scores (O,) of its objects."""

    index: int
    encoded: Encoded
    coarse: Tensor
    scores: Tensor
    reverse: bool


class Tracker:
    """Follows O objects through frames that come one by one; what it holds does not grow with their number.

    Args:
        model: SAM2's video model.
        size: (H, W) of the frames.
        objects: labels of the structures, in the order of results; those of later prompts follow them.
        window: values shown black and white; None: from the first frame, leaving out 0.5 % at either end.
        focus: look at a square so many times as wide as the prompts given before the first frame, see
            `regions.focused`; what is outside counts as absent. None: look at whole frames.
        frames, anchor, limits: see `Propagation`.

    Raises:
        UserError: no object, or one twice, a focus below 1.
    """

    def __init__(
        self,
        model: TrackingModel,
        size: tuple[int, int],
        objects: Sequence[int] = (1,),
        *,
        window: tuple[float, float] | None = None,
        focus: float | None = None,
        frames: int | None = None,
        anchor: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        if len(set(objects)) != len(objects) or not objects:
            raise UserError(f"objects={list(objects)}: give each label once, at least one")
        self.model, self.size, self.objects = model, size, tuple(objects)
        check_focus(focus)
        self.window, self.focus, self.frames = window, focus, frames
        self._region: Region | None = None  # memories are of its places, so it stays where it is
        self._propagation = Propagation(model, len(objects), frames=frames, anchor=anchor, limits=limits)
        self._waiting: dict[int, dict[int, Prompt]] = defaultdict(dict)  # by frame and object
        self._seen: _Seen | None = None

    def add(self, prompt: Prompt) -> StepResult | None:
        """Take a prompt for a frame to come, or correct the frame seen last: then the result is its new one.

        A later prompt for the same object and frame stands in for the earlier; in the frame seen last it refines the
        mask that was found. A new object joins the others, and has no memory before its first prompt.

        Raises:
            UserError: a place outside the frame, or outside the region once that is fixed, a frame that has passed.
        """
        prompt.check(self.size, self.frames)
        if self._region is not None:
            self._region.crop(prompt)
        seen = self._seen
        if seen is not None and (prompt.frame > seen.index if seen.reverse else prompt.frame < seen.index):
            raise UserError(f"prompt for frame {prompt.frame}: it has passed, the tracker is at {seen.index}")
        if prompt.object not in self.objects:
            seen = self._join(prompt.object)
        if seen is None or prompt.frame != seen.index:
            self._waiting[prompt.frame][prompt.object] = prompt
            return None
        return self._correct(seen, prompt)

    @torch.no_grad()
    def step(self, frame: Any, index: int | None = None, *, reverse: bool = False) -> StepResult:
        """All objects in the next frame; those without a prompt so far are absent.

        Args:
            frame: (C, H, W), C 1 or 3, in the units of `window`.
            index: its number; by default the one after the last.
            reverse: the frames come from the end.

        Raises:
            UserError: a frame of another size.
        """
        if index is None:
            index = 0 if self._seen is None else self._seen.index + (-1 if reverse else 1)
        encoded = self._encode(frame)
        answers = self._propagation.step(encoded, index, self._questions(index), reverse=reverse)
        self._waiting.pop(index, None)
        coarse, scores = self._collect(encoded, answers)
        self._seen = _Seen(index, encoded, coarse, scores, reverse)
        return self._result(self._seen)

    @torch.no_grad()
    def prepare(self, frame: Any, index: int) -> None:
        """Remember the prompts of a frame ahead of time, so that the frames before it can make use of them."""
        self._propagation.ask(self._encode(frame), index, self._questions(index))

    def _join(self, label: int) -> _Seen | None:
        """Follow one more object, absent so far; the frame seen last, with it."""
        self.objects = (*self.objects, label)
        self._propagation.add_object()
        if self._seen is not None:
            coarse, scores = self._seen.coarse, self._seen.scores
            absent = coarse.new_full((1, *coarse.shape[1:]), ABSENT)
            self._seen = replace(
                self._seen, coarse=torch.cat([coarse, absent]), scores=torch.cat([scores, scores.new_zeros(1)])
            )
        return self._seen

    @torch.no_grad()
    def _correct(self, seen: _Seen, prompt: Prompt) -> StepResult:
        at = self.objects.index(prompt.object)
        question = self._question([prompt])
        if question.asked.masks is None and self._propagation.knows(at, seen.index):
            before = seen.coarse[at : at + 1].clamp(-_CLAMP, _CLAMP)
            question = replace(question, asked=replace(question.asked, before=before))
        answer = self._propagation.correct(seen.encoded, seen.index, question, reverse=seen.reverse)
        coarse, scores = seen.coarse.clone(), seen.scores.clone()
        coarse[at], scores[at] = answer.decoded.masks[0].float(), answer.decoded.iou[0].float()
        self._seen = replace(seen, coarse=coarse, scores=scores)
        return self._result(self._seen)

    def _encode(self, frame: Any) -> Encoded:
        values = torch.as_tensor(frame, dtype=torch.float32)
        if values.ndim != 3 or values.shape[0] not in (1, 3) or tuple(values.shape[1:]) != self.size:
            raise UserError(
                f"this tracker takes frames of 1 or 3 channels and {self.size[0]} x {self.size[1]} pixels, got "
                f"{tuple(values.shape)}; all frames of a clip must be of one size"
            )
        if self.window is None:
            self.window = spread(values)
        if self._region is None:
            prompts = [prompt for waiting in self._waiting.values() for prompt in waiting.values()]
            self._region = focused(prompts, self.size, self.focus)
        shown = values[None][..., *self._region.window]
        return self.model.encode(pictures(shown, self.window, self.model.size).to(self.model.mean.device))

    def _questions(self, index: int) -> list[Question]:
        """The prompts that wait for a frame, those of one kind together."""
        waiting = sorted(self._waiting.get(index, {}).values(), key=lambda prompt: prompt.kind)
        return [self._question(list(group)) for _, group in groupby(waiting, key=lambda prompt: prompt.kind)]

    def _question(self, prompts: Sequence[Prompt]) -> Question:
        assert self._region is not None  # of the frame that is asked about
        objects = [self.objects.index(prompt.object) for prompt in prompts]
        cropped = [self._region.crop(prompt) for prompt in prompts]
        return Question(objects, asked(cropped, self._region.size, self.model.size, self.model.mean.device))

    def _collect(self, encoded: Encoded, answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
        """Coarse logits (O, 4h, 4w) and scores (O,) of all objects."""
        height, width = encoded.fine.shape[-2:]
        coarse = encoded.fine.new_full((len(self.objects), height, width), ABSENT, dtype=torch.float32)
        scores = coarse.new_zeros(len(self.objects))
        for answer in answers:
            at = list(answer.objects)
            coarse[at], scores[at] = answer.decoded.masks.float(), answer.decoded.iou.float()
        return coarse, scores

    def _result(self, seen: _Seen) -> StepResult:
        assert self._region is not None  # of the frame seen
        coarse = seen.coarse[None].float()
        near = F.interpolate(coarse, size=self._region.size, mode="bilinear", align_corners=False)[0].cpu()
        logits = self._region.paste(near, ABSENT)
        there = (logits > 0).flatten(1).any(1)
        return StepResult(logits, seen.scores.float().cpu() * there)


def spread(values: Tensor) -> tuple[float, float]:
    """The values to be shown black and white: all but 0.5 % at either end; what is not finite does not count."""
    known = values[values.isfinite()]
    if not len(known):
        return 0.0, 1.0
    every = -(-len(known) // _LARGEST)
    low, high = torch.quantile(known[::every], torch.tensor(_TAILS)).tolist()
    return low, max(high, low + 1e-6)


def pictures(frames: Tensor, window: tuple[float, float], side: int) -> Tensor:
    """Frames (B, 1 or 3, H, W) in any units -> (B, 3, side, side) from 0 to 1; what is not finite is black."""
    low, high = window
    shown = ((frames - low) / (high - low)).nan_to_num(0.0).clamp(0, 1)
    if shown.shape[-2:] != (side, side):
        shown = F.interpolate(shown, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return shown.expand(-1, 3, -1, -1)


def track(
    model: TrackingModel,
    clip: Clip,
    prompts: Sequence[Prompt],
    *,
    focus: float | None = None,
    limits: Limits | None = None,
) -> Iterator[tuple[int, StepResult]]:
    """Follow the objects of `prompts` through a clip, from their first frame to the end, then back to the beginning.

    Objects are in order of their labels. Prompts of later frames count in the frames before them, too. `focus`,
    `limits`: see `Tracker`.

    Yields:
        (index of the frame, its result), one frame at a time.

    Raises:
        UserError: no prompt, or one outside the clip, a focus below 1.
    """
    if not prompts:
        raise UserError(f"{clip.info.path}: nothing to follow; give a prompt for one frame")
    start = min(prompt.frame for prompt in prompts)
    tracker = Tracker(
        model,
        clip.info.size,
        sorted({prompt.object for prompt in prompts}),
        window=clip.window(),
        focus=focus,
        frames=clip.info.frames,
        anchor=start,
        limits=limits,
    )
    for prompt in prompts:
        tracker.add(prompt)
    for index in sorted({prompt.frame for prompt in prompts} - {start}):
        tracker.prepare(clip.frame(index), index)
    for index, frame in clip.iterate(start):
        yield index, tracker.step(frame, index)
    for index, frame in clip.iterate(start - 1, None, -1):
        yield index, tracker.step(frame, index, reverse=True)
