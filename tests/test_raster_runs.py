"""Runs that are killed while the map is put together, run side by side, and tell how they get on."""

import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.raster import merge
from vfmadapt.raster.predict import Settings, merge_parts, predict_part, predict_raster

SETTINGS = {"tile": 64, "overlap": 16, "block": 512, "layers": ("probabilities",)}
FORK = multiprocessing.get_context("fork")


class Blurred(nn.Module):
    """Scores of means over 5 x 5 pixels."""

    def __init__(self):
        super().__init__()
        classes = tuple(ClassSpec(name, (i * 60, 50, 200)) for i, name in enumerate(("a", "b", "c")))
        self.spec = DataSpec("fake", ("x", "y", "z"), classes, (0.5,) * 3, (0.3,) * 3)
        self.calls = 0

    def forward(self, image, valid):
        self.calls += 1
        return 9 * nn.functional.avg_pool2d(image, 5, 1, 2)


@pytest.fixture(scope="module")
def scene(write_tiff, tmp_path_factory):
    """1100 x 1050 pixels: nine blocks."""
    y, x = np.mgrid[0:1100, 0:1050] / 17
    values = np.stack([127 + 100 * np.sin(y + i) * np.cos(x - i) for i in range(3)]).astype(np.uint8)
    return write_tiff(tmp_path_factory.mktemp("scene") / "scene.tif", values, tiled=True)


@pytest.fixture(scope="module")
def reference(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "map.tif"
    predict_raster(Blurred(), scene, path, **SETTINGS)
    return path


def same(output, reference):
    pairs = ((p, p.with_name(p.name.replace("map", "map_scores"))) for p in (output, reference))
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(*pairs, strict=True))


def _map_slowly_merged(scene, output):
    torch.set_num_threads(1)
    compress = merge.compress
    merge.compress = lambda tile: time.sleep(0.2) or compress(tile)  # an overview's tile
    predict_raster(Blurred(), scene, output, **SETTINGS)


@pytest.mark.parametrize("moment", ["overviews", "class.tif", "map.tif"])
def test_a_run_killed_while_it_merges_goes_on_without_the_model(scene, reference, tmp_path, moment):
    output, folder = tmp_path / "map.tif", tmp_path / "map.tif.blocks"
    awaited = output if moment == "map.tif" else folder / moment  # the map is there, the scores are still to come
    process = FORK.Process(target=_map_slowly_merged, args=(scene, output))
    process.start()
    while not awaited.exists():
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(folder.glob("*/*.block"))) == 9
    assert output.exists() == (moment == "map.tif")
    if output.exists():
        assert output.read_bytes() == reference.read_bytes()  # complete or not there
    model = Blurred()
    predict_raster(model, scene, output, **SETTINGS)
    assert model.calls == 0
    assert same(output, reference)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif", "map_scores.tif"]


def _part(scene, output, index):
    torch.set_num_threads(1)
    predict_part(Blurred(), scene, output, Settings(**SETTINGS), index=index, of=4)


def test_parts_at_once_and_in_any_order(scene, reference, tmp_path):
    output = tmp_path / "map.tif"
    for together in ((3, 1), (0, 2)):
        processes = [FORK.Process(target=_part, args=(scene, output, index)) for index in together]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
    merge_parts(output)
    assert same(output, reference)


def test_the_last_line_says_what_the_run_was(scene, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    start = time.perf_counter()
    predict_raster(Blurred(), scene, tmp_path / "map.tif", tile=64, overlap=16, block=512)
    seconds = time.perf_counter() - start
    number = r"([0-9.e+-]+)"
    line = re.fullmatch(
        rf"1100 x 1050 pixels in {number} s: {number} Mpx/s, {number} km²/s, peak memory {number} GB, (\d+)% of the "
        rf"time in the model, tiles forwarded / planned {number}",
        caplog.records[-1].message,
    )
    assert line is not None
    took, speed, area, memory, share, tiles = (float(value) for value in line.groups())
    assert 0 < took <= seconds + 0.05
    million = 1100 * 1050 / 1e6
    assert speed * (took - 0.051) * 0.99 <= million <= speed * (took + 0.051) * 1.01  # seconds come with one decimal
    assert area == pytest.approx(speed * 100, rel=0.1)  # 10 m pixels
    assert 0.05 < memory < 50
    assert 0 < share < 100
    assert 1 <= tiles <= 1.3


def test_without_a_projection_no_area_is_claimed(write_tiff, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_tiff(tmp_path / "a.tif", np.full((3, 9, 9), 99, dtype=np.uint8), crs=None)
    predict_raster(Blurred(), path, tmp_path / "map.tif")
    assert "Mpx/s, peak memory" in caplog.records[-1].message


def test_the_bar_shows_speed_and_time_left(scene, tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    predict_raster(Blurred(), scene, tmp_path / "map.tif", tile=64, overlap=16, block=512, progress=True)
    shown = screen.getvalue().split("\r")
    assert re.search(r"100%\|.*\| 1\.2/1\.2 Mpx \[\d\d:\d\d<00:00, +[0-9.]+(Mpx/s|s/Mpx)\]", shown[-1])
    assert any(re.search(r"\| 0\.\d/1\.2 Mpx \[\d\d:\d\d<\d\d:\d\d", line) for line in shown)
