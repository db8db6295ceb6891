"""Segmentation of medical images, slices of volumes and frames of videos."""

from typing import Any

from torch import Tensor

from vfmadapt.tasks.segmentation import SegmentationTask
from vfmadapt.volume_metrics import VolumeMetrics


class MedsegTask(SegmentationTask):
    """Labels frames one by one, and measures also the volumes that they make up, in millimetres."""

    metrics_class = VolumeMetrics
    metrics: VolumeMetrics

    def count(self, logits: Tensor, batch: dict[str, Any]) -> None:
        """Count whole frames, which come clip by clip; their ids are CLIP/FRAME."""
        super().count(logits, batch)
        for found, mask, name, spacing in zip(
            logits.argmax(1), batch["mask"], batch["id"], batch["spacing"], strict=True
        ):
            self.metrics.add_frame(found, mask, clip=name.rpartition("/")[0], spacing=spacing)
