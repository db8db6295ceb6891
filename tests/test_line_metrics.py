"""Completeness, correctness, quality and skeleton recall, against lines of known scores and SciPy's distances."""

import json

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from vfmadapt.metrics import SegmentationMetrics, as_table, skeletons

NAMES = ("ground", "road", "lake")
KINDS = ("completeness", "correctness", "quality", "skeleton_recall")


def lines(*rows: int, width: int = 5, left: int = 0, right: int = 80) -> torch.Tensor:
    """Labels (1, 60, 80) with horizontal roads of odd `width` around `rows`."""
    made = torch.zeros(1, 60, 80, dtype=torch.int64)
    for row in rows:
        made[:, row - width // 2 : row + width // 2 + 1, left:right] = 1
    return made


def scores(found: torch.Tensor, truth: torch.Tensor, **settings) -> dict:
    metrics = SegmentationMetrics(NAMES, lines=("road",), **settings)
    metrics.update(found, truth)
    result = metrics.compute()
    return {kind: result[kind]["road"] for kind in KINDS}


@pytest.mark.parametrize(("shift", "matched"), [(0, 1), (2, 1), (3, 1), (4, 0), (7, 0)])
def test_the_buffer_is_three_pixels(shift, matched):
    result = scores(lines(30 + shift), lines(30))
    assert [result[kind] for kind in KINDS[:3]] == pytest.approx([matched] * 3, abs=0.02)


def test_width_does_not_count_but_what_covers_the_centre_does():
    thin, wide = scores(lines(30, width=1), lines(30, width=13)), scores(lines(34, width=3), lines(30, width=13))
    assert thin["quality"] == pytest.approx(1, abs=0.15)  # the centre line of a bar bends into the corners at its ends
    assert thin["skeleton_recall"] > 0.9
    assert wide["skeleton_recall"] == 0
    assert scores(lines(34, width=11), lines(30, width=13))["skeleton_recall"] > 0.9


def test_half_a_line_is_half_complete_and_a_second_one_half_correct():
    half, twice = scores(lines(30, right=40), lines(30)), scores(lines(20, 40), lines(20))
    assert half["completeness"] == pytest.approx(0.5, abs=0.06)  # the buffer adds 3 of 80 pixels at the end
    assert half["correctness"] == 1
    assert half["quality"] == pytest.approx(0.5, abs=0.06)
    assert half["skeleton_recall"] == pytest.approx(0.5, abs=0.03)
    assert twice["completeness"] == 1
    assert twice["correctness"] == pytest.approx(0.5)
    assert twice["quality"] == pytest.approx(0.5)


@pytest.fixture(scope="module")
def pair():
    g = torch.Generator().manual_seed(3)
    blobs = torch.nn.functional.avg_pool2d(torch.randn(3, 3, 70, 60, generator=g), 11, 1, 5)
    mask = blobs.argmax(1)
    labels = (blobs + 0.05 * torch.randn(blobs.shape, generator=g)).argmax(1)
    mask[:, 5:12, 3:40] = 255
    return labels, mask


def test_counts_over_a_set_agree_with_distance_transforms(pair):
    labels, mask = pair
    metrics = SegmentationMetrics(NAMES, lines=("road", "lake"), buffer=1.5)
    for i in range(3):
        metrics.update(labels[i : i + 1], mask[i : i + 1])
    result = metrics.compute()
    json.dumps(result, allow_nan=False)
    for name in ("road", "lake"):
        index, sums = NAMES.index(name), np.zeros(5)
        for i in range(3):
            area, truth = (((m == index) & (mask != 255))[i] for m in (labels, mask))
            found, true = (skeletons(m[None, None])[0, 0].numpy() for m in (area, truth))
            assert found.any()
            assert true.any()
            near_true, near_found = distance_transform_edt(~true) <= 1.5, distance_transform_edt(~found) <= 1.5
            parts = (found, found & near_true, true, true & near_found, true & area.numpy())
            sums += [part.sum() for part in parts]
        expected = (sums[3] / sums[2], sums[1] / sums[0], sums[1] / (sums[0] + sums[2] - sums[3]), sums[4] / sums[2])
        assert [result[kind][name] for kind in KINDS] == pytest.approx(expected)


def test_skeleton_is_one_pixel_wide_and_in_the_middle():
    thin = skeletons(lines(30, width=13)[:, None].bool())[0, 0]
    assert thin[:, 10:70].sum(0).eq(1).all()
    assert thin[30, 10:70].all()
    assert not skeletons(torch.zeros(2, 3, 8, 8, dtype=torch.bool)).any()


def test_ignored_pixels_hold_no_line():
    truth = lines(20)
    truth[:, 35:] = 255
    assert scores(lines(20, 45), truth)["quality"] == 1


def test_without_a_line_nothing_is_defined_and_other_classes_have_no_scores():
    nothing = scores(lines(), lines())
    assert nothing == dict.fromkeys(KINDS)
    missed = scores(lines(), lines(30))
    assert (missed["completeness"], missed["correctness"], missed["quality"]) == (0, None, 0)
    metrics = SegmentationMetrics(NAMES)
    metrics.update(lines(30), lines(30))
    assert not set(KINDS) & set(metrics.compute())


def test_table_has_columns_for_lines(pair):
    metrics = SegmentationMetrics(NAMES, lines=("road",))
    metrics.update(*pair)
    head, ground, road, *_ = as_table(metrics.compute()).splitlines()
    assert head.split() == ["class", "IoU", "F1", "compl.", "corr.", "qual.", "sk.rec"]
    assert ground.split()[3:] == ["-"] * 4
    assert all(0 <= float(cell) <= 1 for cell in road.split()[1:])
    assert len(head) == len(ground) == len(road)
