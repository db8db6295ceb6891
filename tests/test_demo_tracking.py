"""The tracker's training from random weights and the demo, at tiny sizes: their keys, their files, going on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vfmadapt import demo_tracking, pretrain_tracker, train
from vfmadapt.backbones import sam2_video
from vfmadapt.build import build_tracker, compose, entry, instantiate
from vfmadapt.datasets._cine_parts import LABEL
from vfmadapt.datasets._cine_scene import render_clip
from vfmadapt.datasets._tiles import tile_seed
from vfmadapt.errors import UserError
from vfmadapt.frames.array import ArrayClip
from vfmadapt.testing_tracking import SPEC
from vfmadapt.tracking.prompts import Prompt
from vfmadapt.tracking.tracker import track
from vfmadapt.tracking_metrics import dice

TINY = ["data.train=2", "data.val=1", "data.test=1", "data.size=64", "data.frames=3", "data.workers=1"]
TINY += ["loader.steps_per_epoch=1", "previews=1", "backbone.trunk.blocks=[1,1,1,1]", "backbone.trunk.width=16"]
STAGE = ["size=64", "clip=2", "batch_size=1", "objects=1", "steps=1"]
SMALL = ["backbone.size=64", "loader.clip=2", "loader.batch_size=1", "trainer.max_steps=1"]
LATER = ("clips", "absence", "whole", "longer", "memory")
PRETRAIN = [*(f"stages.carry.{setting}" for setting in STAGE), *(f"~stages.{name}" for name in LATER)]
PRETRAIN += ["train=" + json.dumps([*TINY, "data.styles=[echo]"], separators=(",", ":"))]


def quoted(overrides: list[str]) -> str:
    return f"[{','.join(map(repr, overrides))}]"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tracker")
    settings = [
        f"output={folder / 'out'}",
        f"data_root={folder}",
        f"train={quoted([*TINY, 'data.styles=[cardiac]'])}",
        "~stages.absence",
        "~stages.whole",
        "~stages.longer",
        "~stages.memory",
        *(f"stages.{name}.{setting}" for name in ("carry", "clips") for setting in STAGE),
        "stages.clips.steps=2",
    ]
    return settings, pretrain_tracker.main(compose("pretrain_tracker", settings))


def test_stages_follow_one_another(pretrained: tuple[list[str], dict[str, Any]]) -> None:
    settings, result = pretrained
    assert {name: stage["steps"] for name, stage in result["stages"].items()} == {"carry": 1, "clips": 2}
    second = load_file(result["weights"])
    first = load_file(Path(result["weights"]).parents[1] / "carry" / "weights.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in second.values())
    moved = [float((second[name].float() - first[name].float()).abs().max()) for name in first]
    assert 0 < max(moved) < 0.05  # the second started where the first had ended
    assert pretrain_tracker.main(compose("pretrain_tracker", settings))["stages"] == {}  # nothing is left to train


def test_a_stage_goes_on_from_its_last_epoch(pretrained: tuple[list[str], dict[str, Any]]) -> None:
    settings, result = pretrained
    Path(result["weights"]).unlink()  # as if it had been stopped
    last = Path(result["weights"]).parent / "checkpoints" / "last.ckpt"
    before = torch.load(last, weights_only=True)["global_step"]
    again = pretrain_tracker.main(compose("pretrain_tracker", [*settings[:-1], "stages.clips.steps=3"]))
    assert (before, again["stages"]["clips"]["steps"], len(again["stages"])) == (2, 3, 1)


def test_each_stage_is_trained_with_its_own_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def seen(cfg: Any) -> dict[str, Any]:
        seeds.append(cfg.seed)
        return {"steps": 0, "dice": None, "adapter_file": ""}

    monkeypatch.setattr(train, "main", seen)
    monkeypatch.setattr(pretrain_tracker, "write_weights", lambda file, path: None)
    settings = [f"output={tmp_path}", f"data_root={tmp_path}", "stages.clips.seed=7"]
    pretrain_tracker.main(compose("pretrain_tracker", settings))
    assert seeds == [0, 7, 0, 0, 1, 2]  # the last two as those of the package's weights


def test_impossible_stages() -> None:
    none = [f"~stages.{name}" for name in ("carry", *LATER)]
    for settings, line in ((none, "stages is empty"), (["~stages.carry.lr"], "lr is missing or unknown")):
        with pytest.raises(UserError, match=line):
            pretrain_tracker.main(compose("pretrain_tracker", settings))


def test_weights_in_the_package_need_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam2_video, "SHIPPED", tmp_path)
    settings = {k: v for k, v in entry("backbone", "sam2_mini").items() if k != "train_decoder"}
    with pytest.raises(UserError, match="has no weights"):
        instantiate(settings)
    other = instantiate(settings | {"pretrained": False, "seed": 1})
    save_file(
        {name: tensor.clone() for name, tensor in other.net.state_dict().items()}, tmp_path / "sam2_mini.safetensors"
    )
    assert instantiate(settings).spec.weights_hash == other.spec.weights_hash


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam2_video, "SHIPPED", tmp_path)  # those of the package are not of this tiny size
    settings = [
        f"output={tmp_path / 'out'}",
        f"data_root={tmp_path}",
        f"train={quoted([*TINY, *SMALL, 'data.styles=[echo]'])}",
        f"pretrain={quoted(PRETRAIN)}",
    ]
    result = demo_tracking.main(compose("demo_tracking", settings))
    json.dumps(result)
    assert not result["shipped"]
    for row in ("frozen", "adapted", "copy", "flow"):
        assert set(result[row]) == set(demo_tracking.SCORES)
    for path in (result["gif"], result["mp4"], result["adapter_file"], *result["pictures"]):
        assert Path(path).stat().st_size > 0


def test_the_weights_of_the_package_follow_lesions_better_than_copying_and_say_where_they_end() -> None:
    """Three clips of the test split, which no training has seen."""
    path = sam2_video.shipped("sam2_mini")
    assert path is not None
    assert path.stat().st_size < 16e6
    model = build_tracker({"backbone": entry("backbone", "sam2_mini"), "adapter": entry("adapter", "frozen")}, SPEC)
    tracked, copied, absent = [], [], []
    for index in (0, 4, 8):
        clip = render_clip(tile_seed("test", index, 0), style="lesion", frames=10, size=128)
        truth = clip.labels == LABEL["lesion"]
        start = int(truth.sum((1, 2)).argmax())
        frames = ArrayClip(clip.image[:, None].astype(np.float32) / 255, name="lesion")
        results = dict(track(model.eval(), frames, [Prompt(start, mask=truth[start])], focus=3.0))
        found = np.stack([results[t].masks[0].numpy() for t in range(10)])
        others = np.arange(10) != start
        tracked.append(dice(found[others], truth[others]))
        copied.append(dice(np.broadcast_to(truth[start], truth.shape)[others], truth[others]))
        absent += found[~truth.any((1, 2))].any((1, 2)).tolist()
    assert np.mean(tracked) > np.mean(copied) + 0.05
    assert np.mean(absent) < 0.5
