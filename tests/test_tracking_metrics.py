"""Metrics of tracked structures against independent computations."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist

from vfmadapt.surfaces import surface_distances
from vfmadapt.tracking_metrics import (
    MEANS,
    StructureMetrics,
    average,
    boundary_similarity,
    confidence_intervals,
    dice,
    region_similarity,
)

EMPTY = np.zeros((40, 30), dtype=bool)


def blob(seed: int, shape: tuple[int, ...] = (40, 30)) -> np.ndarray:
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 4)
    return field > np.quantile(field, 0.7)


def square(row: int, column: int, side: int = 6) -> np.ndarray:
    mask = EMPTY.copy()
    mask[row : row + side, column : column + side] = True
    return mask


@pytest.mark.parametrize("seed", range(3))
def test_overlap_against_monai(seed):
    from monai.metrics import compute_dice, compute_iou

    found, true = blob(seed), blob(seed + 10)
    tensors = [torch.from_numpy(m)[None, None].float() for m in (found, true)]
    assert dice(found, true) == pytest.approx(float(compute_dice(*tensors)))
    assert region_similarity(found, true) == pytest.approx(float(compute_iou(*tensors)))


@pytest.mark.parametrize("seed", range(3))
def test_boundaries_by_dilation(seed):
    """DAVIS's definition: match by dilating the other boundary with a disc."""
    from skimage.morphology import dilation, disk

    shape = (150, 190)  # 0.8 % of the diagonal, rounded up, is 2 pixels
    found, true = blob(seed, shape), blob(seed + 10, shape)
    edges = []
    for mask in (found, true):
        edge = np.zeros(shape, dtype=bool)
        for y in range(shape[0]):
            for x in range(shape[1]):
                beside = {mask[min(y + dy, 149), min(x + dx, 189)] for dy in (0, 1) for dx in (0, 1)}
                edge[y, x] = len(beside) > 1
        edges.append(edge)
    near = [dilation(e, disk(2)) for e in edges]
    precision, recall = (edges[0] & near[1]).sum() / edges[0].sum(), (edges[1] & near[0]).sum() / edges[1].sum()
    assert boundary_similarity(found, true) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("measure", [dice, region_similarity, boundary_similarity])
def test_empty_masks(measure):
    assert measure(EMPTY, EMPTY) == 1
    assert measure(square(3, 3), EMPTY) == measure(EMPTY, square(3, 3)) == 0
    assert measure(square(3, 3), square(3, 3)) == 1
    assert measure(square(3, 3), square(25, 20)) == 0


@pytest.mark.parametrize(("shape", "spacing"), [((40, 30), (0.5, 1.25)), ((8, 20, 16), (5.0, 0.7, 0.9))])
def test_surface_distances_by_brute_force(shape, spacing):
    found, true = blob(1, shape), blob(2, shape)
    surfaces = [np.argwhere(m & ~binary_erosion(m)) * spacing for m in (found, true)]
    between = cdist(*surfaces)
    directed = between.min(1), between.min(0)
    apart = surface_distances(found, true, spacing)
    assert apart.hd95 == pytest.approx(max(np.percentile(d, 95) for d in directed), rel=1e-5)
    assert apart.mean == pytest.approx(np.concatenate(directed).mean(), rel=1e-5)


def test_surface_distances_are_those_of_monai():
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    found, true = blob(3), blob(4)
    tensors = [torch.from_numpy(m)[None, None].float() for m in (found, true)]
    apart = surface_distances(found, true, (2.0, 3.0))
    kept = {"include_background": True, "spacing": [2.0, 3.0]}
    assert apart.hd95 == pytest.approx(float(compute_hausdorff_distance(*tensors, percentile=95, **kept)), rel=1e-5)
    mean = compute_average_surface_distance(*tensors, symmetric=True, **kept)
    assert apart.mean == pytest.approx(float(mean), rel=1e-5)


def test_surface_distances_of_an_empty_mask_are_undefined():
    assert surface_distances(EMPTY, square(3, 3), (1, 1)) is None
    assert surface_distances(square(3, 3), EMPTY, (1, 1)) is None


def counted(depth: float | None = None) -> dict:
    metrics = StructureMetrics((2.0, 0.5), prompt=1, depth=depth)
    pairs = [
        (square(10, 10), square(10, 12)),  # two columns aside: 24 of 36 pixels in common
        (EMPTY, square(10, 10)),  # the prompt's: must not count
        (square(10, 10), EMPTY),
        (EMPTY, square(10, 10)),
        (EMPTY, EMPTY),
        (square(13, 10), square(10, 10)),  # three rows down: 18 in common
    ]
    for index, (found, true) in enumerate(pairs):
        metrics.update(index, found, true)
    return metrics.compute()


def test_a_clip_by_hand():
    result = counted()
    assert result["dice3d"] == pytest.approx(2 * (24 + 18) / (4 * 36 + 2 * 36))
    assert result["dice"] == pytest.approx((24 / 36 + 0 + 18 / 36) / 3)
    assert result["j"] == pytest.approx((24 / 48 + 0 + 0 + 1 + 18 / 54) / 5)
    assert result["jf"] == pytest.approx((result["j"] + result["f"]) / 2)
    assert result["centre_distance"] == pytest.approx((2 * 0.5 + 3 * 2.0) / 2)
    assert result["hd95"] == pytest.approx((2 * 0.5 + 3 * 2.0) / 2)
    assert 0 < result["asd"] < result["hd95"]
    assert (result["frames"], result["frames_present"]) == (5, 3)
    assert (result["false_positive_frames"], result["missed_frames"]) == (1, 1)
    json.dumps(result, allow_nan=False)


def test_a_volume_has_surfaces_in_three_dimensions():
    truth = np.zeros((8, 40, 30), dtype=bool)
    truth[2:5, 10:16, 10:17] = True
    metrics = StructureMetrics((2.0, 0.5), prompt=3, depth=7.0)
    for index, (found, true) in enumerate(zip(np.roll(truth, 1, 0), truth, strict=True)):
        metrics.update(index, found, true)
    result = metrics.compute()
    assert result["hd95"] == pytest.approx(7.0)  # one slice up
    assert result["centre_distance"] == 0
    assert counted(depth=7.0)["dice3d"] == counted()["dice3d"]


def test_nothing_to_compare_is_undefined_and_left_out_of_means():
    metrics = StructureMetrics((1.0, 1.0), prompt=0)
    metrics.update(0, square(3, 3), square(3, 3))
    alone = metrics.compute()
    assert all(alone[name] is None for name in MEANS if not name.endswith("frames"))
    absent = StructureMetrics((1.0, 1.0), prompt=0)
    absent.update(1, EMPTY, EMPTY)
    assert absent.compute()["dice3d"] is None
    assert absent.compute()["j"] == 1
    assert average([alone, counted()], ["dice"])["dice"] == counted()["dice"]


def test_confidence_intervals():
    rng = np.random.default_rng(0)
    scores = [dict.fromkeys(MEANS, None) | {"dice": v} for v in rng.normal(0.7, 0.1, 60)]
    low, high = confidence_intervals(scores, MEANS)["dice"]
    mean = average(scores, ["dice"])["dice"]
    half = 1.96 * np.std([s["dice"] for s in scores]) / math.sqrt(60)
    assert low == pytest.approx(mean - half, abs=0.3 * half)
    assert high == pytest.approx(mean + half, abs=0.3 * half)
    assert confidence_intervals(scores, MEANS)["dice"] == [low, high]
    assert confidence_intervals(scores, MEANS)["hd95"] is None
    assert confidence_intervals(scores[:1], MEANS)["dice"] is None
    assert confidence_intervals([scores[0], scores[0]], MEANS)["dice"] == pytest.approx([scores[0]["dice"]] * 2)
