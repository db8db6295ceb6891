"""The tools train and evaluate, end to end on tiny settings."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

import vfmadapt
from vfmadapt import evaluate, load, load_many, train
from vfmadapt.build import build_model, compose, names
from vfmadapt.errors import UserError
from vfmadapt.raster.scoring import D4Mean
from vfmadapt.tasks.segmentation import SegmentationTask

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    rng = np.random.default_rng(0)
    image = gaussian_filter(rng.normal(size=(16, 40, 56, 3)), (0, 4, 4, 0))
    image = (0.4 + 0.2 * image / image.std()).astype(np.float32)
    mask = (image.mean(-1) > 0.4).astype(np.uint8)
    mask[:, :4] = 255
    path = tmp_path_factory.mktemp("data") / "stack.npz"
    np.savez(path, image=image, mask=mask)
    return path


def overrides(stack, output, *more, tool="train"):
    tiny = [
        f"+backbone.settings.{k}={v}" for k, v in (("embed_dim", 32), ("depth", 2), ("num_heads", 2), ("patch_size", 8))
    ]
    model = ["backbone=timm", "backbone.name=vit_tiny_patch16_224", "backbone.pretrained=false", *tiny, "adapter.dim=4"]
    run = [
        "loader.crop=24",
        "loader.batch_size=2",
        "loader.steps_per_epoch=3",
        "trainer.max_steps=-1",
        "trainer.max_epochs=4",
    ]
    head = [] if any(m.startswith("head=") for m in more) else ["head=linear"]
    settings = ["trainer.accelerator=cpu", *model, *head, *run] if tool == "train" else []
    return ["data=npz_stack", f"data.path={stack}", f"output={output}", *settings, *more]


def config(*args, tool="train"):
    return compose(tool, overrides(*args, tool=tool))


@pytest.fixture(scope="module")
def unbroken(stack, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    return train.main(config(stack, output))


def last(run):
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)


def test_result_and_files(unbroken, stack):
    json.dumps(unbroken, allow_nan=False)
    assert 0 <= unbroken["miou"] <= 1
    assert set(unbroken["iou"]) == {"background", "foreground"}
    run = vfmadapt.checkpoint.Path(unbroken["run"])
    assert json.loads((run / "metrics.json").read_text()) == unbroken
    assert len(unbroken["previews"]) == 4  # as many as there are test frames
    assert all((run / "previews" / p.split("/")[-1]).is_file() for p in unbroken["previews"])
    assert list((run / "tensorboard").rglob("events*"))
    rows = list(csv.DictReader((run / "logs" / "version_0" / "metrics.csv").open()))
    assert sum(bool(r["val/miou"]) for r in rows) == 4
    assert unbroken["steps"] == 12
    tensors = load_file(unbroken["adapter_file"])
    assert sum(t.numel() for t in tensors.values()) >= unbroken["trainable"]
    assert unbroken["adapter_bytes"] < 40_000  # the frozen tensors alone would be 100 kB


def test_best_epoch_is_kept(unbroken):
    best = torch.load(f"{unbroken['run']}/checkpoints/best.ckpt", weights_only=True)
    saved = load_file(unbroken["adapter_file"])
    assert saved.keys() == best["state_dict"].keys()
    assert all(torch.equal(saved[k], v) for k, v in best["state_dict"].items())


def with_dropout(cfg, spec):
    """Dropout draws from torch's own generator: its state must be the same after a resume."""
    model = build_model(cfg, spec)
    model.head.classifier = torch.nn.Sequential(torch.nn.Dropout(0.5), model.head.classifier)
    return model


@pytest.mark.parametrize(
    "length",
    [
        ["trainer.max_epochs=4"],
        ["trainer.max_steps=12", "trainer.max_epochs=-1"],
        ["trainer.max_epochs=4", "task.optimizer=muon"],
    ],
    ids=["epochs", "steps", "muon"],
)
def test_resume_continues_exactly(stack, tmp_path, monkeypatch, length):
    monkeypatch.setattr(train, "build_model", with_dropout)
    whole = train.main(config(stack, tmp_path / "whole", *length))
    start_epoch = SegmentationTask.on_train_epoch_start

    def interrupt(self):
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        start_epoch(self)

    with monkeypatch.context() as patched:
        patched.setattr(SegmentationTask, "on_train_epoch_start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main(config(stack, tmp_path / "broken", *length))
    assert last(tmp_path / "broken")["global_step"] == 6
    torch.manual_seed(99)
    resumed = train.main(config(stack, tmp_path / "broken", *length, "resume=true"))
    one, other = last(whole["run"]), last(resumed["run"])
    assert one["global_step"] == other["global_step"] == 12
    assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    moments, others = (c["optimizer_states"][0]["state"] for c in (one, other))
    assert all(torch.equal(moments[i][k], others[i][k]) for i in moments for k in moments[i])
    assert {k: v for k, v in whole.items() if k in ("miou", "iou", "f1")} == {
        k: resumed[k] for k in ("miou", "iou", "f1")
    }


def test_same_seed_same_bytes_other_seed_other(unbroken, stack, tmp_path):
    again = train.main(config(stack, tmp_path / "again"))
    one, other = load_file(unbroken["adapter_file"]), load_file(again["adapter_file"])
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert again["miou"] == unbroken["miou"]
    different = load_file(
        train.main(config(stack, tmp_path / "other", "seed=1", "trainer.max_epochs=1"))["adapter_file"]
    )
    assert any(not torch.equal(one[k], different[k]) for k in one)


def test_settings_of_the_trainer_are_reached(stack, tmp_path):
    keys = [
        "trainer.precision=bf16-mixed",
        "trainer.accumulate_grad_batches=2",
        "backbone.gradient_checkpointing=true",
        "head=fpn",
    ]
    result = train.main(
        config(stack, tmp_path, *keys, "early_stop=0", "trainer.max_epochs=50", "task.lr=1e-9", "previews=1")
    )
    assert result["steps"] < 20  # a rate of 1e-9 improves nothing, so training ends early
    assert len(result["previews"]) == 1


def test_debug_preset_runs_one_batch(stack, tmp_path):
    result = train.main(config(stack, tmp_path, "debug=fast"))
    assert result["steps"] == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["resume=true"], "last.ckpt"),
        (["task.optimizer=sgd"], "optimizer=sgd"),
        (["resume=/nowhere.ckpt"], "/nowhere.ckpt"),
        (["trainer.precision=12"], "trainer"),
        (["trainer.max_epochs=-1"], "max_steps"),
        (["+trainer.horses=1"], "horses"),
    ],
)
def test_errors_are_one_line(stack, tmp_path, keys, words):
    with pytest.raises(UserError, match=words) as raised:
        train.main(config(stack, tmp_path, *keys))
    assert "\n" not in str(raised.value)


def test_resume_with_another_model_is_refused(unbroken, stack, tmp_path):
    checkpoint = f"{unbroken['run']}/checkpoints/last.ckpt"
    with pytest.raises(UserError, match="does not fit"):
        train.main(config(stack, tmp_path, f"resume={checkpoint}", "head=fpn"))


def test_run_folder_by_task_and_adapter(stack):
    cfg = config(stack, "null")
    assert str(train.run_folder(cfg)) == "runs/train/cloudseg-earth"


def test_evaluate_gives_what_training_gave(unbroken, stack, tmp_path):
    result = evaluate.main(
        config(stack, tmp_path, f"adapter_file={unbroken['adapter_file']}", "device=cpu", tool="evaluate")
    )
    for key in ("miou", "iou", "f1", "accuracy", "boundary_f1"):
        assert result[key] == pytest.approx(unbroken[key])
    assert result["images"] == 4
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert len(list((tmp_path / "previews").glob("*.png"))) == 4


def test_evaluate_averages_over_turned_images(unbroken, stack):
    """The mean over all eight is the same for turned images, so the counts are."""
    file = f"adapter_file={unbroken['adapter_file']}"
    settings = ("null", file, "device=cpu")
    plain, averaged = (evaluate.main(config(stack, *settings, f"tta={tta}", tool="evaluate")) for tta in ("null", "d4"))
    assert averaged["iou"] != plain["iou"]
    model = D4Mean(load(unbroken["adapter_file"])).eval()
    image, valid = torch.rand(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        turned = model(image.rot90(1, (2, 3)), valid.rot90(1, (1, 2)))
        torch.testing.assert_close(turned, model(image, valid).rot90(1, (2, 3)), atol=1e-4, rtol=1e-4)


def test_evaluate_refuses_what_does_not_fit(unbroken, stack):
    def run(*keys):
        evaluate.main(config(stack, "null", "device=cpu", *keys, tool="evaluate"))

    file = f"adapter_file={unbroken['adapter_file']}"
    with pytest.raises(UserError, match="adapter_file"):
        run()
    with pytest.raises(UserError, match="no such"):
        run("adapter_file=/nowhere.safetensors")
    with pytest.raises(UserError, match="bands"):
        run(file, "data.bands=[x,y,z]")
    with pytest.raises(UserError, match="classes"):
        run(file, "data.classes=[a,b]")
    with pytest.raises(UserError, match="tta=d8: allowed are d4"):
        run(file, "tta=d8")
    with pytest.raises(UserError, match="device"):
        run(file, "device=horse")


def test_evaluate_reads_a_folder_with_the_models_bands_and_classes(unbroken):
    header = vfmadapt.checkpoint.read_header(unbroken["adapter_file"])
    cfg = compose("evaluate", ["data=geotiff_folder", "data.root=/somewhere"])
    filled = evaluate.as_trained(cfg, header["data"])
    assert list(filled.data.bands) == ["band1", "band2", "band3"]
    assert [c.name for c in filled.data.classes] == ["background", "foreground"]
    assert cfg.data.bands is None
    own = compose("evaluate", ["data=geotiff_folder", "data.root=/somewhere", "data.bands=[x]"])
    assert list(evaluate.as_trained(own, header["data"]).data.bands) == ["x"]


@pytest.mark.parametrize("group", ["task", "trainer", "debug", "head"])
def test_every_entry_composes(group):
    assert all(compose("train", [f"{group}={name}"]) for name in names(group))
    assert names(group)


DATA = {
    "cloudseg": "clouds_synthetic",
    "depth": "endo_synthetic",
    "landcover": "landcover_synthetic",
    "maps": "maps_synthetic",
    "medseg": "organs_synthetic",
    "multitask": "solids_synthetic",
    "promptable": "maps_synthetic",
    "regression": "height_synthetic",
    "segmentation": "clouds_synthetic",
    "self_depth": "endo_synthetic",
    "tracking": "cine_synthetic",
    "urban": "urban_synthetic",
}


@pytest.mark.parametrize("task", names("task"))
def test_a_task_alone_chooses_data_that_it_is_for(task):
    cfg = compose("train", [f"task={task}"])
    assert cfg.task.name == task
    assert cfg.data == compose("train", [f"task={task}", f"data={DATA[task]}"]).data


@pytest.mark.parametrize("task", names("task"))
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_named_beside_a_task_is_kept(task, order):
    chosen = ["data=npz_stack", "head=segformer", "adapter=lora", f"task={task}", "augment.flips=false"]
    cfg, alone = (compose("train", named) for named in (chosen[::order], chosen[:3]))
    assert [cfg[part]._target_ for part in ("data", "head")] == [alone[part]._target_ for part in ("data", "head")]
    assert (cfg.adapter, cfg.augment.flips) == (alone.adapter, False)


def test_impossible_values_are_one_line(stack, tmp_path):
    for key in ("seed=-1", "loader.batch_size=0", "augment.scale=[2,1]", "task.schedule=step"):
        with pytest.raises(UserError, match=key.split("=")[0].split(".")[-1]) as raised:
            train.main(config(stack, tmp_path, key))
        assert "\n" not in str(raised.value)


@pytest.mark.slow  # two processes, one after the other, import everything
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    """Cross-entropy alone, every pixel labelled: there the mean over a batch is the mean of the means of its halves."""
    rng = np.random.default_rng(0)
    image = gaussian_filter(rng.normal(size=(24, 40, 40, 3)), (0, 4, 4, 0)).astype(np.float32)
    np.savez(tmp_path / "stack.npz", image=image, mask=(image.mean(-1) > 0).astype(np.uint8))  # 3 images in val
    keys = ["task.dice_weight=0", "augment.scale=[1,1]", "loader.steps_per_epoch=2", "trainer.max_epochs=2"]
    given = overrides(tmp_path / "stack.npz", "two", *keys, "trainer=ddp", "format=json")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train.py"), *given],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # one of the processes speaks
    assert done.stderr.count("test split of") == 1
    result, run = json.loads(done.stdout), tmp_path / "two"
    assert json.loads((run / "metrics.json").read_text()) == result
    assert [p.name for p in (run / "logs").iterdir()] == ["version_0"]
    one = train.main(config(tmp_path / "stack.npz", tmp_path / "one", *keys, "loader.batch_size=4"))
    assert result["steps"] == one["steps"] == 4
    steps = [last(folder) for folder in (run, tmp_path / "one")]
    for key, value in steps[1]["state_dict"].items():
        torch.testing.assert_close(steps[0]["state_dict"][key], value, rtol=1e-3, atol=1e-4)
    saved, best = (
        load_file(run / "adapter.safetensors"),
        torch.load(run / "checkpoints" / "best.ckpt", weights_only=True),
    )
    assert all(torch.equal(saved[k], v) for k, v in best["state_dict"].items())
    found = evaluate.main(
        config(
            tmp_path / "stack.npz", "null", f"adapter_file={run / 'adapter.safetensors'}", "split=val", tool="evaluate"
        )
    )
    logged = [
        r["val/miou"] for r in csv.DictReader((run / "logs" / "version_0" / "metrics.csv").open()) if r["val/miou"]
    ]
    assert found["miou"] == pytest.approx(max(map(float, logged)))  # though the processes had two images and one


def test_fewer_images_than_processes_is_one_line(stack, monkeypatch):
    cfg = config(stack, "null")
    data = train.make_data(cfg, train.data_source(cfg))
    assert len(data.val_dataloader()) == 2
    monkeypatch.setattr("vfmadapt.tasks.data._processes", lambda: (0, 3))
    with pytest.raises(UserError, match=r"val split holds 2 images for 3 processes.*trainer.devices"):
        data.val_dataloader()


def test_a_head_in_the_blocks_trains_by_its_own_loss(unbroken, stack, tmp_path):
    """Its binding to masks has faded at the end; its file maps as the model did, alone and beside another one's."""
    result = train.main(config(stack, tmp_path, "head=eomt", "head.queries=4", "head.blocks=1", "trainer.max_epochs=1"))
    model = load(result["adapter_file"])
    assert model.head.shares.tolist() == [0]
    assert model.backbone.active == ("main", "head")
    image = torch.rand(2, 3, 24, 40)
    bank = load_many({"masks": result["adapter_file"], "labels": unbroken["adapter_file"]})
    together = bank.in_turn(image)
    assert torch.equal(together[0], model(image))
    assert torch.equal(together[1], load(unbroken["adapter_file"])(image))
    with pytest.raises(UserError, match="masks/head changes the sequence's length"):
        bank.each(image)
