"""Depth and regression as tasks: loaders, one run of each kind, the units of what a model gives, what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vfmadapt
from vfmadapt import check_data, evaluate, predict, train
from vfmadapt.build import build_model, compose
from vfmadapt.contracts import DataSpec, ValueSpec
from vfmadapt.datasets.endo_synthetic import EndoSynthetic
from vfmadapt.errors import UserError
from vfmadapt.model import in_units
from vfmadapt.tasks.augment_values import ValueAugment, known_values
from vfmadapt.tasks.depth import DepthTask
from vfmadapt.tasks.regression import RegressionTask
from vfmadapt.tasks.values import ValueData, collate_values
from vfmadapt.testing import vit_spec

BANDS = ("red", "green", "blue")
TINY = {
    "backbone": {
        "_target_": "vfmadapt.backbones.timm_models.timm_backbone",
        "name": "vit_tiny_patch16_224",
        "pretrained": False,
        "settings": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32},
    },
    "adapter": {"_target_": "vfmadapt.adapters.frozen.Frozen"},
    "head": {"_target_": "vfmadapt.heads.linear.LinearHead"},
}
SMALL = [
    "trainer.max_steps=2",
    "loader.batch_size=2",
    "loader.crop=32",
    "loader.steps_per_epoch=2",
    "previews=1",
    "head.width=8",
]


def depth_sample(depth: torch.Tensor, name: str = "a") -> dict:
    g = torch.Generator().manual_seed(0)
    image, valid = torch.rand(3, *depth.shape, generator=g), torch.ones(depth.shape).bool()
    return {"image": image, "depth": depth, "valid": valid, "id": name, "bands": BANDS}


def model_of(value: ValueSpec):
    return build_model(TINY, DataSpec("toy", BANDS, (), (0.5,) * 3, (0.2,) * 3, values=(value,)))


DEPTH = ValueSpec("depth", "m", mean=1.0, std=0.5, log=True)


@pytest.mark.parametrize("bad", [0.0, -3.0, float("nan"), float("inf"), -float("inf")])
def test_depth_that_is_none_is_unknown(bad: float) -> None:
    depth = torch.full((4, 5), 2.0)
    depth[1, 2] = bad
    batch = collate_values([depth_sample(depth)])
    assert not batch["known"][0, 0, 1, 2]
    assert batch["known"].sum() == 19
    assert batch["truth"].isfinite().all()
    sample = depth_sample(depth)
    sample["valid"][0] = False
    assert collate_values([sample])["known"].sum() == 14


def test_values_may_be_negative_but_not_infinite() -> None:
    sample = {**depth_sample(torch.ones(2, 2)), "values": torch.tensor([[[-1.0, 0], [torch.inf, torch.nan]]])}
    assert known_values(sample).isfinite().tolist() == [[[True, True], [False, False]]]


@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_a_batch_without_truth_trains_nothing(kind: str) -> None:
    align = "least_squares" if kind == "relative" else "none"
    task = DepthTask(model_of(DEPTH), kind=kind, align=align)
    batch = collate_values([depth_sample(torch.full((32, 32), torch.nan))])
    loss = task.loss(task.model(batch["image"], batch["valid"]), batch["truth"], batch["known"])
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    gradients = [p.grad for p in task.model.trainable_parameters() if p.grad is not None]
    assert all((g == 0).all() for g in gradients)


def test_values_come_in_their_units() -> None:
    raw = torch.tensor([-1.0, 0, 2]).view(1, 1, 1, 3)
    assert torch.allclose(in_units(raw, (DEPTH,)), (1 + 0.5 * raw).exp())
    assert torch.allclose(in_units(raw, (ValueSpec("height", "m", mean=3, std=2),)), 3 + 2 * raw)
    assert in_units(raw, (ValueSpec("index"),)) is raw
    assert in_units(raw, ()) is raw


def test_augmented_depth_moves_with_its_image() -> None:
    depth = torch.arange(1.0, 1 + 40 * 50).view(40, 50)
    sample = depth_sample(depth)
    sample["image"] = depth.expand(3, -1, -1) / 2000
    sample["depth"] = depth.masked_fill(depth % 7 == 0, torch.nan)
    for flips in (True, "mirror"):
        augment = ValueAugment(crop=24, scale=(1.0, 1.0), flips=flips, affine=0, radiometric=0, display=0)
        out = augment(sample, np.random.default_rng(3))
        known = torch.isfinite(out["values"][0])
        assert out["values"].shape == (1, 24, 24)
        assert 0.7 < known.float().mean() < 0.95
        assert torch.allclose(out["values"][0][known], (out["image"][0] * 2000)[known], atol=0.5)
    mirrored = [augment(sample, np.random.default_rng(seed))["image"][0] for seed in range(12)]
    rising = [bool((m[:, 1:] > m[:, :-1]).all()) for m in mirrored]
    assert len(set(rising)) == 2  # left and right change places ...
    assert all((m[1:] > m[:-1]).all() for m in mirrored)  # ... up and down do not


def test_windows_beyond_the_image_are_unknown() -> None:
    augment = ValueAugment(crop=32, scale=(1.0, 1.0), flips=False, affine=0, radiometric=0, display=0)
    out = augment(depth_sample(torch.ones(20, 24)), np.random.default_rng(0))
    assert torch.isfinite(out["values"]).sum() == 20 * 24
    assert (torch.isfinite(out["values"][0]) == out["valid"]).all()


@pytest.fixture(scope="module")
def endo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("data")
    data = ["data.train=1", "data.val=1", "data.test=1", "data.frames=3", "data.size=[32,40]", "data.workers=1"]
    return [f"data_root={root}", *data]


def run_tool(endo: list[str], tmp_path: Path, *overrides: str) -> dict:
    return train.main(compose("train", ["task=depth", *SMALL, *endo, f"output={tmp_path / 'run'}", *overrides]))


def test_metric_depth_from_training_to_files(endo, tmp_path) -> None:
    from PIL import Image

    result = run_tool(endo, tmp_path, "task.align=median", "head=dpt_bins", "head.bins=8")
    assert result["steps"] == 2
    assert result["align"] == "median"
    assert 0 < result["abs_rel"] < 2
    assert len(result["previews"]) == 1
    model = vfmadapt.load(result["adapter_file"])
    assert model.spec.values[0].log
    with torch.inference_mode():
        assert (model(torch.rand(1, 3, 20, 30)) > 0).all()
    name = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(name)
    given = [f"adapter_file={result['adapter_file']}", f"input={name}", f"output={tmp_path / 'depth.tif'}"]
    more = ["formats=[npy,png,ply]", "focal=50", "png_scale=100", "device=cpu", "tile=64", "overlap=16"]
    told = predict.main(compose("predict", [*given, *more]))
    values = np.load(told["formats"]["npy"])
    assert values.shape == (40, 56)
    assert values.dtype == np.float32
    assert np.allclose(np.asarray(Image.open(told["formats"]["png"])), values * 100, atol=0.51)
    assert Path(told["preview"]).is_file()
    header, _, body = Path(told["formats"]["ply"]).read_bytes().partition(b"end_header\n")
    assert b"element vertex 2240\n" in header
    points = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    assert np.allclose(points["xyz"][:, 2], values.ravel())
    assert np.allclose(points["xyz"][0, :2], (np.array([-27.5, -19.5])) * values[0, 0] / 50, rtol=1e-5)
    split = ["data=endo_synthetic", *endo, f"adapter_file={result['adapter_file']}", "device=cpu"]
    again = evaluate.main(compose("evaluate", [*split, "align=median"]))
    assert again["abs_rel"] == pytest.approx(result["abs_rel"], rel=1e-4)
    assert again["plane_rmse"] < again["constant_rmse"]


def test_depth_of_a_video(endo, tmp_path) -> None:
    av = pytest.importorskip("av")
    result = run_tool(endo, tmp_path)
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3), dtype=np.uint8)
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    given = [
        f"adapter_file={result['adapter_file']}",
        f"input={path}",
        f"output={tmp_path / 'depth.npy'}",
        "device=cpu",
    ]
    told = predict.main(compose("predict", given))
    values = np.load(told["map"])
    assert values.shape == (4, 32, 48)
    assert (values > 0).all()
    assert Path(told["preview"]).stat().st_size > 0
    with pytest.raises(UserError, match=r"written as \.npy"):
        predict.main(compose("predict", [*given[:2], "output=a.tif"]))


def test_relative_depth_says_that_it_is(endo, tmp_path) -> None:
    result = run_tool(endo, tmp_path, "task.kind=relative", "task.align=least_squares")
    value = vfmadapt.load(result["adapter_file"]).spec.values[0]
    assert value.inverse
    split = ["data=endo_synthetic", *endo, f"adapter_file={result['adapter_file']}", "device=cpu"]
    with pytest.raises(UserError, match="relative inverse depth"):
        evaluate.main(compose("evaluate", split))
    assert evaluate.main(compose("evaluate", [*split, "align=least_squares"]))["align"] == "least_squares"


def test_relative_depth_is_of_a_picture_as_a_whole(endo, tmp_path, write_tiff) -> None:
    """Tiles of a scale and a shift of their own would not fit together."""
    file = run_tool(endo, tmp_path, "task.kind=relative", "task.align=least_squares")["adapter_file"]
    picture = np.random.default_rng(0).integers(1, 255, (3, 70, 90), dtype=np.uint8)
    name = write_tiff(tmp_path / "picture.tif", picture)
    given = [f"input={name}", f"output={tmp_path / 'depth.tif'}", "device=cpu", "preview=false", "formats=[npy]"]
    told = predict.main(compose("predict", [*given, f"adapter_file={file}", "tile=45", "overlap=16"]))
    small = F.interpolate(torch.from_numpy(picture)[None] / 255, (35, 45), mode="bilinear", antialias=True)
    with torch.inference_mode():
        wanted = F.interpolate(vfmadapt.load(file).eval()(small), (70, 90), mode="bilinear")[0, 0].numpy()
    assert np.allclose(np.load(told["formats"]["npy"]), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    other = shutil.copy(file, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="give its adapter_file= alone"):
        predict.main(compose("predict", [*given[:-1], f"adapter_file=[{file},{other}]"]))


def test_regression_of_heights(tmp_path) -> None:
    data = ["data=height_synthetic", "data.train=2", "data.val=1", "data.test=1", "data.size=64", "data.workers=1"]
    overrides = ["task=regression", "head=dpt", *SMALL, *data, f"data_root={tmp_path}", f"output={tmp_path / 'run'}"]
    result = train.main(compose("train", overrides))
    assert result["values"]["height"]["rmse"] == result["rmse"] > 0
    assert vfmadapt.load(result["adapter_file"]).spec.values[0].unit == "m"
    limits = ["fit_pixels=500", "score_pixels=500", f"data_root={tmp_path}"]
    checked = check_data.main(compose("check_data", [*data, *limits]))
    assert checked["value"] == "height"
    assert checked["constant"] > 0
    assert checked["per_pixel"] > 0


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (DepthTask, {"kind": "relative"}, "task.align=none: a relative depth has neither"),
        (DepthTask, {"kind": "absolute"}, "kind is metric or relative"),
        (DepthTask, {"variance": 2.0}, "variance 0 to 1"),
        (DepthTask, {"align": "mean"}, "allowed are none, median, least_squares"),
        (RegressionTask, {"loss": "l3"}, "allowed are l1, l2, huber"),
    ],
)
def test_impossible_settings_are_refused(task, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        task(model_of(DEPTH), **settings)


def test_data_of_the_wrong_kind_are_refused(tmp_path) -> None:
    scenes = ["data=urban_synthetic", "data.train=1", "data.val=1", "data.test=1", "data.size=64", "data.workers=1"]
    cfg = compose("train", ["task=depth", *scenes, f"data_root={tmp_path}", f"output={tmp_path}"])
    with pytest.raises(UserError, match="learns values of pixels"):
        train.main(cfg)
    with pytest.raises(UserError, match="without one; take"):
        DepthTask(model_of(ValueSpec("disparity", "px", inverse=True)))
    two = build_model(TINY, DataSpec("toy", BANDS, (), (0.5,) * 3, (0.2,) * 3, values=(DEPTH, DEPTH)))
    with pytest.raises(UserError, match="it takes one, depth"):
        DepthTask(two)


def test_loaders_of_values_batch_values(tmp_path) -> None:
    source = EndoSynthetic(tmp_path, train=1, val=1, test=1, frames=3, size=(32, 40), workers=1)
    source.prepare()
    data = ValueData(source, augment=ValueAugment(crop=16), batch_size=2)
    batch = next(iter(data.train_dataloader()))
    assert batch["truth"].shape == batch["known"].shape == (2, 1, 16, 16)
    assert next(iter(data.test_dataloader()))["truth"].shape == (1, 1, 32, 40)


def test_centres_of_bins_rise_within_their_span() -> None:
    from vfmadapt.contracts import Features
    from vfmadapt.heads.dpt_bins import DPTBinsHead

    spec = vit_spec(8, 4)
    head = DPTBinsHead(spec, num_classes=1, bins=16, span=2.0, width=8)
    grids = tuple(torch.randn(3, spec.dims[i], 2, 3) for i in head.layers)
    features = Features(grids, tuple(g.new_zeros(3, 0, 1) for g in grids), head.layers, (spec.strides[0],) * len(grids))
    centres = head.centres(features)[:, 0]
    assert (centres.diff() > 0).all()
    assert centres.abs().max() < 2
    assert not torch.allclose(centres[0], centres[1])
    found = head(features, (16, 24))
    assert found.abs().max() < 2
    with pytest.raises(UserError, match="at least 2"):
        DPTBinsHead(spec, num_classes=1, bins=1)
