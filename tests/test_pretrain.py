"""Masked-image modelling: masking, targets, one step, determinism, resume, the weights file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vfmadapt._mae import MaskedAutoencoder, patch_targets, random_split
from vfmadapt._mae_trainer import Plan, Trainer, fit, random_views
from vfmadapt.backbones import _mae_encoder
from vfmadapt.backbones._mae_encoder import MaskedViT, patchify, sincos_positions
from vfmadapt.build import compose
from vfmadapt.datasets import pretrain_synthetic
from vfmadapt.errors import UserError
from vfmadapt.pretrain import build_trainer, main, save_weights


def tiny_net(seed=0):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
    )


def tiny_pool(count=6, side=64):
    rows = np.linspace(0, 255, side)[None, :, None, None] * np.linspace(0.3, 1, count)[:, None, None, None]
    return np.broadcast_to(rows, (count, side, side, 3)).astype(np.uint8)


def tiny_plan(**changes):
    given = {"steps": 4, "minutes": None, "tokens": 128, "shards": 2, "sizes": (32, 48), "lr": 5e-3, "warmup": 2}
    return Plan(**{**given, "weight_decay": 0.05, "seed": 3, "save_seconds": 1e9, **changes})


def tiny_trainer(**changes):
    torch.manual_seed(0)
    model = MaskedAutoencoder(MaskedViT(tiny_net()), dim=16, depth=1, heads=2)
    return Trainer(model, tiny_pool(), tiny_plan(**changes), lambda cells: sincos_positions(cells, cells, 16))


def test_split_masks_the_ratio_and_is_a_permutation():
    visible, masked = random_split(5, 64, 0.75, torch.Generator().manual_seed(0))
    assert visible.shape == (5, 16)
    assert masked.shape == (5, 48)
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(64).expand(5, -1))
    assert not torch.equal(visible[0], visible[1])


def test_all_patches_visible_equals_timm():
    net = tiny_net()
    encoder = MaskedViT(net).eval()
    for height, width in ((32, 32), (48, 24)):  # its own grid, and one that resizes the position embedding
        image = torch.randn(2, 3, height, width)
        keep = torch.arange(height * width // 64).expand(2, -1)
        torch.testing.assert_close(encoder(image, keep), net.forward_features(image), rtol=1e-4, atol=1e-5)


def test_hidden_patches_do_not_reach_the_encoder():
    encoder = MaskedViT(tiny_net()).eval()
    image, keep = torch.randn(1, 3, 32, 32), torch.tensor([[0, 5, 9]])
    changed = image.clone()
    changed[:, :, 24:] = 100  # patches 12..15
    assert torch.equal(encoder(image, keep), encoder(changed, keep))
    changed[:, :, :8, :8] = 100  # patch 0
    assert not torch.equal(encoder(image, keep), encoder(changed, keep))


def test_targets_keep_brightness_and_normalise_pixels():
    patches = patchify(torch.rand(1, 3, 16, 16), 8)
    dark, bright = patch_targets(patches), patch_targets(patches + 2)
    # float32 variances of shifted values differ a little
    torch.testing.assert_close(dark[..., :-6], bright[..., :-6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bright[..., -6:-3] - dark[..., -6:-3], torch.full((1, 4, 3), 2.0))
    assert dark[..., :-6].square().mean() == pytest.approx(0.7, abs=0.2)  # unit variance less the floor of 0.05


def test_sincos_positions_are_distinct_and_bounded():
    table = sincos_positions(5, 7, 16)
    assert table.shape == (35, 16)
    assert table.abs().max() <= 1
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.1


def test_views_are_deterministic_normalised_and_inside():
    pictures = torch.from_numpy(tiny_pool().copy())
    first, again = (random_views(pictures, 32, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (6, 3, 32, 32)
    assert first.min() >= -1.5 - 1e-5  # (0 - 0.3) / 0.2
    assert first.max() <= 4.5 + 1e-5  # (1.2 - 0.3) / 0.2
    assert not torch.equal(first, random_views(pictures, 32, torch.Generator().manual_seed(2)))


def test_training_reduces_the_loss_and_moves_every_weight():
    trainer = tiny_trainer(steps=60, sizes=(32,))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    fit(trainer)
    losses = [row[1] for row in trainer.history]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_gradient_reaches_visible_patches_only():
    model = tiny_trainer().model
    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    keep = torch.tensor([[0, 1], [2, 3]])
    tokens = model.encoder(image, keep)
    (tokens * torch.randn_like(tokens)).sum().backward()  # a plain sum of normed tokens has no gradient
    touched = patchify(image.grad, 8).abs().sum(2) > 0
    assert touched.nonzero().tolist() == [[0, 0], [0, 1], [1, 2], [1, 3]]


def test_resumed_run_equals_an_unbroken_one(tmp_path):
    whole, first, second = tiny_trainer(), tiny_trainer(), tiny_trainer()
    fit(whole)
    for _ in range(2):
        first.train_step()
    torch.save(first.state(), tmp_path / "last.pt")
    second.load(torch.load(tmp_path / "last.pt", weights_only=True))
    fit(second)
    assert second.step == whole.step == 4
    assert [row[1] for row in second.history] == [row[1] for row in whole.history]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_schedule_ends_with_steps_or_minutes():
    plan = tiny_plan(steps=100, minutes=1.0)
    assert plan.progress(50, 0) == 0.5
    assert plan.progress(50, 45) == 0.75
    assert plan.progress(0, 61) == 1
    assert plan.rate(0, 0) == pytest.approx(plan.lr / 2)  # first of two warm-up steps
    assert plan.rate(50, 1.0) == pytest.approx(0, abs=1e-12)


def test_saved_weights_load_strictly_in_timm(tmp_path):
    encoder = MaskedViT(tiny_net())
    save_weights(encoder, tmp_path / "w.safetensors")
    tensors = load_file(tmp_path / "w.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    fresh = tiny_net(seed=1)
    fresh.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=True)
    image, keep = torch.randn(1, 3, 32, 32), torch.arange(16).expand(1, -1)
    # the weights were rounded to fp16
    torch.testing.assert_close(fresh.forward_features(image), encoder(image, keep), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_pictures_are_a_function_of_their_seed(seed):
    first, again, other = (pretrain_synthetic.render_picture(s) for s in (seed, seed, seed + 5))
    assert first.shape == (256, 256, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.std() > 3  # not one flat tone


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pool")


def test_pool_is_rendered_once_by_any_number_of_processes(pool_folder):
    pool = pretrain_synthetic.picture_pool(pool_folder, images=3, workers=2)
    assert pool.shape == (3, 256, 256, 3)
    assert np.array_equal(pool[2], pretrain_synthetic.render_picture(2))
    stamp = next(pool_folder.glob("*.npy")).stat().st_mtime_ns
    pretrain_synthetic.picture_pool(pool_folder, images=3, workers=1)
    assert [p.stat().st_mtime_ns for p in pool_folder.iterdir()] == [stamp]


def small_config(pool_folder, tmp_path, *overrides):
    cfg = compose("pretrain", [f"output={tmp_path / 'out'}", "minutes=null", "steps=2", "workers=1", *overrides])
    cfg.plan.tokens, cfg.plan.sizes = 128, [64]
    cfg.pool.folder, cfg.pool.images, cfg.pool.workers = str(pool_folder), 3, 1
    return cfg


def test_main_writes_weights_curve_and_result_and_continues(pool_folder, tmp_path):
    result = main(small_config(pool_folder, tmp_path))
    assert json.loads(json.dumps(result)).keys() == {
        "weights", "steps", "images", "seconds", "loss", "first_loss", "parameters"
    }  # fmt: skip
    assert result["parameters"] == 4_854_528
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"last.pt", "weights.safetensors", "loss.csv", "loss.png"}
    assert (out / "weights.safetensors").stat().st_size < 12e6
    assert main(small_config(pool_folder, tmp_path, "steps=3"))["steps"] == 3
    with pytest.raises(UserError, match="seed=5"):
        main(small_config(pool_folder, tmp_path, "seed=5"))


def test_bad_settings_are_user_errors(pool_folder, tmp_path):
    with pytest.raises(UserError, match="objective=jepa"):
        build_trainer(small_config(pool_folder, tmp_path, "objective=jepa"))
    with pytest.raises(UserError, match="workers=3: 1 to 2"):
        build_trainer(small_config(pool_folder, tmp_path, "workers=3"))
    cfg = small_config(pool_folder, tmp_path)
    cfg.plan.sizes = [60]
    with pytest.raises(UserError, match="60 is no multiple"):
        build_trainer(cfg)


def test_two_processes_equal_one(pool_folder, tmp_path):
    results = []
    for workers in (1, 2):
        cfg = small_config(pool_folder, tmp_path / str(workers))
        cfg.workers = workers
        main(cfg)
        results.append(load_file(Path(cfg.output) / "weights.safetensors"))
    for name, value in results[0].items():
        # sums in another order, then Adam
        torch.testing.assert_close(value, results[1][name], rtol=1e-2, atol=2e-3, msg=name)


def test_shipped_weights_fit_the_package():
    path = Path(_mae_encoder.__file__).parent / "weights" / "vfm_tiny@1.safetensors"
    assert path.stat().st_size <= 12e6
    assert all(bool(torch.isfinite(t.float()).all()) for t in load_file(path).values())
