import json

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from vfmadapt.metrics import SegmentationMetrics, as_table, boundaries, within

NAMES = ("clear", "thick", "thin", "shadow")


@pytest.fixture(scope="module")
def pair():
    g = torch.Generator().manual_seed(1)
    blobs = torch.nn.functional.avg_pool2d(torch.randn(3, 4, 40, 30, generator=g), 9, 1, 4)
    mask = blobs.argmax(1)
    logits = blobs + 0.05 * torch.randn(blobs.shape, generator=g)
    mask[:, 5:12, 3:20] = 255
    return logits, mask


def test_against_torchmetrics_and_sklearn(pair):
    from sklearn.metrics import f1_score, jaccard_score
    from torchmetrics.classification import MulticlassConfusionMatrix

    logits, mask = pair
    ours = SegmentationMetrics(NAMES)
    for i in range(3):  # one at a time: the result must be that of the whole set
        ours.update(logits[i : i + 1], mask[i : i + 1])
    oracle = MulticlassConfusionMatrix(4, ignore_index=255)(logits, mask)
    assert torch.equal(ours.confusion, oracle)
    keep = mask != 255
    truth, found = mask[keep].numpy(), logits.argmax(1)[keep].numpy()
    result = ours.compute()
    assert list(result["iou"].values()) == pytest.approx(jaccard_score(truth, found, average=None))
    assert result["miou"] == pytest.approx(jaccard_score(truth, found, average="macro"))
    assert list(result["f1"].values()) == pytest.approx(f1_score(truth, found, average=None))
    assert result["accuracy"] == pytest.approx((truth == found).mean())
    json.dumps(result, allow_nan=False)


def test_absent_classes_are_left_out_of_the_mean():
    metrics = SegmentationMetrics(NAMES)
    metrics.update(torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 0, 1, 0]]]))
    result = metrics.compute()
    assert result["iou"] == {"clear": pytest.approx(2 / 3), "thick": 0.5, "thin": None, "shadow": None}
    assert result["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    metrics.reset()
    assert metrics.compute()["miou"] is None


def test_boundary_f1_by_distance_transform(pair):
    logits, mask = pair
    metrics = SegmentationMetrics(NAMES, tolerance=1.5)
    metrics.update(logits, mask)
    labels, counted = logits.argmax(1), mask != 255
    scores = []
    for c in range(4):
        sums = np.zeros(4)
        for i in range(3):
            found, true = (((m == c) & boundaries(m, counted))[i].numpy() for m in (labels, mask))
            assert found.any()
            assert true.any()
            near_true, near_found = distance_transform_edt(~true) <= 1.5, distance_transform_edt(~found) <= 1.5
            sums += [found.sum(), (found & near_true).sum(), true.sum(), (true & near_found).sum()]
        p, r = sums[1] / sums[0], sums[3] / sums[2]
        scores.append(2 * p * r / (p + r))
    assert metrics.compute()["boundary_f1"] == pytest.approx(np.mean(scores))


def test_boundary_f1_tolerates_exactly_the_tolerance():
    def score(shift):
        mask = torch.zeros(1, 20, 20, dtype=torch.int64)
        mask[..., 10:] = 1
        metrics = SegmentationMetrics(("a", "b"), tolerance=2)
        metrics.update(mask.roll(shift, 2).index_fill(2, torch.arange(shift), 0), mask)
        return metrics.compute()["boundary_f1"]

    assert [score(s) for s in (0, 1, 2)] == [1, 1, 1]
    assert score(3) == 0


def test_no_boundary_at_frame_or_ignored_area():
    mask = torch.zeros(1, 8, 8, dtype=torch.int64)
    mask[:, 2:5] = 255
    assert not boundaries(mask, mask != 255).any()
    found = mask.clone()
    found[:, 2:5] = 1  # what is predicted in the ignored area does not count
    metrics = SegmentationMetrics(("a", "b"))
    metrics.update(found, mask)
    assert metrics.compute()["boundary_f1"] is None
    assert metrics.compute()["miou"] == 1


def test_within_is_a_euclidean_disc():
    point = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    point[..., 4, 4] = True
    assert int(within(point, 2)[0, 0].sum()) == 13
    assert torch.equal(within(point, 0), point)


def test_table_names_every_class(pair):
    metrics = SegmentationMetrics(NAMES)
    metrics.update(*pair)
    table = as_table(metrics.compute())
    assert all(name in table for name in NAMES)
    assert len({len(line) for line in table.splitlines()[:6]}) == 1
