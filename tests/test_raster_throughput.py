"""What makes a map faster and must not make it another: batches found by trying, compiled models, memory layout."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import rasterio
import torch
from torch import nn

from vfmadapt.build import compose
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster import job, throughput
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.planning import make_plan
from vfmadapt.raster.predict import Settings, merge_parts, predict_part, predict_raster
from vfmadapt.raster.throughput import largest_batch

CLASSES = tuple(ClassSpec(name, (i * 60, 50, 200)) for i, name in enumerate(("a", "b", "c")))
SMALL = {"tile": 64, "overlap": 16, "block": 512}


class Convolution(nn.Module):
    """Random weights; says what it was given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.spec = DataSpec("fake", ("red", "green", "blue"), CLASSES, mean=(0.5,) * 3, std=(0.2,) * 3)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 5, padding=2))

    def forward(self, image, valid):
        return self.layers(image * valid[:, None])


class Noting(Convolution):
    def __init__(self):
        super().__init__()
        self.images = []

    def forward(self, image, valid):
        self.images.append(image)
        return super().forward(image, valid)


class Full(Convolution):
    """A device whose memory holds no batch of more than `most` tiles."""

    def __init__(self, most=0):
        super().__init__()
        self.most = most

    def forward(self, image, valid):
        if len(image) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nOf the allocated memory ...")
        return super().forward(image, valid)


@pytest.fixture(scope="module")
def scene(write_tiff, tmp_path_factory):
    """Two blocks of 512."""
    values = np.random.default_rng(0).integers(1, 255, (3, 40, 80), dtype=np.uint8)
    values = np.repeat(np.repeat(values, 8, axis=1), 8, axis=2)
    return write_tiff(tmp_path_factory.mktemp("scene") / "scene.tif", values)


@pytest.fixture(scope="module")
def reference(scene, tmp_path_factory):
    """A map with batches of 8."""
    path = tmp_path_factory.mktemp("map") / "map.tif"
    predict_raster(Convolution(), scene, path, **SMALL, batch=8)
    return path


def plan_of(scene, **settings):
    return make_plan(Convolution(), str(scene), torch.device("cpu"), Settings(**SMALL | settings))[0]


@pytest.mark.parametrize(
    ("fits", "block", "batch"), [(20, 4096, 16), (10_000, 4096, 64), (10_000, 512, 16), (0, 512, 1)]
)
def test_the_largest_batch_is_found_by_doubling(scene, monkeypatch, fits, block, batch):
    """At most a quarter of a block, whose last batch is filled up: 11 x 11 tiles in one of 512 pixels, 86 x 86 else."""
    tried = []
    monkeypatch.setattr(throughput, "_fits", lambda model, plan, device: tried.append(plan.batch) or plan.batch <= fits)
    plan = replace(plan_of(scene, block=block), height=10_000, width=10_000)
    assert largest_batch(Convolution(), plan, torch.device("cuda")) == batch
    assert tried == [2**i for i in range(1, len(tried) + 1)]
    assert largest_batch(Convolution(), plan, torch.device("cpu")) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_largest_batch_of_a_gpu_leaves_a_part_of_its_memory(scene, tmp_path):
    model, device = Convolution().cuda(), torch.device("cuda")
    plan = replace(plan_of(scene, tile=512, overlap=0, block=512 * 40), height=40_000, width=40_000)
    assert largest_batch(model, plan, device) == 64
    rest = torch.empty(torch.cuda.mem_get_info()[0] - (1 << 30), dtype=torch.uint8, device=device)
    assert 1 <= largest_batch(model, plan, device) < 64
    del rest
    predict_raster(model, scene, tmp_path / "map.tif", **SMALL, batch="auto", channels_last=True)


def test_a_resumed_run_keeps_the_batch_that_was_found(scene, reference, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(job, "largest_batch", lambda *_: found.append(1) or 8)
    settings = Settings(**SMALL, batch="auto")
    assert predict_part(Convolution(), scene, tmp_path / "map.tif", settings, index=1, of=2) == 1
    assert BlockFolder(tmp_path / "map.tif").plan().batch == 8
    monkeypatch.setattr(job, "largest_batch", lambda *_: pytest.fail("measured anew"))
    assert predict_part(Convolution(), scene, tmp_path / "map.tif", settings, index=0, of=2) == 1
    with pytest.raises(UserError, match="interrupted run with another batch"):
        predict_part(Convolution(), scene, tmp_path / "map.tif", replace(settings, batch=2), index=0, of=2)
    merge_parts(tmp_path / "map.tif")
    assert (tmp_path / "map.tif").read_bytes() == reference.read_bytes()
    assert len(found) == 1


def test_a_batch_of_another_plan_is_not_kept(scene, tmp_path, monkeypatch):
    sizes = iter([8, 2])
    monkeypatch.setattr(job, "largest_batch", lambda *_: next(sizes))
    predict_part(Convolution(), scene, tmp_path / "map.tif", Settings(**SMALL, batch="auto"), index=0, of=2)
    model, settings = Noting(), {**SMALL, "tile": 60, "batch": "auto", "restart": True}
    predict_raster(model, scene, tmp_path / "map.tif", **settings)
    assert {len(image) for image in model.images} == {2}


def test_a_batch_that_does_not_fit_is_one_line(scene, tmp_path):
    with pytest.raises(UserError) as error:
        predict_raster(Full(), scene, tmp_path / "map.tif", **SMALL)
    text = str(error.value)
    assert "\n" not in text
    assert "a batch of 4 tiles of 64 pixels does not fit into the cpu device's memory; take a smaller batch=" in text
    assert not list(tmp_path.iterdir())
    predict_raster(Full(most=4), scene, tmp_path / "map.tif", **SMALL)


@pytest.mark.parametrize("batch", ["fast", 0])
def test_batches_that_are_none(scene, tmp_path, batch):
    with pytest.raises(UserError, match=f"batch={batch}"):
        predict_raster(Convolution(), scene, tmp_path / "map.tif", batch=batch)
    with pytest.raises(UserError, match="batch=fast: wanted is a whole number or auto"):
        compose("predict", ["batch=fast"])
    assert compose("predict", ["batch=auto"]).batch == "auto"


def test_channels_last(scene, reference, tmp_path):
    for name in ("a.tif", "b.tif"):
        model = Noting()
        predict_raster(model, scene, tmp_path / name, **SMALL, batch=8, channels_last=True)
        assert all(image.is_contiguous(memory_format=torch.channels_last) for image in model.images)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with rasterio.open(tmp_path / "a.tif") as made, rasterio.open(reference) as other:
        assert (made.read(1) != other.read(1)).mean() < 1e-3  # a convolution that sums in another order


def test_compiled(scene, reference, tmp_path, monkeypatch):
    """Compiled once for all blocks; the plan says so. The backend does not matter here, so a quick one is taken."""
    graphs = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", partial(real, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    predict_raster(Convolution(), scene, tmp_path / "map.tif", **SMALL, batch=8, compile=True)
    assert len(graphs) == 1
    assert (tmp_path / "map.tif").read_bytes() == reference.read_bytes()
    predict_part(Convolution(), scene, tmp_path / "map.tif", Settings(**SMALL, compile=True), index=0, of=2)
    with pytest.raises(UserError, match="interrupted run with another compile"):
        predict_raster(Convolution(), scene, tmp_path / "map.tif", **SMALL)


@pytest.mark.slow
def test_compiled_with_inductor(scene, reference, tmp_path):
    """Fused kernels round in another way."""
    predict_raster(Convolution(), scene, tmp_path / "map.tif", **SMALL, batch=8, compile=True)
    with rasterio.open(tmp_path / "map.tif") as made, rasterio.open(reference) as other:
        assert (made.read(1) != other.read(1)).mean() < 1e-3
