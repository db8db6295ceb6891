"""Several adapters on one raster: read once, and each map as if its adapter were alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

import vfmadapt
from vfmadapt.build import build_model, compose, entry
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.predict import main
from vfmadapt.raster import reading
from vfmadapt.raster.predict import Settings, merge_parts, predict_many, predict_part, predict_raster
from vfmadapt.testing import BACKBONES, perturb

SETTINGS = {"tile": 64, "overlap": 16, "block": 512, "window": [470, 480, 90, 80]}  # four blocks meet in it


def spec(classes, mean=0.4, bands=("red", "green", "blue")):
    named = tuple(ClassSpec(str(i), (i, i, i)) for i in range(classes))
    return DataSpec("data", bands, named, (mean,) * 3, (0.2,) * 3)


def write(path, adapter, data, family="vit", **settings):
    name, tiny = BACKBONES[family]
    backbone = {
        "_target_": "vfmadapt.backbones.timm_models.timm_backbone",
        "name": name,
        "pretrained": False,
        "settings": dict(tiny),
    }
    nodes = {
        "backbone": backbone,
        "adapter": {**entry("adapter", adapter), **settings},
        "head": entry("head", "linear"),
    }
    model = build_model(nodes, data)
    perturb(model.backbone, amount=0.1)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_()
    return vfmadapt.save(path, model)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters after blocks, of weights, of the tokens, none; one that normalises otherwise."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "late": write(folder / "late.safetensors", "earth", spec(3), dim=4, layers=[2], fft_layers=[]),
        "other": write(folder / "other.safetensors", "earth", spec(2, mean=0.1), dim=4, layers=[1], fft_layers=[]),
        "bare": write(folder / "bare.safetensors", "frozen", spec(4)),
        "biases": write(folder / "biases.safetensors", "bitfit", spec(2)),
        "prompts": write(folder / "prompts.safetensors", "vpt", spec(5)),
        "first": write(folder / "first.safetensors", "ssf", spec(3)),  # from the patch embedding on
    }


@pytest.fixture(scope="module")
def scene(write_tiff, tmp_path_factory):
    """Smooth; only the middle, where the window lies, holds data: the rest of the blocks costs no forward pass."""
    y, x = np.mgrid[0:700, 0:700] / 17
    values = np.stack([127 + 100 * np.sin(y + i) * np.cos(x - i) for i in range(3)]).astype(np.uint8)
    inside = np.zeros((700, 700), dtype=bool)
    inside[480:550, 490:550] = True
    return write_tiff(tmp_path_factory.mktemp("scene") / "scene.tif", values * inside, nodata=0, tiled=True)


def the_same(folder, names, other):
    for name in names:
        for suffix in ("", "_scores"):
            one, two = folder / f"map_{name}{suffix}.tif", other / f"{name}{suffix}.tif"
            assert one.exists() == two.exists()
            assert not one.exists() or one.read_bytes() == two.read_bytes(), name


@pytest.fixture(scope="module")
def alone(files, scene, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name, file in files.items():
        predict_raster(vfmadapt.load(file), scene, folder / f"{name}.tif", **SETTINGS, layers=["entropy"])
    return folder


def test_the_maps_have_the_bytes_of_each_adapter_alone(files, scene, alone, tmp_path, monkeypatch):
    reads = []
    original = reading._rows_of
    monkeypatch.setattr(reading, "_rows_of", lambda plan, raster, i: reads.append(i) or original(plan, raster, i))
    settings = Settings(**SETTINGS, layers=["entropy"])
    results = predict_many(vfmadapt.load_many(files), scene, tmp_path / "map.tif", settings)
    assert sorted(reads) == [0, 1, 2, 3]
    assert list(results) == list(files)
    the_same(tmp_path, files, alone)
    assert len(list(tmp_path.iterdir())) == 2 * len(files)
    for name, result in results.items():
        assert result.path == tmp_path / f"map_{name}.tif"
        with rasterio.open(result.path) as made:
            assert len(json.loads(made.tags()["CLASS_NAMES"])) == len(result.pixels)
            assert result.void == (made.read(1) == 255).sum()


@pytest.mark.parametrize("family", ["dinov3", "samvit", "sam2_hiera"])
def test_in_turn_gives_what_each_gives_alone(family, tmp_path):
    chosen = {"late": ("earth", {"dim": 4, "layers": [2], "fft_layers": []}), "bare": ("frozen", {})}
    files = {n: write(tmp_path / f"{n}.safetensors", a, spec(3), family, **s) for n, (a, s) in chosen.items()}
    bank = vfmadapt.load_many(files)
    seen = []
    for block in bank.backbone.backbone.blocks():
        block.norm1.register_forward_hook(lambda *_: seen.append(1))
    image, valid = torch.rand(2, 3, 40, 52), torch.rand(2, 40, 52) > 0.1
    for _ in range(2):  # nothing stays of the first images
        found = bank.in_turn(image, valid)
        for file, logits in zip(files.values(), found, strict=True):
            with torch.no_grad():
                assert torch.equal(logits, vfmadapt.load(file)(image, valid))
        image = image.flip(0)
    depth = len(bank.backbone.backbone.blocks())
    assert len(seen) == 2 * (2 * depth - 2)  # the two blocks before the first adapted one: once for both


def test_what_is_before_the_first_adapted_block_runs_once(files):
    bank = vfmadapt.load_many({name: files[name] for name in ("late", "bare")})
    calls = []
    for index, block in enumerate(bank.backbone.backbone.blocks()):
        block.norm1.register_forward_hook(lambda *_, index=index: calls.append(index))
    bank.in_turn(torch.rand(1, 3, 32, 32), torch.ones(1, 32, 32, dtype=torch.bool))
    depth = len(bank.backbone.backbone.blocks())
    assert [calls.count(i) for i in range(depth)] == [1, 1, *[2] * (depth - 2)]


def test_an_interrupted_run_goes_on(files, scene, alone, tmp_path, monkeypatch):
    bank = vfmadapt.load_many(files)
    original, calls = bank.in_turn, []

    def in_turn(image, valid):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(image, valid)

    monkeypatch.setattr(bank, "in_turn", in_turn)
    settings = Settings(**SETTINGS, layers=["entropy"])
    with pytest.raises(KeyboardInterrupt):
        predict_many(bank, scene, tmp_path / "map.tif", settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"map_{n}.tif.blocks" for n in files)
    finished = [len(list(p.glob("*/*.block"))) for p in tmp_path.iterdir()]
    assert set(finished) == {min(finished)}
    with pytest.raises(UserError, match="with another tile"):
        predict_many(bank, scene, tmp_path / "map.tif", Settings(**SETTINGS | {"tile": 48}, layers=["entropy"]))
    predict_many(bank, scene, tmp_path / "map.tif", settings)
    the_same(tmp_path, files, alone)


def test_parts_and_merge(files, scene, alone, tmp_path):
    settings = Settings(**SETTINGS, layers=["entropy"])
    chosen = {name: files[name] for name in ("late", "prompts")}
    for index in (1, 0):
        blocks = predict_part(vfmadapt.load_many(chosen), scene, tmp_path / "map.tif", settings, index=index, of=2)
        assert blocks == 2
    for name in chosen:
        merge_parts(tmp_path / f"map_{name}.tif")
    the_same(tmp_path, chosen, alone)


def test_the_tool(files, scene, alone, tmp_path):
    given = [f"input={scene}", f"output={tmp_path}/map.tif", "device=cpu", "layers=[entropy]"]
    given += [f"{key}={str(value).replace(' ', '')}" for key, value in SETTINGS.items()]
    given.append(f"adapter_file=[{files['late']},{files['bare']}]")
    maps = main(compose("predict", given))["maps"]
    assert list(maps) == ["late", "bare"]
    assert Path(maps["late"]["preview"]) == tmp_path / "map_late_preview.png"
    the_same(tmp_path, maps, alone)
    for index in (0, 1):
        main(compose("predict", [*given, "engine=array", f"index={index}", "of=2"]))
    assert list(main(compose("predict", [*given, "engine=merge"]))["maps"]) == ["late", "bare"]
    the_same(tmp_path, maps, alone)


def test_refusals(files, scene, tmp_path):
    many = [f"input={scene}", "device=cpu", f"output={tmp_path}/m.tif"]
    many.append(f"adapter_file=[{files['late']},{files['bare']}]")
    with pytest.raises(UserError, match="compile=true goes with one adapter file"):
        main(compose("predict", [*many, "compile=true"]))
    with pytest.raises(UserError, match="have the same names, so would the maps"):
        main(compose("predict", [*many[:3], f"adapter_file=[{files['late']},{files['late']}]"]))
    with pytest.raises(UserError, match="late and other want other bands") as error:  # components in other units
        main(compose("predict", [*many[:3], f"adapter_file=[{files['late']},{files['other']}]", "bands=pca"]))
    assert "\n" not in str(error.value)
    turned = write(tmp_path / "turned.safetensors", "frozen", spec(3, bands=("blue", "green", "red")))
    with pytest.raises(UserError, match="weights"):
        main(compose("predict", [*many[:3], f"adapter_file=[{files['bare']},{turned}]"]))
    with pytest.raises(UserError, match="wanted here is one file"):
        vfmadapt.load([str(files["late"]), str(files["bare"])])
    assert [p.name for p in tmp_path.iterdir()] == ["turned.safetensors"]
