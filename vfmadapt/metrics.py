"""Metrics of semantic segmentation, all from counts over the whole set (papers' mIoU), never averaged per image."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.contracts import IGNORE_INDEX


def confusion_matrix(labels: Tensor, mask: Tensor, classes: int, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labels and truth of any one shape -> int64 (K, K): row truth, column prediction, ignored pixels left out."""
    counted = mask != ignore_index
    pairs = mask[counted].long() * classes + labels[counted].long()
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def boundaries(labels: Tensor, counted: Tensor) -> Tensor:
    """Label maps (B, H, W) -> bool (B, H, W): pixels with a 4-neighbour of another class, both pixels being counted.

    Neither the image's frame nor the rim of an ignored area is a boundary.
    """
    edge = torch.zeros_like(counted)
    for axis in (1, 2):
        size = labels.shape[axis]
        near, far = (t.narrow(axis, 0, size - 1) for t in (labels, counted))
        near_next, far_next = (t.narrow(axis, 1, size - 1) for t in (labels, counted))
        differs = (near != near_next) & far & far_next
        edge.narrow(axis, 0, size - 1).logical_or_(differs)
        edge.narrow(axis, 1, size - 1).logical_or_(differs)
    return edge


def within(points: Tensor, radius: float) -> Tensor:
    """Bool (B, K, H, W) -> bool: pixels at most `radius` pixels (Euclidean) from a point of the same map."""
    reach = int(radius)
    if reach == 0:
        return points
    offsets = torch.arange(-reach, reach + 1, device=points.device)
    disc = (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2).float()
    kernel = disc.expand(points.shape[1], 1, *disc.shape)
    return F.conv2d(points.float(), kernel, padding=reach, groups=points.shape[1]) > 0.5


def skeletons(masks: Tensor) -> Tensor:
    """Masks of lines, bool (B, K, H, W) -> bool: their centre lines, one pixel wide (Zhang and Suen 1984)."""
    from skimage.morphology import skeletonize

    thin = [torch.from_numpy(skeletonize(mask)) for mask in masks.flatten(0, 1).cpu().numpy()]
    return torch.stack(thin).reshape(masks.shape).to(masks.device)


def _ratio(part: Tensor, whole: Tensor) -> list[float | None]:
    return [float(p) / float(w) if float(w) > 0 else None for p, w in zip(part, whole, strict=True)]


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None without any."""
    defined = [v for v in values if v is not None]
    return sum(defined) / len(defined) if defined else None


class SegmentationMetrics:
    """Counts over a set: one confusion matrix, and per class the boundary pixels that found a partner.

    IoU and F1 of a class that neither truth nor prediction holds are undefined (None) and left out of the means.

    Boundary F1 of a class: its boundary pixels (`boundaries`) in the prediction that lie within `tolerance` pixels
    (Euclidean) of one in the truth give the precision, the reverse the recall, both over the whole set; the mean is
    over classes that have a boundary in either. Where the truth is ignored there is no boundary on either side.

    Of the classes named in `lines` the centre lines count too (Heipke et al. 1997, "Evaluation of Automatic Road
    Extraction"). With a line matched where it lies within `buffer` pixels of the other's centre line, completeness is
    the share of the truth that is matched, correctness that of the prediction, quality = matched prediction /
    (prediction + truth that is not matched). Skeleton recall is the share of the truth's centre line that the
    predicted area covers (clDice's topology sensitivity, Shit et al. 2021).
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        ignore_index: int = IGNORE_INDEX,
        tolerance: float = 2.0,
        lines: Sequence[str] = (),
        buffer: float = 3.0,
    ) -> None:
        self.classes, self.lines = tuple(classes), tuple(lines)
        self.ignore_index, self.tolerance, self.buffer = ignore_index, tolerance, buffer
        self.reset()

    def reset(self) -> None:
        """Forget everything that was counted."""
        count = len(self.classes)
        self.confusion = torch.zeros(count, count, dtype=torch.int64)
        # per class: boundary pixels predicted, those of them near the truth, boundary pixels of the truth, those near
        self.boundary = torch.zeros(4, count, dtype=torch.int64)
        # per line class: pixels of the prediction's centre line, those matched; of the truth's, those matched, covered
        self.course = torch.zeros(5, len(self.lines), dtype=torch.int64)

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Count logits (B, K, H, W) or labels (B, H, W) against `mask` (B, H, W)."""
        labels = prediction.argmax(1) if prediction.ndim == 4 else prediction
        counts = confusion_matrix(labels, mask, len(self.classes), ignore_index=self.ignore_index)
        self.confusion += counts.to(self.confusion.device)
        self.boundary += self._boundary_counts(labels, mask).to(self.boundary.device)
        if self.lines:
            self.course += self._course_counts(labels, mask).to(self.course.device)

    def _course_counts(self, labels: Tensor, mask: Tensor) -> Tensor:
        indices = torch.tensor([self.classes.index(name) for name in self.lines], device=labels.device)
        counted = (mask != self.ignore_index)[:, None]
        area, truth = ((m[:, None] == indices[:, None, None]) & counted for m in (labels, mask))
        found, true = skeletons(area), skeletons(truth)
        near_true, near_found = within(true, self.buffer), within(found, self.buffer)
        return torch.stack([t.sum((0, 2, 3)) for t in (found, found & near_true, true, true & near_found, true & area)])

    def _boundary_counts(self, labels: Tensor, mask: Tensor) -> Tensor:
        counted = mask != self.ignore_index
        found, true = self._class_boundaries(labels, counted), self._class_boundaries(mask, counted)
        near_true, near_found = within(true, self.tolerance), within(found, self.tolerance)
        return torch.stack([t.sum((0, 2, 3)) for t in (found, found & near_true, true, true & near_found)])

    def _class_boundaries(self, labels: Tensor, counted: Tensor) -> Tensor:
        indices = torch.arange(len(self.classes), device=labels.device)[None, :, None, None]
        return (labels[:, None] == indices) & boundaries(labels, counted)[:, None]

    def sync(self, device: torch.device | None = None) -> None:
        """Sum the counts over the processes of a distributed run; `device` is one that its backend can reduce on."""
        sync_counts(self, ("confusion", "boundary", "course"), device)

    def compute(self) -> dict[str, Any]:
        """All counted so far: "miou", "accuracy", "mean_f1", "boundary_f1", "iou" and "f1" (both {class: value}).

        With line classes also "completeness", "correctness", "quality" and "skeleton_recall" (each {class: value}).
        Values lie in 0..1; None where undefined (no pixel counted, or an absent class).
        """
        hit, truth, found = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        iou, f1 = _ratio(hit, truth + found - hit), _ratio(2 * hit, truth + found)
        accuracy = _ratio(hit.sum()[None], truth.sum()[None])[0]
        return {
            "miou": mean_of_known(iou),
            "accuracy": accuracy,
            "mean_f1": mean_of_known(f1),
            "boundary_f1": mean_of_known(self._boundary_f1()),
            "iou": dict(zip(self.classes, iou, strict=True)),
            "f1": dict(zip(self.classes, f1, strict=True)),
            **(self._courses() if self.lines else {}),
        }

    def _courses(self) -> dict[str, dict[str, float | None]]:
        found, found_hit, true, true_hit, covered = self.course
        scores = {
            "completeness": _ratio(true_hit, true),
            "correctness": _ratio(found_hit, found),
            "quality": _ratio(found_hit, found + true - true_hit),
            "skeleton_recall": _ratio(covered, true),
        }
        return {kind: dict(zip(self.lines, values, strict=True)) for kind, values in scores.items()}

    def _boundary_f1(self) -> list[float | None]:
        scores: list[float | None] = []
        for found, found_hit, true, true_hit in self.boundary.T.tolist():
            precision, recall = found_hit / max(found, 1), true_hit / max(true, 1)
            both = precision + recall
            scores.append((2 * precision * recall / both if both else 0.0) if found + true else None)
        return scores


class PromptMetrics:
    """Mean IoU of the masks of prompted objects, over all objects of a set.

    `PROMPTS` are what is asked; `clicks`: how many follow the first point.
    """

    PROMPTS = ("box", "point", "clicks")

    def __init__(self, classes: Sequence[str], *, clicks: int) -> None:
        self.classes, self.clicks = tuple(classes), clicks
        self.reset()

    def reset(self) -> None:
        """Forget everything that was counted."""
        self.sums = torch.zeros(len(self.PROMPTS), len(self.classes), dtype=torch.float64)
        self.objects = torch.zeros(len(self.classes), dtype=torch.int64)

    def update(self, classes: Tensor, iou: Mapping[str, Tensor]) -> None:
        """Count objects: labels of their classes (M,) and the IoU from each kind of prompt (M,)."""
        at = classes.cpu()
        for total, kind in zip(self.sums, self.PROMPTS, strict=True):
            total.index_add_(0, at, iou[kind].double().cpu())
        self.objects += torch.bincount(at, minlength=len(self.classes))

    def sync(self, device: torch.device | None = None) -> None:
        """Sum over the processes of a distributed run; `device` is one that its backend can reduce on."""
        sync_counts(self, ("sums", "objects"), device)

    def compute(self) -> dict[str, Any]:
        """All counted so far: "box_iou", "point_iou", "clicks_iou", "iou" ({class: from a box}), "objects", "clicks".

        "miou" is "box_iou". Values lie in 0..1; None without an object.
        """
        count = self.objects.sum()[None]
        means = {kind: _ratio(total.sum()[None], count)[0] for kind, total in zip(self.PROMPTS, self.sums, strict=True)}
        return {
            "miou": means["box"],
            **{f"{kind}_iou": value for kind, value in means.items()},
            "iou": dict(zip(self.classes, _ratio(self.sums[0], self.objects), strict=True)),
            "objects": int(count),
            "clicks": self.clicks,
        }


def sync_counts(counts: Any, names: Sequence[str], device: torch.device | None) -> None:
    """Sum tensors of these names over the processes of a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for name in names:
            total = getattr(counts, name).to(device)
            torch.distributed.all_reduce(total)
            setattr(counts, name, total.cpu())


_COLUMNS = {
    "iou": "IoU",
    "f1": "F1",
    "completeness": "compl.",
    "correctness": "corr.",
    "quality": "qual.",
    "skeleton_recall": "sk.rec",
}


def as_table(metrics: dict[str, Any]) -> str:
    """The result of `SegmentationMetrics.compute` as aligned text: one line per class, then the means."""

    def cell(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.3f}"

    width = max(len(name) for name in (*metrics["iou"], "boundary F1"))
    kinds = {kind: title for kind, title in _COLUMNS.items() if kind in metrics}
    rows = ["  ".join([f"{'class':<{width}}", *(f"{title:>6}" for title in kinds.values())])]
    for name in metrics["iou"]:
        rows.append("  ".join([f"{name:<{width}}", *(cell(metrics[kind].get(name)) for kind in kinds)]))
    rows += [f"{'mean':<{width}}  {cell(metrics['miou'])}  {cell(metrics['mean_f1'])}"]
    rows += [f"{'accuracy':<{width}}  {cell(metrics['accuracy'])}"]
    rows += [f"{'boundary F1':<{width}}  {cell(metrics['boundary_f1'])}"]
    return "\n".join(rows)
