"""Segmentation of medical images, slices of volumes and frames of videos."""

from typing import Any

from torch import Tensor

from vfmadapt.tasks.segmentation import SegmentationTask
from vfmadapt.volume_metrics import VolumeMetrics, volume_table


class MedsegTask(SegmentationTask):
    """Labels frames one by one, and measures also the volumes that they make up, see `VolumeMetrics`."""

    metrics_class = VolumeMetrics
    metrics: VolumeMetrics

    def count(self, logits: Tensor, batch: dict[str, Any]) -> None:
        """Count whole frames, which come clip by clip."""
        self.metrics.count(logits, batch)

    def table(self) -> str:
        """The metrics of the test split as text."""
        return f"{super().table()}\n{volume_table(self.results['test'])}"

    def _conclude(self, split: str) -> None:
        super()._conclude(split)
        if split == "test":
            self.results[split] |= self.metrics.details()
