"""What a tracker must beat: the prompt's masks copied to every frame, or carried along by optical flow."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.frames import Clip
from vfmadapt.frames.clip import Frame
from vfmadapt.tracking.prompts import Prompt
from vfmadapt.tracking.tracker import StepResult

# of OpenCV's calcOpticalFlowFarneback, as in its documentation's example
_FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}


def copy_masks(clip: Clip, prompts: Sequence[Prompt]) -> Iterator[tuple[int, StepResult]]:
    """Results of all frames: the masks of the prompts, whatever their frame."""
    given = _masks(prompts)
    for index in range(len(clip)):
        yield index, _result(given)


def flow_masks(clip: Clip, prompts: Sequence[Prompt]) -> Iterator[tuple[int, StepResult]]:
    """Results of all frames: the masks of the prompts, all for one frame, warped on from frame to frame, both ways.

    The motion is dense optical flow (Farnebäck 2003, OpenCV) between neighbouring frames, grey, in the clip's window.
    """
    import cv2

    window, start, given = clip.window(), prompts[0].frame, _masks(prompts)
    yield start, _result(given)
    for step in (1, -1):
        carried, before = given, _grey(clip.frame(start), window)
        for index, frame in clip.iterate(start + step, None, step):
            after = _grey(frame, window)
            flow = cv2.calcOpticalFlowFarneback(after, before, None, **_FARNEBACK)  # type: ignore[call-overload]
            carried = _warped(carried, flow)
            yield index, _result(carried)
            before = after


def _masks(prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """Masks (H, W, O) of 0 and 1, the structures in the order of their labels."""
    ordered = sorted(prompts, key=lambda prompt: prompt.object)
    return np.stack([np.asarray(prompt.mask, dtype=np.float32) for prompt in ordered], axis=2)


def _result(shares: NDArray[np.float32]) -> StepResult:
    logits = torch.from_numpy(shares).permute(2, 0, 1) - 0.5
    return StepResult(logits, (logits > 0).flatten(1).any(1).float())


def _warped(carried: NDArray[np.float32], flow: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fetch (H, W, O) from where the flow (H, W, 2) says that each pixel came from."""
    import cv2

    height, width = flow.shape[:2]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    moved = cv2.remap(carried, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR)
    return np.asarray(moved, dtype=np.float32).reshape(carried.shape)  # of one structure OpenCV drops the axis


def _grey(frame: Frame, window: tuple[float, float]) -> NDArray[np.uint8]:
    low, high = window
    values = (frame.mean(0) - low) * (255 / (high - low))
    return np.rint(values.clip(0, 255)).astype(np.uint8)
