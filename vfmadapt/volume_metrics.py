"""Metrics of volumes whose slices are labelled one by one."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfmadapt.errors import UserError
from vfmadapt.metrics import SegmentationMetrics, mean_of_known
from vfmadapt.surfaces import surface_distances
from vfmadapt.tracking_metrics import confidence_intervals

Spacing = Sequence[float | None]

_TITLES = {"dice3d": "Dice", "hd95_mm": "HD95 mm", "hd95_px": "HD95 px"}
_UNKNOWN: Spacing = (None, None, None)


class VolumeMetrics(SegmentationMetrics):
    """Adds, per structure, the mean over volumes of Dice and of the 95th percentile Hausdorff distance.

    Dice of a structure in a volume, "dice3d", is 2 |P ∩ T| / (|P| + |T|) over all its slices, undefined where neither
    holds it. HD95 is that of the surfaces in space, by MONAI, undefined where one of them is empty: "hd95_mm" in
    millimetres, or "hd95_px" in pixels of the plane where a volume tells no millimetres, such as most photographs; each
    volume has one of the two. Frames of a video, single images, and slices at an unknown distance are measured in
    their plane and averaged. Label 0, the background, is left out.
    """

    def reset(self) -> None:
        """Forget everything that was counted."""
        super().reset()
        self._clip: tuple[str, Spacing | None] | None = None
        self._frames: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        self._volumes: list[dict[str, Any]] = []

    def count(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        """Count logits (B, K, H, W) of whole frames, which come clip by clip; `batch` holds "mask", "id", "spacing".

        An image that is part of no clip is a volume by itself.
        """
        self.update(logits, batch["mask"])
        for found, mask, name, spacing in zip(
            logits.argmax(1), batch["mask"], batch["id"], batch["spacing"], strict=True
        ):
            clip = name if spacing is None else name.rpartition("/")[0]  # frames of clips have a spacing, see `Sample`
            self.add_frame(found, mask, clip=clip or name, spacing=spacing)

    def add_frame(self, found: Tensor, mask: Tensor, *, clip: str, spacing: Spacing | None) -> None:
        """Add a frame (H, W) of labels found and true; the frames of a clip come one after the other, in order.

        `spacing`: millimetres from frame to frame, row to row and column to column, None where unknown.
        """
        if self._clip is not None and self._clip[0] != clip:
            self._finish()
        self._clip = (clip, spacing)
        counted = mask != self.ignore_index
        both = (labels.where(counted, 0).to(torch.uint8).cpu().numpy() for labels in (found, mask))
        self._frames.append(tuple(both))  # type: ignore[arg-type]

    def sync(self, device: torch.device | None = None) -> None:
        """Sum the counts and gather the volumes of a distributed run, whose processes take every n-th frame.

        Raises:
            UserError: the slices of a volume lie in several processes.
        """
        super().sync(device)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        self._finish()
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, self._volumes)
        self._volumes = [volume for turn in zip_longest(*found) for volume in turn if volume is not None]
        if len({volume["id"] for volume in self._volumes}) < len(self._volumes):
            raise UserError("task=medseg measures whole volumes, in one process; set trainer.devices=1")

    def compute(self) -> dict[str, Any]:
        """What `SegmentationMetrics` gives, "dice3d", "hd95_mm" and "hd95_px" ({structure: mean}), and "mean_" of each.

        That mean is over structures.
        """
        self._finish()
        means = {kind: self._means(kind) for kind in _TITLES}
        return {
            **super().compute(),
            **means,
            **{f"mean_{kind}": mean_of_known(list(values.values())) for kind, values in means.items()},
        }

    def details(self) -> dict[str, Any]:
        """The single volumes, and how sure the means over them are.

        Returns:
            "volumes": of each "id", "frames", and "dice3d", "hd95_mm" and "hd95_px" ({structure: value}, None where
            undefined); "confidence": of these three ({structure: [low, high]}) and of "mean_" of each the 95 %
            interval by the bootstrap over volumes, None of fewer than two.
        """
        self._finish()
        confidence: dict[str, Any] = {}
        for kind in _TITLES:
            confidence[kind] = confidence_intervals([v[kind] for v in self._volumes], self.classes[1:])
            shares = [{kind: share} for share in self._shares(kind)]
            confidence[f"mean_{kind}"] = confidence_intervals(shares, [kind])[kind]
        return {"volumes": list(self._volumes), "confidence": confidence}

    def _means(self, kind: str) -> dict[str, float | None]:
        return {name: mean_of_known([v[kind][name] for v in self._volumes]) for name in self.classes[1:]}

    def _shares(self, kind: str) -> list[float]:
        """For each volume that has a structure a number; the mean of these is the mean over structures.

        Where all volumes have all structures: a volume's mean over structures. Else the ratio estimator linearised, as
        a structure that few volumes have weighs more in each of them.
        """
        means = {name: mean for name, mean in self._means(kind).items() if mean is not None}
        counts = {name: sum(v[kind][name] is not None for v in self._volumes) for name in means}
        having = [v[kind] for v in self._volumes if any(value is not None for value in v[kind].values())]
        weights = {name: len(having) / (counts[name] * len(means)) for name in means}
        overall = sum(means.values()) / max(len(means), 1)
        return [
            overall + sum(weights[name] * (v[name] - means[name]) for name in means if v[name] is not None)
            for v in having
        ]

    def _finish(self) -> None:
        """Measure the volume whose last frame has come."""
        if self._clip is None or not self._frames:
            return
        found, true = (np.stack(labels) for labels in zip(*self._frames, strict=True))
        name, spacing = self._clip
        scores: dict[str, dict[str, float | None]] = {kind: {} for kind in _TITLES}
        for label, structure in enumerate(self.classes[1:], start=1):
            p, t = found == label, true == label
            total = int(p.sum()) + int(t.sum())
            scores["dice3d"][structure] = 2 * int((p & t).sum()) / total if total else None
            scores["hd95_mm"][structure], scores["hd95_px"][structure] = _hd95(p, t, spacing or _UNKNOWN)
        self._volumes.append({"id": name, "frames": len(found), **scores})
        self._frames = []


def volume_table(metrics: Mapping[str, Any]) -> str:
    """The results of `VolumeMetrics.compute` and `details` as aligned text: a line per structure, then the means."""
    kinds = [kind for kind in _TITLES if metrics[f"mean_{kind}"] is not None]
    confidence = metrics["confidence"]
    rows = [[f"{len(metrics['volumes'])} volumes", *(f"{_TITLES[kind]} (95 % interval)" for kind in kinds)]]
    for name in metrics["dice3d"]:
        rows.append([name, *(_cell(metrics[kind][name], confidence[kind][name]) for kind in kinds)])
    rows.append(["mean", *(_cell(metrics[f"mean_{kind}"], confidence[f"mean_{kind}"]) for kind in kinds)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _hd95(found: NDArray[np.bool_], true: NDArray[np.bool_], spacing: Spacing) -> tuple[float | None, float | None]:
    """(millimetres, pixels) between the surfaces of two masks (T, H, W): at most one of them is known."""
    step, row, column = spacing
    if row is None or column is None:
        return None, _hd95_in_plane(found, true, (1.0, 1.0))
    if step is None or len(found) == 1:
        return _hd95_in_plane(found, true, (row, column)), None
    whole = surface_distances(found, true, (step, row, column))
    return (None if whole is None else whole.hd95), None


def _hd95_in_plane(found: NDArray[np.bool_], true: NDArray[np.bool_], spacing: tuple[float, float]) -> float | None:
    """Mean over the frames that hold both masks."""
    planes = [surface_distances(p, t, spacing) for p, t in zip(found, true, strict=True)]
    return mean_of_known([plane.hd95 for plane in planes if plane is not None])
