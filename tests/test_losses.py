import pytest
import torch
import torch.nn.functional as F

from vfmadapt.losses import SegmentationLoss, class_weights, cross_entropy, dice


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 9, 7, generator=g)
    mask = torch.randint(0, 4, (2, 9, 7), generator=g)
    mask[:, :3, :2] = 255
    return logits.requires_grad_(), mask


@pytest.mark.parametrize("weight", [None, torch.tensor([0.3, 1.0, 2.0, 5.0])])
def test_cross_entropy_is_torchs_own(batch, weight):
    logits, mask = batch
    expected = F.cross_entropy(logits, mask, weight=weight, ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, mask, weight=weight), expected)


def test_dice_by_the_definition(batch):
    logits, mask = batch
    p, t = logits.detach().softmax(1).movedim(1, -1)[mask != 255], mask[mask != 255]
    scores = [2 * p[t == c, c].sum() / (p[:, c].sum() + (t == c).sum()) for c in range(4)]
    torch.testing.assert_close(dice(logits, mask), 1 - torch.stack(scores).mean())


def test_dice_leaves_out_absent_classes_and_is_0_when_perfect():
    mask = torch.tensor([[[0, 1], [1, 255]]])
    logits = 40 * F.one_hot(mask.clamp_max(2), 3).movedim(-1, 1).float()
    assert dice(logits, mask) == pytest.approx(0, abs=1e-6)
    assert dice(logits.roll(1, 1), mask) == pytest.approx(1, abs=1e-6)


def test_ignored_pixels_neither_count_nor_get_a_gradient(batch):
    logits, mask = batch
    loss = SegmentationLoss(class_weights=[1, 2, 3, 4])
    value = loss(logits, mask)["loss"]
    (grad,) = torch.autograd.grad(value, logits)
    ignored = (mask == 255)[:, None].expand_as(grad)
    assert (grad[ignored] == 0).all()
    assert (grad[~ignored] != 0).all()
    poisoned = logits.detach().clone()
    poisoned[ignored] = float("nan")
    assert torch.equal(loss(poisoned, mask)["loss"], value.detach())


def test_nothing_counted_gives_zero_with_gradient(batch):
    logits, mask = batch
    value = SegmentationLoss()(logits, torch.full_like(mask, 255))["loss"]
    value.backward()
    assert value == 0
    assert (logits.grad == 0).all()


def test_weights_of_the_two_parts(batch):
    logits, mask = batch
    parts = SegmentationLoss(ce_weight=2, dice_weight=0.5)(logits, mask)
    torch.testing.assert_close(parts["loss"], 2 * parts["ce"] + 0.5 * parts["dice"])


def test_half_precision_logits_are_summed_in_float32():
    logits, mask = torch.zeros(1, 2, 400, 400, dtype=torch.bfloat16), torch.zeros(1, 400, 400, dtype=torch.int64)
    assert SegmentationLoss(dice_weight=0)(logits, mask)["loss"].item() == pytest.approx(0.6931, abs=1e-3)


def test_class_weights_are_capped_inverse_roots():
    assert class_weights([100, 400, 25]) == pytest.approx([1, 0.5, 2])
    assert class_weights([10**9, 100, 1, 0], cap=4) == pytest.approx([0.25, 1, 4, 1])
    assert class_weights([0, 0]) == [1, 1]
