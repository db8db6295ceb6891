"""What tracking found in a clip, frame by frame, on disk rather than in memory."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.frames import ClipInfo


@dataclass(frozen=True)
class Tracked:
    """Masks of O structures in T frames.

    `labels` uint8 (T, H, W): 0 nothing, k + 1 structure k, in a file that vanishes with the array. `scores` float32
    and `present` bool, (T, O); `prompts`: the frame in which each structure was first prompted.
    """

    info: ClipInfo
    names: tuple[str, ...]
    prompts: tuple[int, ...]
    labels: NDArray[np.uint8]
    scores: NDArray[np.float32]
    present: NDArray[np.bool_]

    def mask(self, frame: int, structure: int) -> NDArray[np.bool_]:
        """Bool (H, W)."""
        return np.asarray(self.labels[frame] == structure + 1)
