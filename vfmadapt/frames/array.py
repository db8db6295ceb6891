"""Frames that are in memory already."""

import numpy as np
from numpy.typing import NDArray

from vfmadapt.frames.clip import Clip, ClipInfo


class ArrayClip(Clip):
    """A clip of frames (T, C, H, W) at hand, `window` being the values shown black and white."""

    def __init__(self, frames: NDArray[np.float32], *, name: str, window: tuple[float, float] = (0.0, 1.0)) -> None:
        count, channels, height, width = frames.shape
        self.frames = frames
        self.info = ClipInfo(name, "video", count, height, width, channels, window=window)

    def _read(self, index: int) -> NDArray[np.generic]:
        return self.frames[index]
