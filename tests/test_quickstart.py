"""The quickstart at tiny sizes: its keys and its files."""

import json
from pathlib import Path

import rasterio

from vfmadapt import quickstart
from vfmadapt.build import compose

TINY = [
    "data.train=4",
    "data.val=1",
    "data.test=1",
    "data.size=64",
    "data.workers=1",
    "loader.crop=32",
    "loader.steps_per_epoch=1",
    "trainer.max_steps=1",
    "previews=1",
]
KEYS = {"miou", "frozen_miou", "trainable", "adapter_bytes", "train_seconds", "map", "preview", "adapter_file"}


def test_quickstart(tmp_path: Path) -> None:
    settings = [
        f"output={tmp_path / 'out'}",
        f"data_root={tmp_path}",
        "scene.size=[70,90]",
        f"train=[{','.join(map(repr, TINY))}]",
    ]
    result = quickstart.main(compose("quickstart", settings))
    assert json.loads(json.dumps(result)).keys() == KEYS
    with rasterio.open(result["map"]) as map_, rasterio.open(tmp_path / "out" / "scene.tif") as scene:
        assert (map_.shape, map_.crs, map_.transform) == ((70, 90), scene.crs, scene.transform)
    for name in ("preview", "adapter_file"):
        assert Path(result[name]).stat().st_size > 0
    assert result["adapter_bytes"] == Path(result["adapter_file"]).stat().st_size
