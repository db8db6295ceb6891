"""What tracking found in a clip, frame by frame, on disk rather than in memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.frames import ClipInfo
from vfmadapt.frames.frame_file import FrameFile, LabelFrames
from vfmadapt.tracking.prompts import Prompt
from vfmadapt.tracking.tracker import StepResult

_MOST = 255  # labels of a map of 8 bits


@dataclass(frozen=True)
class Tracked:
    """Masks of O structures in T frames.

    `objects` are the structures' labels, in order; `prompts`: the frame in which each was first prompted. `labels`
    uint8 (T, H, W), 0 where there is nothing, read from disk one frame at a time. `scores` float32 and `present` bool,
    (T, O).
    """

    info: ClipInfo
    objects: tuple[int, ...]
    names: tuple[str, ...]
    prompts: tuple[int, ...]
    labels: LabelFrames
    scores: NDArray[np.float32]
    present: NDArray[np.bool_]

    def mask(self, frame: int, structure: int) -> NDArray[np.bool_]:
        """Where structure 0 ... O - 1 is, bool (H, W)."""
        return np.asarray(self.labels[frame] == self.objects[structure])


def collect(
    info: ClipInfo,
    prompts: Sequence[Prompt],
    steps: Iterable[tuple[int, StepResult]],
    names: Mapping[int, str] | None = None,
) -> Tracked:
    """Take the results of frames in any order; a pixel of several structures goes to the greatest logit.

    In frames without a result, such as those that a damaged file does not give, nothing is present.

    Args:
        info: of the clip.
        prompts: what was asked.
        steps: (frame, its result), the structures in the order of their labels.
        names: of the labels; the label itself where there is none.

    Raises:
        UserError: a label above 255.
    """
    objects = sorted({prompt.object for prompt in prompts})
    if objects[-1] > _MOST:
        raise UserError(f"prompt for object {objects[-1]}: labels are whole numbers from 1 to {_MOST}")
    shape = (info.frames, len(objects))
    labels = FrameFile.zeros((info.frames, *info.size), np.uint8)
    scores, present = np.zeros(shape, np.float32), np.zeros(shape, bool)
    of = np.array(objects, dtype=np.uint8)
    for index, result in steps:
        logits = result.logits.numpy()
        labels[index] = np.where((logits > 0).any(0), of[logits.argmax(0)], 0)
        scores[index], present[index] = result.scores.numpy(), result.present.numpy()
    return Tracked(
        info=info,
        objects=tuple(objects),
        names=tuple((names or {}).get(label, str(label)) for label in objects),
        prompts=tuple(min(p.frame for p in prompts if p.object == label) for label in objects),
        labels=labels,
        scores=scores,
        present=present,
    )
