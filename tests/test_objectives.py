"""Objectives: masking, targets, balance, the teacher, and that each learns."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from vfmadapt.backbones.scratch import sincos_positions, start_from_scratch
from vfmadapt.contracts import Blank
from vfmadapt.errors import UserError
from vfmadapt.objectives.dino_loss import (
    Centring,
    Projection,
    SinkhornKnopp,
    block_mask,
    cross_entropy,
    entropy,
    koleo,
)
from vfmadapt.objectives.dinov2 import DinoV2
from vfmadapt.objectives.mae import MaskedAutoencoder, patch_targets
from vfmadapt.objectives.views import random_crop
from vfmadapt.testing import adapted, perturb, tiny_backbone

FAMILIES = ("vit", "no_prefix", "dinov2_reg", "clip", "dinov3")
DINO = {"crops": 2, "hidden": 16, "bottleneck": 8, "prototypes": 32}


def mae(model, **settings):
    patch = model.spec.strides[0]
    return MaskedAutoencoder(model, **{"sizes": (4 * patch,), "dim": 16, "depth": 1, "heads": 2, **settings})


def dino(model, **settings):
    patch = model.spec.strides[0]
    return DinoV2(model, **{"large": 4 * patch, "small": 2 * patch, **DINO, **settings})


def batch(objective, count=3, epoch=0):
    squares = [torch.randn(3, objective.window, objective.window) for _ in range(count)]
    return default_collate([objective.sample(s, np.random.default_rng(i), epoch) for i, s in enumerate(squares)])


def patchify(image, patch):
    return F.unfold(image, patch, stride=patch).mT


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_all_patches_are_the_features(family):
    model = adapted("explora", family, settings={"rank": 2})
    perturb(model)
    patch, prefix = model.spec.strides[0], model.spec.prefix_tokens
    image = torch.randn(2, 3, 3 * patch, 5 * patch)
    with torch.no_grad():
        features = model(image, [model.spec.depth - 1])
        raw = torch.cat([features.prefix[0], features.grids[0].flatten(2).mT], 1)
        tokens = model.tokens(image)
        torch.testing.assert_close(tokens, model.backbone.net.norm(raw))
        order = torch.randperm(15).expand(2, -1)
        shuffled = model.tokens(image, keep=order)  # attention knows no order, positions go with the patches
    torch.testing.assert_close(shuffled[:, prefix:], tokens[:, prefix:][:, order[0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_patches_reach_nothing(family):
    model = adapted("explora", family)
    patch = model.spec.strides[0]
    image, keep = torch.randn(1, 3, 4 * patch, 4 * patch), torch.tensor([[0, 5, 9]])
    changed = image.clone()
    changed[:, :, 3 * patch :] = 100  # patches 12..15
    hidden = torch.zeros(1, 4, 4, dtype=torch.bool)
    hidden[:, 3] = True
    with torch.no_grad():
        assert torch.equal(model.tokens(image, keep=keep), model.tokens(changed, keep=keep))
        blank = Blank(hidden, torch.zeros(model.spec.embed_dim))
        assert torch.equal(model.tokens(image, blank=blank), model.tokens(changed, blank=blank))
        assert not torch.equal(model.tokens(image), model.tokens(changed))


def test_patches_that_cannot_be_hidden_are_one_line():
    with pytest.raises(UserError, match="attends within windows"):
        adapted("explora", "samvit").tokens(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="needs the whole grid"):
        adapted("earth").tokens(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["explora", "full"])
@pytest.mark.parametrize("make", [mae, dino])
def test_gradients_reach_all_that_is_trained(make, method, family):
    model = adapted(method, family)
    objective = make(model)
    loss = objective(model, batch(objective))["loss"]
    loss.backward()
    parts = [*model.adapters["main"].named_parameters(), *objective.named_parameters()]
    assert torch.isfinite(loss)
    assert [name for name, p in parts if p.requires_grad and p.grad is None] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("make", [mae, dino])
def test_a_sample_is_a_function_of_its_generator(make):
    objective = make(adapted("explora"))
    first, again, other = (
        objective.sample(torch.arange(3 * 40 * 40.0).view(3, 40, 40), np.random.default_rng(s), 0) for s in (1, 1, 2)
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_mae_hides_the_ratio_and_wants_hidden_patches_only():
    objective = mae(adapted("explora"), sizes=(64, 96))
    for epoch, tokens in ((0, 16), (1, 36)):
        sample = objective.sample(torch.randn(3, 96, 96), np.random.default_rng(0), epoch)
        assert len(sample["keep"]) == tokens // 4
        assert len(sample["wanted"]) == round(0.4 * tokens)
        assert not set(sample["keep"].tolist()) & set(sample["wanted"].tolist())
        assert sample["image"].shape == (3, *(int(tokens**0.5) * 16,) * 2)


def test_mae_targets_keep_brightness_and_normalise_pixels():
    patches = patchify(torch.rand(1, 3, 16, 16), 8)
    dark, bright = patch_targets(patches, 3), patch_targets(patches + 2, 3)
    # float32 variances of shifted values differ a little
    torch.testing.assert_close(dark[..., :-6], bright[..., :-6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bright[..., -6:-3] - dark[..., -6:-3], torch.full((1, 4, 3), 2.0))
    assert dark[..., :-6].square().mean() == pytest.approx(0.7, abs=0.2)  # unit variance less the floor of 0.05


def test_sincos_positions_are_distinct_and_bounded():
    table = sincos_positions(5, 7, 16)
    assert table.shape == (35, 16)
    assert table.abs().max() <= 1
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.1


def test_a_start_from_scratch_is_of_its_seed_and_keeps_prefix_positions_at_zero():
    first, again, other = (tiny_backbone("vit").net for _ in range(3))
    for net, seed in ((first, 1), (again, 1), (other, 2)):
        start_from_scratch(net, seed=seed)
    assert torch.equal(first.blocks[0].attn.qkv.weight, again.blocks[0].attn.qkv.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert not first.pos_embed[0, 0].any()
    torch.testing.assert_close(first.pos_embed[0, 1:], sincos_positions(14, 14, 32))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (mae, {"sizes": (60,)}, "60 is no multiple of the patch"),
        (mae, {"sizes": ()}, "give some multiples"),
        (mae, {"dim": 10}, "objective.dim=10"),
        (mae, {"mask_ratio": 1.0}, "mask_ratio=1.0"),
        (dino, {"large": 30}, "30 is no multiple"),
        (dino, {"momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_settings_out_of_range_are_one_line(make, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        make(adapted("explora"), **settings)
    assert "\n" not in str(caught.value)


def test_crops_lie_inside_and_keep_the_scale():
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64)
    spans = []
    for seed in range(40):
        crop = random_crop(ramp, 16, (1.0, 2.0), np.random.default_rng(seed))
        assert crop.shape == (1, 16, 16)
        assert 0 <= crop.min() <= crop.max() <= 1
        spans.append(float(crop.max() - crop.min()) * 63 / 15)  # ramp pixels for a crop's pixel
    assert 0.99 < min(spans) < 1.3
    assert 1.7 < max(spans) < 2.01


def test_block_masks_are_rectangles_of_at_most_the_count():
    draw = np.random.default_rng(0)
    counts = [block_mask(12, 12, n, draw).sum() for n in range(0, 73, 8)]
    assert all(n - 4 < c <= n for n, c in zip(range(0, 73, 8), counts, strict=True))
    assert not block_mask(12, 12, 3, draw).any()  # no rectangle of four fits


def test_sinkhorn_uses_all_prototypes_equally():
    logits = torch.randn(64, 8) * 0.3 + torch.tensor([1.0, *[0.0] * 7])  # all prefer the first
    assert F.softmax(logits / 0.1, -1).mean(0)[0] > 0.8
    targets = SinkhornKnopp(8, iterations=20)(logits, 0.1)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    torch.testing.assert_close(targets.mean(0), torch.full((8,), 1 / 8), rtol=0.05, atol=0)
    assert SinkhornKnopp(8)(logits[:0], 0.1).shape == (0, 8)


def test_a_standardised_head_tells_images_apart_whose_features_are_nearly_the_same():
    torch.manual_seed(0)
    alike = 3 * torch.randn(1, 16) + 0.01 * torch.randn(64, 16)  # a masked autoencoder's class tokens
    sizes = {"hidden": 32, "bottleneck": 8, "prototypes": 32}
    plain, awake = (
        entropy(SinkhornKnopp(32)(Projection(16, **sizes, standardise=s)(alike), 0.04)) for s in (False, True)
    )
    assert plain > 0.99 * math.log(32)
    assert awake < 0.9 * math.log(32)
    head = Projection(16, **sizes, standardise=True)
    assert [head(alike[:n]).shape for n in (0, 1)] == [(0, 32), (1, 32)]
    assert head(alike[:1]).isfinite().all()


def test_centring_takes_the_running_mean_away():
    centring = Centring(4, momentum=0.5)
    logits = torch.tensor([[1.0, 0, 0, 0], [0.8, 0, 0, 0]])
    first = centring(logits, 0.1)
    torch.testing.assert_close(first, F.softmax(logits / 0.1, -1))  # the centre moves afterwards
    torch.testing.assert_close(centring.centre, torch.tensor([0.45, 0, 0, 0]))
    assert centring(logits, 0.1)[0, 0] < first[0, 0]
    before = centring.centre.clone()
    centring(logits[:0], 0.1)
    assert torch.equal(centring.centre, before)


def test_koleo_spreads():
    close, far = torch.tensor([[1.0, 0.0], [1.0, 0.01]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert koleo(close) > 3
    assert koleo(far) == pytest.approx(-np.log(2), abs=1e-3)


def test_entropy_and_cross_entropy_against_torch():
    targets, logits = F.softmax(torch.randn(5, 7), -1), torch.randn(5, 7)
    torch.testing.assert_close(
        cross_entropy(targets, logits, 0.5), F.cross_entropy(logits / 0.5, targets, reduction="none")
    )
    torch.testing.assert_close(entropy(targets), torch.distributions.Categorical(targets).entropy().mean())


def test_the_teacher_follows_and_is_never_merged():
    model = adapted("explora")
    objective = dino(model, momentum=0.9)
    start = {k: v.clone() for k, v in model.adapters["teacher"].state_dict().items()}
    assert all(torch.equal(v, start[k]) for k, v in model.adapters["main"].state_dict().items())
    perturb(model)
    objective.after_step(model, 0, 10)
    for key, value in model.adapters["teacher"].state_dict().items():
        torch.testing.assert_close(value, 0.9 * start[key] + 0.1 * model.adapters["main"].state_dict()[key])
    teacher = {k: v.clone() for k, v in model.adapters["teacher"].state_dict().items()}
    merged = model.merge()
    assert model.active == ("main",)
    assert all(torch.equal(v, teacher[k]) for k, v in model.adapters["teacher"].state_dict().items())
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(model.tokens(image), merged.forward_features(image), rtol=1e-4, atol=1e-5)
    objective.after_step(model, 10, 10)  # at the end it stands still
    assert all(torch.equal(v, teacher[k]) for k, v in model.adapters["teacher"].state_dict().items())


def test_the_teacher_sees_what_is_hidden_from_the_student():
    model = adapted("explora")
    objective = dino(model)
    given = batch(objective)
    images, hidden = given["large"].flatten(0, 1), torch.ones_like(given["hidden"].flatten(0, 1))
    changed = images + torch.randn_like(images)
    targets = [objective._targets(model, i, hidden)["ibot"] for i in (images, changed)]
    assert not torch.equal(*targets)
    blank = Blank(hidden, objective.mask_token)
    assert torch.equal(model.tokens(images, blank=blank), model.tokens(changed, blank=blank))


def test_prototypes_stay_as_drawn_at_first():
    model = adapted("explora")
    objective = dino(model, freeze_last=0.5)
    for done, frozen in ((0.4, True), (0.6, False)):
        objective.progress.fill_(done)
        objective(model, batch(objective))["loss"].backward()
        objective.before_step()
        assert (objective.student["dino"].prototypes.grad is None) == frozen


@pytest.mark.parametrize(
    ("make", "settings", "figure", "factor"),
    [
        (mae, {}, "loss", 0.8),
        (dino, {"centring": "sinkhorn_knopp", "masked": 1.0}, "dino", 0.9),  # targets that stay varied
        (dino, {"centring": "sinkhorn_knopp", "masked": 1.0}, "ibot", 0.9),
    ],
)
def test_training_reduces_the_loss(make, settings, figure, factor):
    model = adapted("full")
    objective = make(model, **settings)
    trained = [p for p in [*model.trainable_parameters(), *objective.parameters()] if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, 2e-3)
    given, seen = batch(objective, count=6), []
    for step in range(40):
        figures = objective(model, given)
        optimiser.zero_grad()
        figures["loss"].backward()
        optimiser.step()
        objective.after_step(model, step, 40)
        seen.append(figures[figure].item())
    assert np.mean(seen[-5:]) < factor * np.mean(seen[:3]), seen
