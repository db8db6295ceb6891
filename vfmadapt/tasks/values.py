"""Loaders over images whose pixels hold values or depth."""

from typing import Any

import torch

from vfmadapt.tasks.augment_values import known_values
from vfmadapt.tasks.data import SegmentationData


def collate_values(samples: list[Any]) -> dict[str, Any]:
    """Samples of one size -> "image" (B, C, H, W), "valid" (B, H, W), "truth" and "known" (B, K, H, W), "id": list.

    `known` is False where the values are not; `truth` is 1 there.
    """
    values = torch.stack([known_values(s) for s in samples])
    known = torch.isfinite(values)
    batch = {key: torch.stack([s[key] for s in samples]) for key in ("image", "valid")}
    return batch | {"truth": values.where(known, 1.0), "known": known, "id": [s["id"] for s in samples]}


class ValueData(SegmentationData):
    """Train, val and test loaders over a source of values or depth; see `SegmentationData`."""

    collate = staticmethod(collate_values)
