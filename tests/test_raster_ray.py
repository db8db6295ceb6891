"""The engine `ray`: the map of the local engine, on nodes that come and go."""

import json
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import vfmadapt
from vfmadapt.build import build_model, compose
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.predict import main
from vfmadapt.raster.predict import RayCluster, predict_raster
from vfmadapt.raster.ray_actor import import_ray

SPEC = DataSpec(
    "fake", ("red", "green", "blue"), tuple(ClassSpec(n, (9, 9, 9)) for n in "abcd"), mean=(0.5,) * 3, std=(0.2,) * 3
)
SMALL = {"tile": 128, "overlap": 32, "block": 512}
TIMEOUT = 300  # seconds; half a minute on a quiet machine


class Model(nn.Module):
    """Random weights; notes on which nodes it runs; with `wait` stops after two blocks until it is told to go on."""

    def __init__(self, notes, *, wait=False, act=None):
        super().__init__()
        torch.manual_seed(0)
        self.spec = SPEC
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 5, padding=2))
        self.notes, self.wait, self.act = notes, wait, act

    def forward(self, image, valid):
        import ray

        if ray.is_initialized():  # not for the map to compare with
            (self.notes / f"{ray.get_runtime_context().get_node_id()}.node").touch()
        if self.act is not None and (image == 1).any():
            self.act()
        while self.wait and not (self.notes / "go").exists() and len(finished(self.notes)) >= 2:
            time.sleep(0.01)
        return self.layers(image * valid[:, None])


def refuse():
    raise RuntimeError("in the middle")


@pytest.fixture(scope="module")
def scene(write_tiff, tmp_path_factory):
    """1100 x 1300 pixels, smooth, with a void corner and one brightest pixel: nine blocks of 512."""
    y, x = np.mgrid[0:1100, 0:1300] / 17
    values = np.stack([127 + 100 * np.sin(y + i) * np.cos(x - i) for i in range(3)]).astype(np.uint8)
    values[:, :300, :700] = 0
    values[0, 900, 200] = 255
    return write_tiff(tmp_path_factory.mktemp("scene") / "scene.tif", values, nodata=0, tiled=True)


@pytest.fixture(scope="module")
def reference(scene, tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    predict_raster(Model(folder), scene, folder / "map.tif", **SMALL, layers=("entropy",))
    return folder / "map.tif"


@pytest.fixture(scope="module")
def cluster():
    """Two nodes; this process is connected to the first."""
    ray = import_ray()
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes cannot import tests
    head = {"num_cpus": 1, "include_dashboard": False}
    head["_system_config"] = {"health_check_period_ms": 500}  # 3000 by default; five misses make a node dead
    made = Cluster(initialize_head=True, head_node_args=head)
    made.doomed = made.add_node(num_cpus=1)
    made.connect()
    yield made
    ray.shutdown()
    made.shutdown()


def finished(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("map.tif.blocks/*/*.block")}


def until(condition, run):
    start = time.monotonic()
    while not condition():
        assert not run.done(), run.exception()
        assert time.monotonic() - start < TIMEOUT
        time.sleep(0.02)


def test_a_node_is_lost_and_one_joins(scene, reference, cluster, tmp_path, caplog):
    model, output = Model(tmp_path, wait=True), tmp_path / "map.tif"
    options = {"layers": ("entropy",), "cluster": RayCluster(), "device": "cpu"}
    seen = []
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.INFO):
        run = pool.submit(predict_raster, model, scene, output, **SMALL, **options)
        try:
            until(lambda: len(list(tmp_path.glob("*.node"))) == 2 and len(finished(tmp_path)) >= 2, run)
            with pytest.raises(UserError, match="another run is writing"):
                predict_raster(model, scene, output, **SMALL, device="cpu")
            cluster.remove_node(cluster.doomed, allow_graceful=False)  # in the middle of its block
            seen.append(finished(tmp_path))
            cluster.add_node(num_cpus=1)
            until(lambda: len(list(tmp_path.glob("*.node"))) == 3, run)
            seen.append(finished(tmp_path))
        finally:
            (tmp_path / "go").touch()
        result = run.result(TIMEOUT)
    assert 2 <= len(seen[0]) <= 4
    assert seen[0] == seen[1]
    assert "of the Ray cluster is lost" in caplog.text
    for name in ("map.tif", "map_scores.tif"):
        assert (tmp_path / name).read_bytes() == reference.with_name(name).read_bytes()
    assert not list(tmp_path.glob("*.blocks"))
    assert sum(result.pixels.values()) + result.void == 1100 * 1300
    assert result.model_seconds > 0


def test_a_block_that_fails_is_reported_and_another_engine_goes_on(scene, reference, cluster, tmp_path):
    output, options = tmp_path / "map.tif", {**SMALL, "layers": ("entropy",), "device": "cpu"}
    with pytest.raises(UserError, match=r"^a block of .*rows 512 to 1023, columns 0 to 511: in the middle; .* kept"):
        predict_raster(Model(tmp_path, act=refuse), scene, output, **options, cluster=RayCluster(actors=1))
    assert len(list(tmp_path.glob("*.node"))) == 1
    folder = tmp_path / "map.tif.blocks"
    assert json.loads((folder / "failed.json").read_text()) == {"3": "in the middle"}
    kept = finished(tmp_path)
    assert len(kept) == 8
    model, seen = Model(tmp_path), []
    forward = model.forward
    model.forward = lambda *inputs: seen.append(finished(tmp_path)) or forward(*inputs)
    predict_raster(model, scene, output, **options)
    assert seen
    assert all(s == kept for s in seen)
    assert output.read_bytes() == reference.read_bytes()


@pytest.mark.slow
def test_a_block_that_kills_its_actors_is_given_up(scene, cluster, tmp_path):
    bad = Model(tmp_path, act=lambda: os._exit(1))
    with pytest.raises(UserError, match=r"^a block of .*rows 512 to 1023, columns 0 to 511: 3 actors were lost with"):
        predict_raster(bad, scene, tmp_path / "map.tif", **SMALL, device="cpu", cluster=RayCluster())
    assert len(finished(tmp_path)) == 8


def test_the_tool(scene, cluster, tmp_path):
    backbone = {
        "_target_": "vfmadapt.backbones.timm_models.timm_backbone",
        "name": "vit_tiny_patch16_224",
        "pretrained": False,
        "settings": {"embed_dim": 32, "depth": 4, "num_heads": 2},
    }
    parts = {"adapter": "vfmadapt.adapters.frozen.Frozen", "head": "vfmadapt.heads.linear.LinearHead"}
    model = build_model({"backbone": backbone, **{k: {"_target_": v} for k, v in parts.items()}}, SPEC)
    file = vfmadapt.save(tmp_path / "a.safetensors", model)
    common = [f"input={scene}", f"adapter_file={file}", "preview=false", "window=[0,600,300,400]"]
    for name, engine in {"ray": ["engine=ray", "ray.address=auto", "ray.actors=1"], "local": ["device=cpu"]}.items():
        main(compose("predict", [*common, f"output={tmp_path}/{name}.tif", *engine]))
    assert (tmp_path / "ray.tif").read_bytes() == (tmp_path / "local.tif").read_bytes()


def test_a_node_that_cannot_compute_says_why(scene, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("vfmadapt.raster.planning.version", lambda name: "1.0")
    with pytest.raises(UserError, match=r"no node of the Ray cluster can compute the map: torch is .* 1\.0 on the dri"):
        predict_raster(Model(tmp_path), scene, tmp_path / "map.tif", **SMALL, device="cpu", cluster=RayCluster())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"device=cuda: the Ray cluster has 0 GPUs, an actor takes 1; .*device=cpu"):
        predict_raster(Model(tmp_path), scene, tmp_path / "map.tif", **SMALL, device="cuda", cluster=RayCluster())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actors": 0}, r"ray\.actors=0: allowed are 1 and more"),
        ({"gpus_per_actor": 0}, r"ray\.gpus_per_actor=0: allowed are parts of 1"),
        ({"gpus_per_actor": 1.5}, r"ray\.gpus_per_actor=1\.5: allowed are parts of 1, and whole numbers"),
        ({"address": "ray://head:10001"}, r"ray\.address=ray://head:10001: .* ray\.address=auto"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(UserError, match=message):
        RayCluster(**settings)


def test_no_cluster_and_no_ray(monkeypatch):
    ray = import_ray()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("nobody\nthere")))
    with pytest.raises(UserError, match=r"^ray\.address=auto: no Ray cluster answers there \(nobody\); give host:port"):
        RayCluster().connected().__enter__()
    for address in ("127.0.0.1:1", "nonsense"):
        with pytest.raises(UserError, match=rf"^ray\.address={address}: no Ray cluster answers there"):
            RayCluster(address=address).connected().__enter__()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^engine=ray needs Ray; pip install 'vfmadapt\[ray\]'$"):
        RayCluster().connected().__enter__()
