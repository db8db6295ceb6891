"""What a tracker must beat: the prompt's masks copied to every frame, or carried along by optical flow."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vfmadapt.frames import Clip
from vfmadapt.frames.clip import Frame

Masks = NDArray[np.bool_]

# of OpenCV's calcOpticalFlowFarneback, as in its documentation's example
_FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}


def copy_masks(clip: Clip, start: int, masks: Masks) -> Iterator[tuple[int, Masks]]:
    """(frame, masks (O, H, W)) of all frames: those given for frame `start`, which this ignores."""
    for index in range(len(clip)):
        yield index, masks


def flow_masks(clip: Clip, start: int, masks: Masks) -> Iterator[tuple[int, Masks]]:
    """(frame, masks (O, H, W)) of all frames: those of frame `start` warped on from frame to frame, both ways.

    The motion is dense optical flow (Farnebäck 2003, OpenCV) between neighbouring frames, grey, in the clip's window.
    """
    import cv2

    window = clip.window()
    yield start, masks
    for step in (1, -1):
        carried, before = masks.transpose(1, 2, 0).astype(np.float32), _grey(clip.frame(start), window)
        for index, frame in clip.iterate(start + step, None, step):
            after = _grey(frame, window)
            flow = cv2.calcOpticalFlowFarneback(after, before, None, **_FARNEBACK)  # type: ignore[call-overload]
            carried = _warped(carried, flow)
            yield index, carried.transpose(2, 0, 1) > 0.5
            before = after


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
