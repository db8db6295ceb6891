"""Blocks: the same bytes however a map is cut, interrupted and taken up again."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import rasterio
import torch
from rio_cogeo import cog_validate
from torch import nn

from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.blocks import Block, DamagedError, compress, decompress, read_block, write_block
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.job import Job
from vfmadapt.raster.pipeline import ahead
from vfmadapt.raster.planning import make_plan
from vfmadapt.raster.predict import Settings, merge_parts, predict_part, predict_raster

CLASSES = tuple(ClassSpec(name, (i * 60, 50, 200)) for i, name in enumerate(("a", "b", "c", "d")))
SMALL = {"tile": 64, "overlap": 16, "block": 512}


class Convolution(nn.Module):
    """Random weights; sees 7 pixels around, more than the quarter of the overlap in which tiles' edges do not count."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.spec = DataSpec("fake", ("red", "green", "blue"), CLASSES, mean=(0.5,) * 3, std=(0.2,) * 3)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 5, padding=6, dilation=3))
        self.calls = 0

    def forward(self, image, valid):
        self.calls += 1
        return self.layers(image * valid[:, None])


@pytest.fixture(scope="module")
def scene(write_tiff, tmp_path_factory):
    """1100 x 1300 pixels, smooth, with a void corner: nine blocks of 512."""
    y, x = np.mgrid[0:1100, 0:1300] / 17
    values = np.stack([127 + 100 * np.sin(y + i) * np.cos(x - i) for i in range(3)]).astype(np.uint8)
    values[:, :300, :700] = 0
    return write_tiff(tmp_path_factory.mktemp("scene") / "scene.tif", values, nodata=0, tiled=True)


@pytest.fixture(scope="module")
def reference(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "map.tif"
    predict_raster(Convolution(), scene, path, **SMALL, layers=("probabilities", "entropy", "disagreement"))
    return path


def labels(path, band=1):
    with rasterio.open(path) as file:
        return file.read(band)


def test_the_map_is_a_valid_cog_with_overviews(reference):
    for path in (reference, reference.with_name("map_scores.tif")):
        valid, errors, warnings = cog_validate(path, strict=True)
        assert (valid, errors, warnings) == (True, [], [])
    with rasterio.open(reference) as made, rasterio.open(reference, overview_level=1) as quarter:
        assert made.overviews(1) == [2, 4]
        np.testing.assert_array_equal(quarter.read(1), made.read(1)[::4, ::4])
    assert not reference.with_name("map.tif.blocks").exists()


def test_scores(reference):
    with rasterio.open(reference.with_name("map_scores.tif")) as made:
        assert made.descriptions == (*(f"probability of {c.name}" for c in CLASSES), "entropy", "disagreement")
        assert made.scales == pytest.approx((1 / 254,) * 6)
        scores = made.read()
    chosen = labels(reference)
    void = chosen == 255
    assert (scores[:, void] == 255).all()
    assert scores[:, ~void].max() <= 254
    shares = scores[:4, ~void].astype(int)
    assert (np.abs(shares.sum(axis=0) - 254) <= 2).all()
    assert (shares.max(axis=0) - np.take_along_axis(shares, chosen[~void][None].astype(int), axis=0) <= 1).all()
    p = np.maximum(shares / 254, 1e-9)
    entropy = -(p * np.log(p)).sum(axis=0) / np.log(4)
    np.testing.assert_allclose(scores[4, ~void] / 254, entropy, atol=0.03)
    assert 0 < (scores[5, ~void] > 0).mean() < 0.2  # tiles disagree near borders of classes only


@pytest.mark.parametrize("block", [1024, 4096])
def test_the_map_does_not_depend_on_the_blocks(scene, reference, tmp_path, block):
    predict_raster(Convolution(), scene, tmp_path / "map.tif", **SMALL | {"block": block})
    np.testing.assert_array_equal(labels(tmp_path / "map.tif"), labels(reference))


def test_blended_tiles_are_the_whole_image(scene, tmp_path):
    """A quarter of the overlap is more than what the model sees around."""
    model = Convolution()
    predict_raster(model, scene, tmp_path / "map.tif", tile=128, overlap=32)
    with rasterio.open(scene) as source:
        valid = torch.from_numpy(source.dataset_mask() > 0)[None]
        with torch.inference_mode():
            whole = model(torch.from_numpy(source.read()).float()[None] / 255, valid).argmax(1)[0].numpy()
    assert (labels(tmp_path / "map.tif") != whole)[valid[0].numpy()].mean() < 0.01


@pytest.mark.parametrize("window", [[0, 0, 600, 700], [512, 512, 400, 512], [37, 411, 700, 801], [1099, 1299, 1, 1]])
def test_a_window_has_the_bytes_of_that_part(scene, reference, tmp_path, window):
    layers = ("probabilities", "entropy", "disagreement")
    result = predict_raster(Convolution(), scene, tmp_path / "map.tif", **SMALL, window=window, layers=layers)
    row, column, height, width = window
    at = (slice(row, row + height), slice(column, column + width))
    for name in ("map.tif", "map_scores.tif"):
        with rasterio.open(tmp_path / name) as part, rasterio.open(reference.with_name(name)) as whole:
            np.testing.assert_array_equal(part.read(), whole.read()[:, *at])
            assert part.transform @ (0, 0) == whole.transform @ (column, row)
        assert cog_validate(tmp_path / name, strict=True)[0]
    assert result.void + sum(result.pixels.values()) == height * width
    assert result.void == (labels(tmp_path / "map.tif") == 255).sum()


@pytest.mark.parametrize("window", [[0, 0, 2000, 10], [-1, 0, 10, 10], [5, 5, 0, 5], [1, 2, 3]])
def test_windows_that_do_not_lie_inside(scene, tmp_path, window):
    with pytest.raises(UserError, match="window="):
        predict_raster(Convolution(), scene, tmp_path / "map.tif", window=window)
    assert not list(tmp_path.iterdir())


class Slow(Convolution):
    def forward(self, image, valid):
        time.sleep(0.01)
        return super().forward(image, valid)


Slow.__qualname__ = Convolution.__qualname__  # the same model to the plan


def _map(scene, output):
    torch.set_num_threads(1)
    predict_raster(Slow(), scene, output, **SMALL)


def test_a_killed_run_goes_on_where_it_stopped(scene, reference, tmp_path):
    output = tmp_path / "map.tif"
    process = multiprocessing.get_context("fork").Process(target=_map, args=(scene, output))
    process.start()
    folder = tmp_path / "map.tif.blocks"
    while len(list(folder.glob("*/*.block"))) < 3:
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not output.exists()
    finished = {p: p.stat().st_mtime_ns for p in folder.glob("*/*.block")}
    assert 3 <= len(finished) < 9
    with pytest.raises(UserError, match=r"finished blocks of an interrupted run with another tile; .*restart=true"):
        predict_raster(Convolution(), scene, output, **SMALL | {"tile": 60})
    with pytest.raises(UserError, match="with another adapter"):
        predict_raster(Convolution(seed=1), scene, output, **SMALL)
    model = Convolution()
    seen = []
    original = model.forward
    model.forward = lambda *a: seen.append({p: p.stat().st_mtime_ns for p in finished}) or original(*a)
    predict_raster(model, scene, output, **SMALL)
    assert seen
    assert all(s == finished for s in seen)  # not redone
    assert output.read_bytes() == reference.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["map.tif"]


class Breaks(Convolution):
    """Fails at the calls of `at`."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error = at, error

    def forward(self, image, valid):
        if self.calls in self.at:
            self.calls += 1
            raise self.error("in the middle")
        return super().forward(image, valid)


class Stubborn(Breaks):
    """Fails at those calls, and whenever it sees the same again."""

    refused = None

    def forward(self, image, valid):
        if self.calls in self.at and self.refused is None:
            self.refused = image.clone()
        if self.refused is not None and torch.equal(image, self.refused):
            raise self.error("in the middle")
        return super().forward(image, valid)


Stubborn.__qualname__ = Breaks.__qualname__ = Convolution.__qualname__


def test_a_block_that_fails_once_is_tried_again(scene, reference, tmp_path):
    predict_raster(Breaks({40}, RuntimeError), scene, tmp_path / "map.tif", **SMALL)
    assert (tmp_path / "map.tif").read_bytes() == reference.read_bytes()


def test_a_block_that_keeps_failing_is_reported_and_the_others_are_kept(scene, reference, tmp_path):
    (tmp_path / "map.tif").write_bytes(b"the map before")
    bad = Stubborn({40}, RuntimeError)
    with pytest.raises(UserError, match=r"^a block of .*rows 0 to 511, columns 512 to 1023: in the middle; .* kept"):
        predict_raster(bad, scene, tmp_path / "map.tif", **SMALL)
    assert (tmp_path / "map.tif").read_bytes() == b"the map before"
    folder = tmp_path / "map.tif.blocks"
    assert json.loads((folder / "failed.json").read_text()) == {"1": "in the middle"}
    assert len(list(folder.glob("*/*.block"))) == 8
    predict_raster(Convolution(), scene, tmp_path / "map.tif", **SMALL)
    assert (tmp_path / "map.tif").read_bytes() == reference.read_bytes()


def test_ctrl_c_keeps_finished_blocks(scene, reference, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Breaks({150}, KeyboardInterrupt), scene, tmp_path / "map.tif", **SMALL)
    assert list((tmp_path / "map.tif.blocks").glob("*/*.block"))
    predict_raster(Convolution(), scene, tmp_path / "map.tif", **SMALL)
    assert (tmp_path / "map.tif").read_bytes() == reference.read_bytes()


def test_a_run_without_a_finished_block_leaves_nothing(scene, tmp_path):
    with pytest.raises(UserError, match=r"3 blocks of .* failed"):
        predict_raster(Breaks(range(10_000), RuntimeError), scene, tmp_path / "map.tif", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_changed_input_is_refused_unless_restarted(scene, tmp_path):
    copy = tmp_path / "scene.tif"
    copy.write_bytes(scene.read_bytes())
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Breaks({150}, KeyboardInterrupt), copy, tmp_path / "map.tif", **SMALL)
    with rasterio.open(copy, "r+") as file:
        file.write(np.full((3, 20, 20), 9, dtype=np.uint8), window=((700, 720), (700, 720)))
    with pytest.raises(UserError, match="with another input"):
        predict_raster(Convolution(), copy, tmp_path / "map.tif", **SMALL)
    predict_raster(Convolution(), copy, tmp_path / "map.tif", **SMALL, restart=True)
    predict_raster(Convolution(), copy, tmp_path / "other.tif", **SMALL)
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "other.tif").read_bytes()


def test_two_runs_on_one_output(scene, reference, tmp_path):
    output = tmp_path / "map.tif"

    class Second(Convolution):
        refused = None

        def forward(self, image, valid):
            if self.refused is None:
                with pytest.raises(UserError, match=r"another run is writing .*map\.tif") as error:
                    predict_raster(Convolution(), scene, output, **SMALL)
                self.refused = error
            return super().forward(image, valid)

    Second.__qualname__ = Convolution.__qualname__
    model = Second()
    predict_raster(model, scene, output, **SMALL)
    assert model.refused is not None
    assert output.read_bytes() == reference.read_bytes()


def test_a_damaged_block_is_done_again(scene, reference, tmp_path):
    output = tmp_path / "map.tif"
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Breaks({150}, KeyboardInterrupt), scene, output, **SMALL)
    victim = min((tmp_path / "map.tif.blocks").glob("*/*.block"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    predict_raster(Convolution(), scene, output, **SMALL)
    assert output.read_bytes() == reference.read_bytes()


def test_block_files(tmp_path):
    tile = np.random.default_rng(0).integers(0, 9, (512, 512), dtype=np.uint8)
    void = np.full((512, 512), 255, dtype=np.uint8)
    tiles = [compress(tile), compress(void)]
    assert tiles[1] == b""
    np.testing.assert_array_equal(decompress(tiles[0], np.uint8), tile)
    np.testing.assert_array_equal(decompress(tiles[1], np.uint8), void)
    none = np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int64)
    block = Block("key", 7, tuple(range(256)), 3, {"class": np.array([[[len(tiles[0]), 0]]])}, *none)
    path = tmp_path / "a.block"
    write_block(path, block, {"class": tiles})
    read, start = read_block(path)
    assert (read.plan, read.index, read.counts, read.forwarded) == ("key", 7, block.counts, 3)
    assert path.read_bytes()[start : start + len(tiles[0])] == tiles[0]
    whole = path.read_bytes()
    for bad in (whole[:-1], whole[:10], b"", whole + b"x", b"x" + whole[1:]):
        path.write_bytes(bad)
        with pytest.raises(DamagedError):
            read_block(path)


def test_ahead_passes_items_and_errors_and_closes():
    closed = []

    def items():
        try:
            yield from range(5)
            raise ValueError("at the end")
        finally:
            closed.append(True)

    taken = []
    with pytest.raises(ValueError, match="at the end"):
        taken.extend(ahead(items()))
    running = ahead(items())
    assert next(running) == 0
    running.close()
    assert closed == [True, True]


def test_parts_of_an_array_job_give_the_same_map(scene, reference, tmp_path):
    output = tmp_path / "map.tif"
    settings = Settings(**SMALL, layers=("probabilities", "entropy", "disagreement"))
    with pytest.raises(UserError, match="compute the parts first"):
        merge_parts(output)
    for index in (2, 0):
        assert predict_part(Convolution(), scene, output, settings, index=index, of=3) == 3
    assert predict_part(Convolution(), scene, output, settings, index=0, of=3, restart=True) == 0
    with pytest.raises(UserError, match=r"3 of 9 blocks of .*map\.tif are not finished \(first: 1\)"):
        merge_parts(output)
    with pytest.raises(UserError, match="index=3 of=3"):
        predict_part(Convolution(), scene, output, settings, index=3, of=3)
    with pytest.raises(UserError, match="another tile"):
        predict_part(Convolution(), scene, output, Settings(**SMALL | {"tile": 60}), index=1, of=3)
    model = Convolution()
    model.checked = False
    original = model.forward

    def forward(*inputs):
        if not model.checked:
            model.checked = True
            for run in (
                lambda: merge_parts(output),
                lambda: predict_part(Convolution(), scene, output, settings, index=1, of=3),
                lambda: predict_raster(Convolution(), scene, output, **SMALL),
            ):
                with pytest.raises(UserError, match="another run is writing"):
                    run()
        return original(*inputs)

    model.forward = forward
    predict_part(model, scene, output, settings, index=1, of=3)
    assert model.checked
    result = merge_parts(output)
    assert sum(result.pixels.values()) + result.void == 1100 * 1300
    for name in ("map.tif", "map_scores.tif"):
        assert (tmp_path / name).read_bytes() == reference.with_name(name).read_bytes()
    assert not output.with_name("map.tif.blocks").exists()


def test_one_block_is_pure(scene, tmp_path):
    model, device = Convolution(), torch.device("cpu")
    plan, _ = make_plan(model, str(scene), device, Settings(**SMALL))
    bytes_of = []
    for name in ("a.tif", "b.tif"):
        folder = BlockFolder(tmp_path / name)
        job = Job(plan, folder, model, device)
        for index in (4, 1, 4) if name == "a.tif" else (1, 4):
            job.run_block(index)
        bytes_of.append([folder.block(index).read_bytes() for index in (1, 4)])
    assert bytes_of[0] == bytes_of[1]
    with pytest.raises(RuntimeError, match="in the middle"):
        Job(plan, folder, Breaks({0}, RuntimeError), device).run_block(0)
