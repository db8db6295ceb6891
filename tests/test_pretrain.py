"""Continued pre-training: a run end to end, resume, merged weights, two processes, collapse and bad losses."""

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vfmadapt.build import build_backbone, compose, instantiate, names, plain
from vfmadapt.datasets import pretrain_synthetic
from vfmadapt.errors import UserError
from vfmadapt.objectives.objective import Objective
from vfmadapt.pretrain import backbone_of, main
from vfmadapt.tasks.pretraining import PretrainingModel
from vfmadapt.tasks.watch import FeatureWatch, effective_rank, principal_colours

ROOT = Path(__file__).resolve().parents[1]
RGB = ("red", "green", "blue")
NET = "{embed_dim: 32, depth: 3, num_heads: 2, img_size: 32, patch_size: 8}"
TINY = {
    "mae": ["objective=mae", "objective.sizes=[32,48]", "objective.dim=16", "objective.depth=1", "objective.heads=2"],
    "dinov2": ["objective=dinov2", "objective.large=32", "objective.small=16", "objective.crops=2",
               "objective.hidden=16", "objective.bottleneck=8", "objective.prototypes=32"],
}  # fmt: skip


def overrides(folder, output, *more, objective="mae", steps=4):
    return [
        "data=unlabelled", f"data.root={folder}", f"output={output}", "loader.batch_size=4", "loader.steps_per_epoch=2",
        f"epochs={steps // 2}", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1",
        "backbone=timm", "backbone.name=vit_tiny_patch16_224", "backbone.pretrained=false", f"backbone.settings={NET}",
        "adapter.rank=4", *TINY[objective], *more,
    ]  # fmt: skip


def config(*args, **kwargs):
    return compose("pretrain", overrides(*args, **kwargs))


def pictures(folder, count=6, bands=3):
    draw = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i in range(count):
        coarse = draw.integers(0, 255, (10, 12, bands), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(coarse if bands == 3 else coarse[..., 0]).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module", params=["mae", "dinov2"])
def finished(request, folder, tmp_path_factory):
    run = tmp_path_factory.mktemp(request.param)
    return request.param, run, main(config(folder, run, objective=request.param))


def test_a_run_leaves_weights_curves_pictures_and_logs(finished):
    objective, run, result = finished
    assert json.loads(json.dumps(result)).keys() == {
        "weights", "trainable", "steps", "seconds", "first_loss", "loss", "first_rank", "rank", "skipped", "run"
    }  # fmt: skip
    assert result["steps"] == 4
    assert {p.name for p in run.iterdir()} == {
        "weights.safetensors", "losses.csv", "curves.png", "features", "checkpoints", "logs", "tensorboard",
        "pretrain.json",
    }  # fmt: skip
    assert [p.name for p in sorted((run / "features").iterdir())] == ["000000.png", "000002.png", "000004.png"]
    with (run / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    wanted = {"mae": {"train/pixels"}, "dinov2": {"train/teacher_entropy", "train/prototypes_used", "train/koleo"}}
    assert wanted[objective] <= rows[0].keys()


def test_tensorboard_has_figures_and_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run, result = finished
    (events,) = (run / "tensorboard").rglob("events*")
    seen = EventAccumulator(str(events)).Reload()
    assert "features" in seen.Tags()["images"]
    ranks = [event.value for event in seen.Scalars("feature_rank")]
    assert ranks == pytest.approx([result["first_rank"], *ranks[1:-1], result["rank"]])


def test_the_weights_are_a_plain_checkpoint_for_other_tools(finished, folder, tmp_path):
    objective, run, _ = finished
    cfg = config(folder, tmp_path, objective=objective)
    plain_node = {**plain(cfg.backbone), "pretrained": None, "weights": str(run / "weights.safetensors")}
    frozen = build_backbone(plain_node, {"_target_": "vfmadapt.adapters.frozen.Frozen"}, RGB)
    trained = backbone_of(cfg, RGB)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained.load_adapter_state({k: v for k, v in state.items() if k.startswith("adapters.main.")})
    image = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        torch.testing.assert_close(frozen(image, [2]).grids[0], trained(image, [2]).grids[0], rtol=1e-4, atol=1e-5)
        before = backbone_of(cfg, RGB)(image, [2]).grids[0]
    assert (frozen(image, [2]).grids[0] - before).abs().max() > 1e-3


def test_a_loss_that_is_not_finite_stops_and_the_resumed_run_equals_an_unbroken_one(
    finished, folder, tmp_path, monkeypatch
):
    objective, run, result = finished
    forward, calls = PretrainingModel.forward, []

    def broken(self, batch):
        calls.append(0)
        figures = forward(self, batch)
        return figures | {"loss": figures["loss"] * (float("nan") if len(calls) == 4 else 1)}

    monkeypatch.setattr(PretrainingModel, "forward", broken)
    with pytest.raises(UserError, match=r"the loss is nan at step 3; .*last\.ckpt holds the last whole epoch") as error:
        main(config(folder, tmp_path, objective=objective))
    assert "\n" not in str(error.value)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert all(torch.isfinite(v).all() for v in state["state_dict"].values())
    again = main(config(folder, tmp_path, "resume=true", objective=objective))
    assert again["steps"] == 4
    whole, parts = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, tmp_path))
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    assert (run / "losses.csv").read_text() == (tmp_path / "losses.csv").read_text()
    assert again["first_rank"] == result["first_rank"]


@pytest.mark.parametrize("objective", TINY)
def test_a_backbone_stays_while_what_is_new_settles(folder, tmp_path, objective):
    states = {}
    for settle in (0.5, 0.99):  # of three steps: two, or all
        run = tmp_path / str(settle)
        main(config(folder, run, f"task.settle={settle}", "loader.steps_per_epoch=3", "epochs=1", objective=objective))
        states[settle] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    torch.manual_seed(0)  # that of the runs
    start = backbone_of(config(folder, tmp_path, objective=objective), RGB).adapter_state()
    for name, value in start.items():
        assert torch.equal(states[0.99][name], value), name
    assert any(not torch.equal(states[0.5][name], value) for name, value in start.items())
    assert any(not torch.equal(states[0.5][n], v) for n, v in states[0.99].items() if n.startswith("objective."))


def test_bands_that_are_not_colours_leave_the_first_layer_alone(tmp_path, write_tiff):
    draw = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(3):
        write_tiff(
            tmp_path / "in" / f"{i}.tif", draw.random((5, 64, 64), dtype=np.float32), descriptions=tuple("abcde")
        )
    result = main(config(tmp_path / "in", tmp_path / "out", steps=2))
    saved = load_file(result["weights"])
    cfg = config(tmp_path / "in", tmp_path / "out")
    start = backbone_of(cfg, RGB).backbone.net.state_dict()
    assert saved.keys() == start.keys()
    assert torch.equal(saved["patch_embed.proj.weight"], start["patch_embed.proj.weight"])
    assert not torch.equal(saved["blocks.2.mlp.fc1.weight"], start["blocks.2.mlp.fc1.weight"])
    given = [o for o in overrides(tmp_path / "in", tmp_path / "out") if o != "adapter.rank=4"]
    with pytest.raises(UserError, match="method=full trains the first layer for the bands a, b"):
        main(compose("pretrain", [*given, "method=full"]))


def test_the_methods_have_about_as_many_parameters():
    counts = {}
    for method in ("explora", "lora", "full"):
        cfg = compose("pretrain", [f"method={method}", "data.root=."])
        made = backbone_of(cfg, RGB)
        counts[method] = sum(p.numel() for p in made.trainable_parameters())
    assert counts["explora"] == 1_117_440
    assert abs(counts["lora"] / counts["explora"] - 1) < 0.001
    assert counts["full"] == 4_854_528


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(folder, tmp_path, monkeypatch):
    forward = PretrainingModel.forward

    def broken(self, batch):
        token = self.objective.mask_token
        distance = (token - token.detach()).square().sum().sqrt()  # 0, its gradient not a number
        figures = forward(self, batch)
        return figures | {"loss": figures["loss"] + distance}

    monkeypatch.setattr(PretrainingModel, "forward", broken)
    with pytest.raises(UserError, match="the gradient's norm is nan at step 0; no epoch was finished"):
        main(config(folder, tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.root=/nowhere"], "no such folder"),
        (["objective.sizes=[96]"], "every image is smaller than a crop of 96 pixels, the largest has 80"),
        (["loader.batch_size=0"], "batch_size=0"),
        (["resume=true"], "there is no"),
        (["+backbone.train_patch_embed=true"], "train_patch_embed=true"),
        (["trainer.max_steps=4"], "set epochs="),
        (["scratch=true"], "add method=full"),
        (["task.lr=-1"], "task.lr=-1"),
        (["task.settle=1"], "task.settle=1"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as error:
        main(config(folder, tmp_path / "run", *more))
    assert "\n" not in str(error.value)


def test_without_a_folder_the_line_says_what_to_write(tmp_path):
    with pytest.raises(UserError, match=r"data\.root is missing; write data\.root=FOLDER"):
        main(compose("pretrain", [f"output={tmp_path}"]))


def test_dinov2_needs_two_images(folder, tmp_path):
    with pytest.raises(UserError, match="needs 2 images per step"):
        main(config(folder, tmp_path, "loader.batch_size=1", objective="dinov2"))


def test_effective_rank_and_colours():
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.eye(8).repeat(5, 1)) == pytest.approx(8, abs=1e-3)
    grids = torch.zeros(2, 4, 4, 8)
    grids[1, ..., 0] = 1
    shown = principal_colours(grids)
    assert shown.shape == (2, 4, 4, 3)
    assert (shown[0, ..., 0] == 0).all()
    assert (shown[1, ..., 0] == 255).all()


def test_collapse_is_told(tmp_path, caplog):
    watch = FeatureWatch(tmp_path, side=32)
    watch.ranks, watch.steps = [(0, 40.0), (50, 5.0)], [{"step": 50}]
    with caplog.at_level(logging.WARNING):
        watch._warn(Objective())
    assert "step 50: the features collapse, their rank fell from 40.0 to 5.0" in caplog.text


@pytest.mark.parametrize(
    ("entropy", "used", "message"),
    [(3.46, 30, "uniform"), (0.1, 1.01, "one prototype"), (1.5, 20, None)],  # of 32 prototypes: at most 3.47
)
def test_a_teacher_that_teaches_nothing_is_told(folder, tmp_path, caplog, entropy, used, message):
    cfg = config(folder, tmp_path, objective="dinov2")
    objective = instantiate(cfg.objective, backbone_of(cfg, RGB), packages=("vfmadapt.objectives.",))
    watch = FeatureWatch(tmp_path, side=32)
    watch.ranks = [(0, 40.0), (50, 39.0)]
    watch.steps = [{"step": 50, "train/teacher_entropy": entropy, "train/prototypes_used": used}]
    with caplog.at_level(logging.WARNING):
        watch._warn(objective)
        assert not caplog.text  # heads are random at first
        objective.progress.fill_(0.5)
        watch._warn(objective)
    assert message in caplog.text if message else not caplog.text


@pytest.mark.parametrize("objective", ["mae", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_twice_the_batch(folder, tmp_path, objective):
    """DINOv2's must run, no more: its spread of features and its shares of prototypes are of a process's own batch."""
    more = ["trainer=ddp", "loader.batch_size=2", "format=json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "pretrain.py"),
         *overrides(folder, tmp_path / "two", *more, objective=objective)],
        capture_output=True, text=True, cwd=tmp_path, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # one of the processes speaks
    result = json.loads(done.stdout)
    assert result["steps"] == 4
    assert np.isfinite(result["loss"])
    if objective == "mae":
        one, two = (load_file(w) for w in (main(config(folder, tmp_path / "one"))["weights"], result["weights"]))
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=1e-2, atol=1e-3, msg=name)  # other order, then Adam


@pytest.mark.parametrize("group", ["method", "objective", "recipe"])
def test_every_entry_composes(group):
    assert all(compose("pretrain", [f"{group}={name}"]) for name in names(group))


@pytest.mark.parametrize("recipe", names("recipe"))
def test_the_recipes_train(tmp_path, recipe):
    """The pictures and settings of conf/recipe, less of them."""
    small = ["data.images=2", "data.workers=1", "loader.batch_size=2", "epochs=1", "loader.steps_per_epoch=1"]
    small += [f"data.root={tmp_path / 'pool'}", f"output={tmp_path / 'run'}"]
    objective = compose("pretrain", [f"recipe={recipe}"]).objective
    small += ["objective.sizes=[32]"] if "sizes" in objective else ["objective.large=32", "objective.small=16"]
    result = main(compose("pretrain", [f"recipe={recipe}", *small]))
    tensors = load_file(result["weights"])
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert Path(result["weights"]).stat().st_size < 12e6
    assert sum(t.numel() for t in tensors.values()) == 4_854_528
    assert result["trainable"] == {"vfm_tiny": 4_854_528, "vfm_tiny_2": 1_117_440}[recipe]


@pytest.mark.parametrize("kind", pretrain_synthetic._KINDS)
def test_pictures_are_a_function_of_their_seed(kind):
    first, again, other = (pretrain_synthetic.render_picture(s, (kind,)) for s in (3, 3, 8))
    assert first.shape == (256, 256, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.std() > 3  # not one flat tone


def test_pool_is_rendered_once_by_any_number_of_processes(tmp_path):
    pool = pretrain_synthetic.picture_pool(tmp_path, images=3, workers=2)
    assert pool.shape == (3, 256, 256, 3)
    assert np.array_equal(pool[2], pretrain_synthetic.render_picture(2))
    stamp = next(tmp_path.glob("*.npy")).stat().st_mtime_ns
    pretrain_synthetic.picture_pool(tmp_path, images=3, workers=1)
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [stamp]


def test_pools_of_other_kinds_are_other_files(tmp_path):
    pools = [pretrain_synthetic.picture_pool(tmp_path, images=2, kinds=k, workers=1) for k in (("map",), ("medical",))]
    assert not np.array_equal(*pools)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="kinds names zebra; there are satellite, medical"):
        pretrain_synthetic.picture_pool(tmp_path, kinds=("map", "zebra"))


@pytest.mark.parametrize("version", [1, 2])
def test_shipped_weights_fit_the_package(version):
    path = ROOT / "vfmadapt" / "backbones" / "weights" / f"vfm_tiny@{version}.safetensors"
    assert path.stat().st_size <= 12e6
    assert all(bool(torch.isfinite(t.float()).all()) for t in load_file(path).values())
