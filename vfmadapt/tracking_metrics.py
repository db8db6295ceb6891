"""Metrics of tracked structures: overlap, boundaries and distances, frame by frame and over a clip."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.surfaces import surface_distances

Mask = NDArray[np.bool_]

MEANS = ("dice3d", "dice", "j", "f", "jf", "hd95", "asd", "centre_distance", "false_positive_frames", "missed_frames")
"""Scores of `StructureMetrics.compute` of which means over structures and clips are taken."""

_BOUNDARY_SHARE = 0.008  # of the image's diagonal: how far DAVIS lets a boundary lie beside the truth
_LEVEL = 0.95
_RESAMPLES = 2000  # leave the ends of an interval uncertain by about 2 % of its width


def dice(prediction: Mask, truth: Mask) -> float:
    """2 |P ∩ T| / (|P| + |T|): 1 where both masks are empty, 0 where one is."""
    total = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / total if total else 1.0


def region_similarity(prediction: Mask, truth: Mask) -> float:
    """J of DAVIS (Perazzi et al. 2016), the IoU: 1 where both masks are empty, 0 where one is."""
    union = int((prediction | truth).sum())
    return int((prediction & truth).sum()) / union if union else 1.0


def boundary_similarity(prediction: Mask, truth: Mask) -> float:
    """F of DAVIS (Perazzi et al. 2016) for masks (H, W): how well the boundaries agree.

    The harmonic mean of precision and recall, a boundary pixel counting as found where the other boundary lies no
    farther than 0.8 % of the image's diagonal, rounded up. 1 where both masks are empty, 0 where one is.
    """
    from scipy.spatial import KDTree

    reach = math.ceil(_BOUNDARY_SHARE * math.hypot(*truth.shape))
    found, true = (np.argwhere(_boundary(mask)) for mask in (prediction, truth))
    if not (len(found) and len(true)):
        return float(len(found) == len(true))
    precision, recall = (
        float((KDTree(other).query(points)[0] <= reach).mean()) for points, other in ((found, true), (true, found))
    )
    both = precision + recall
    return 2 * precision * recall / both if both else 0.0


def _boundary(mask: Mask) -> Mask:
    """Pixels that differ from the next to the right, below, or right below."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def centroid(mask: Mask) -> tuple[float, float]:
    """(row, column) of the centre of mass of a mask (H, W) that is not empty, in pixels."""
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


class StructureMetrics:
    """One structure in one clip, compared frame by frame; the prompt's frame, where the mask was given, is left out.

    `dice3d` is the Dice of all pixels of all frames together, `dice` the mean over the frames where the structure
    exists, `j`, `f` and `jf` (their mean) those over all frames. `hd95` and `asd` are distances between the surfaces in
    3-D with `depth` (of the whole volume, the prompt's frame included, since a surface has no hole), else means over
    the frames; `centre_distance` is that of the centres of mass in the plane. A mean of distances runs over the frames
    where both masks exist: that one is missing shows in `false_positive_frames` and `missed_frames`.

    Args:
        spacing: of rows and columns, in mm; (1, 1) for pixels.
        prompt: index of the frame that was prompted.
        depth: mm between the slices of a volume; None compares distances within frames.
    """

    def __init__(self, spacing: tuple[float, float], *, prompt: int, depth: float | None = None) -> None:
        self.spacing, self.prompt, self.depth = spacing, prompt, depth
        self.both = self.either = 0  # pixels: twice those in common, those of the two masks
        self.counts = {"frames": 0, "frames_present": 0, "false_positive_frames": 0, "missed_frames": 0}
        self.values: dict[str, list[float]] = {k: [] for k in ("dice", "j", "f", "hd95", "asd", "centre_distance")}
        self._volume: tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]] = ([], [])  # packed to bits
        self._width = 0

    def update(self, index: int, prediction: Mask, truth: Mask) -> None:
        """Count frame `index`; masks (H, W). With `depth` the frames must come in their order."""
        if self.depth is not None:
            self._width = truth.shape[1]
            for stack, mask in zip(self._volume, (prediction, truth), strict=True):
                stack.append(np.packbits(mask, axis=1))
        if index == self.prompt:
            return
        found, true = bool(prediction.any()), bool(truth.any())
        self.both += 2 * int((prediction & truth).sum())
        self.either += int(prediction.sum()) + int(truth.sum())
        self.counts["frames"] += 1
        self.counts["frames_present"] += true
        self.counts["false_positive_frames"] += found and not true
        self.counts["missed_frames"] += true and not found
        self.values["j"].append(region_similarity(prediction, truth))
        self.values["f"].append(boundary_similarity(prediction, truth))
        if true:
            self.values["dice"].append(dice(prediction, truth))
        if found and true:
            self._add_distances(prediction, truth)

    def _add_distances(self, prediction: Mask, truth: Mask) -> None:
        offsets = np.subtract(centroid(prediction), centroid(truth)) * self.spacing
        self.values["centre_distance"].append(float(np.hypot(*offsets)))
        if self.depth is None and (apart := surface_distances(prediction, truth, self.spacing)):
            self.values["hd95"].append(apart.hd95)
            self.values["asd"].append(apart.mean)

    def compute(self) -> dict[str, float | int | None]:
        """All of `MEANS`, and "frames" and "frames_present"; None where undefined."""
        means = {name: _mean(values) for name, values in self.values.items()}
        if self.depth is not None:
            found, true = (np.unpackbits(np.stack(s), axis=2, count=self._width) for s in self._volume)
            if apart := surface_distances(found.view(bool), true.view(bool), (self.depth, *self.spacing)):
                means |= {"hd95": apart.hd95, "asd": apart.mean}
        jf = _mean([v for v in (means["j"], means["f"]) if v is not None])
        return {"dice3d": self.both / self.either if self.either else None, **means, "jf": jf, **self.counts}


def average(scores: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """The mean of each named score over structures or clips, undefined values left out."""
    return {name: _mean([s[name] for s in scores if s[name] is not None]) for name in names}


def confidence_intervals(
    scores: Sequence[Mapping[str, Any]], names: Sequence[str], *, seed: int = 0
) -> dict[str, list[float] | None]:
    """95 % intervals of those means by the bootstrap over clips: [low, high], None of fewer than two values.

    The percentile bootstrap (Efron 1979), because the others are undefined where all values are equal.
    """
    from scipy.stats import bootstrap

    intervals: dict[str, list[float] | None] = dict.fromkeys(names)
    for name in names:
        values = [s[name] for s in scores if s[name] is not None]
        if len(values) > 1:
            found = bootstrap(
                (values,), np.mean, confidence_level=_LEVEL, n_resamples=_RESAMPLES, method="percentile", rng=seed
            ).confidence_interval
            intervals[name] = [float(found.low), float(found.high)]
    return intervals


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
