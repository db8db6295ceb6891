"""Proof of coverage: one training step of every conf/experiment, and the page that is generated from them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vfmadapt
from vfmadapt import train
from vfmadapt.build import compose, names

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "trainer.max_steps=1",
    "loader.batch_size=2",
    "loader.crop=32",
    "loader.steps_per_epoch=1",
    "previews=1",
    "trainer.log_every_n_steps=1",
]


def tiny_data(entry: str, folder: Path) -> list[str]:
    """Overrides that make a data entry tiny; an entry that needs no file of the user's needs none here."""
    if entry in ("clouds_synthetic", "maps_synthetic", "urban_synthetic"):
        few = ["data.train=3", "data.val=1", "data.test=3"]  # one small map may have no area on it
        return [*few, "data.size=64", "data.workers=1", "data.shots=2"]
    if entry in ("height_synthetic", "rooms_synthetic"):
        return ["data.train=2", "data.val=1", "data.test=1", "data.size=64", "data.workers=1", "data.shots=1"]
    if entry == "endo_synthetic":
        few = ["data.train=1", "data.val=1", "data.test=1", "data.workers=1"]
        return [*few, "data.frames=3", "data.size=[32,40]", "data.shots=1"]  # of pairs of frames there is but one
    if entry == "organs_synthetic":
        few = ["data.train=2", "data.val=1", "data.test=1", "data.shots=1"]
        return [*few, "data.slices=1", "data.size=64", "data.workers=1"]
    if entry == "solids_synthetic":
        return ["data.train=2", "data.val=1", "data.test=1", "data.size=[32,40]", "data.shots=1"]
    if entry == "npz_stack":
        rng = np.random.default_rng(0)
        images = rng.normal(size=(16, 48, 40, 1)).astype(np.float32)
        np.savez(folder / "stack.npz", ndvi=images, cloud=(images > 0).astype(np.uint8))
        return [f"data.path={folder / 'stack.npz'}", "data.shots=2"]
    if entry == "clip_folder":
        rng = np.random.default_rng(0)
        for i in range(3):
            frames, masks = rng.integers(0, 255, (4, 32, 40), dtype=np.uint8), np.zeros((4, 32, 40), np.uint8)
            masks[:, 8:20, 10:24] = 1
            np.savez(folder / f"clip{i}.npz", imgs=frames, gts=masks)
        return [f"data.root={folder}", "data.test=[clip0]", "data.shots=1", "loader.clip=2"]
    if entry == "geotiff_folder":
        from PIL import Image

        rng = np.random.default_rng(0)
        for kind, shape, top in (("images", (48, 40, 3), 255), ("masks", (48, 40), 2)):
            (folder / kind).mkdir()
            for i in range(12):
                Image.fromarray(rng.integers(0, top, shape, dtype=np.uint8)).save(folder / kind / f"{i}.png")
        fractions = ["data.val_fraction=0.3", "data.test_fraction=0.3"]
        return [f"data.root={folder}", "data.classes=[off,on]", *fractions, "data.shots=2"]
    return []


@pytest.mark.parametrize("experiment", names("experiment"))
def test_one_step_of_every_experiment(experiment: str, tmp_path: Path) -> None:
    chosen = compose("train", [f"experiment={experiment}"])
    data = next(n for n in names("data") if chosen.data._target_.split(".")[-2] == n)
    overrides = [
        f"experiment={experiment}",
        *SMALL,
        *tiny_data(data, tmp_path),
        f"data_root={tmp_path}",
        f"output={tmp_path / 'run'}",
    ]
    result = train.main(compose("train", overrides))
    json.dumps(result)
    assert result["steps"] == 1
    measured = [result[key] for key in ("miou", "abs_rel", "rmse") if key in result]
    assert measured
    assert None not in measured
    model = vfmadapt.load(result["adapter_file"])
    assert len(model.spec.bands) == model.backbone.spec.bands


def test_coverage_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "docs_coverage.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
