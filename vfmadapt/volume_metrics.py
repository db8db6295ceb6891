"""Metrics of volumes whose slices are labelled one by one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfmadapt.errors import UserError
from vfmadapt.metrics import SegmentationMetrics, mean_of_known
from vfmadapt.surfaces import surface_distances

Spacing = Sequence[float | None]


class VolumeMetrics(SegmentationMetrics):
    """Adds, per structure, the mean over volumes of Dice and of the 95th percentile Hausdorff distance.

    Dice of a structure in a volume is 2 |P ∩ T| / (|P| + |T|) over all its slices, undefined where neither holds it;
    HD95 is that of the surfaces in space, by MONAI, undefined where one of them is empty or millimetres are unknown.
    Frames of a video, and single images, are measured in their plane and averaged. Label 0, the background, is left
    out.
    """

    def reset(self) -> None:
        """Forget everything that was counted."""
        super().reset()
        self._clip: tuple[str, Spacing | None] | None = None
        self._frames: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        self._dice: dict[str, list[float]] = {name: [] for name in self.classes[1:]}
        self._hd95: dict[str, list[float]] = {name: [] for name in self.classes[1:]}

    def add_frame(self, found: Tensor, mask: Tensor, *, clip: str, spacing: Spacing | None) -> None:
        """Add a frame (H, W) of labels found and true; the frames of a clip come one after the other, in order."""
        if self._clip is not None and self._clip[0] != clip:
            self._finish()
        self._clip = (clip, spacing)
        counted = mask != self.ignore_index
        both = (labels.where(counted, 0).to(torch.uint8).cpu().numpy() for labels in (found, mask))
        self._frames.append(tuple(both))  # type: ignore[arg-type]

    def sync(self, device: torch.device | None = None) -> None:
        """Refuse distributed runs, in which the slices of a volume lie in several processes: raises UserError."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError("task=medseg measures whole volumes, in one process; set trainer.devices=1")

    def compute(self) -> dict[str, Any]:
        """What `SegmentationMetrics` gives, "dice3d" and "hd95_mm" ({structure: mean}), and "mean_" of both."""
        self._finish()
        means = {
            kind: {name: mean_of_known(values) for name, values in scores.items()}
            for kind, scores in (("dice3d", self._dice), ("hd95_mm", self._hd95))
        }
        return {
            **super().compute(),
            **means,
            **{f"mean_{kind}": mean_of_known(list(values.values())) for kind, values in means.items()},
        }

    def _finish(self) -> None:
        """Measure the volume whose last frame has come."""
        if self._clip is None or not self._frames:
            return
        found, true = (np.stack(labels) for labels in zip(*self._frames, strict=True))
        spacing = self._clip[1] or (None, None, None)
        for label, name in enumerate(self.classes[1:], start=1):
            p, t = found == label, true == label
            if total := int(p.sum()) + int(t.sum()):
                self._dice[name].append(2 * int((p & t).sum()) / total)
            if (distance := _hd95(p, t, spacing)) is not None:
                self._hd95[name].append(distance)
        self._frames = []


def _hd95(found: NDArray[np.bool_], true: NDArray[np.bool_], spacing: Spacing) -> float | None:
    """Millimetres between the surfaces of two masks (T, H, W); None where there are none."""
    step, row, column = spacing
    if row is None or column is None:
        return None
    if step is not None and len(found) > 1:
        whole = surface_distances(found, true, (step, row, column))
        return None if whole is None else whole.hd95
    planes = [surface_distances(p, t, (row, column)) for p, t in zip(found, true, strict=True)]
    return mean_of_known([plane.hd95 for plane in planes if plane is not None])
