"""The tool `predict`, from an adapter file to map and picture."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

import vfmadapt
from vfmadapt.build import build_model, compose
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.predict import main

ROOT = Path(__file__).resolve().parents[1]
SPEC = DataSpec(
    name="toy",
    bands=("red", "green", "blue"),
    classes=(ClassSpec("land", (10, 120, 10)), ClassSpec("sea", (10, 10, 200)), ClassSpec("ice", (220, 240, 255))),
    mean=(0.5, 0.5, 0.5),
    std=(0.3, 0.3, 0.3),
)
TINY = {
    "backbone": {
        "_target_": "vfmadapt.backbones.timm_models.timm_backbone",
        "name": "vit_tiny_patch16_224",
        "pretrained": False,
        "settings": {"embed_dim": 32, "depth": 4, "num_heads": 2},
    },
    "adapter": {"_target_": "vfmadapt.adapters.frozen.Frozen"},
    "head": {"_target_": "vfmadapt.heads.linear.LinearHead"},
}
SMALL = ["tile=64", "overlap=16", "device=cpu"]


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model(TINY, SPEC)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_()
    return vfmadapt.save(tmp_path_factory.mktemp("adapter") / "a.safetensors", model)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Smooth, so that classes form regions; a void corner."""
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    y, x = np.mgrid[0:150, 0:210] / 30
    values = np.stack([127 + 100 * np.sin(y + i) * np.cos(x - i) for i in range(3)]).astype(np.uint8)
    values[:, :40, :50] = 0
    place = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_300_000, 10, 10)}
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=150, width=210, dtype="uint8", nodata=0, **place
    ) as dst:
        dst.write(values)
    return path


def predict(*overrides):
    return main(compose("predict", [*SMALL, *overrides]))


def test_map_picture_and_result(adapter_file, scene, tmp_path):
    result = predict(f"input={scene}", f"adapter_file={adapter_file}", f"output={tmp_path}/out/m.tif")
    assert result["map"] == str(tmp_path / "out" / "m.tif")
    assert result["preview"] == str(tmp_path / "out" / "m_preview.png")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m.tif", "m_preview.png"]
    json.dumps(result)
    with rasterio.open(scene) as source, rasterio.open(result["map"]) as made:
        assert (made.crs, made.transform, made.shape) == (source.crs, source.transform, source.shape)
        labels = made.read(1)
    assert (labels[:40, :50] == 255).all()
    assert result["void"] == 40 * 50
    assert result["size"] == [150, 210]
    assert result["pixels_per_class"] == {c.name: int((labels == i).sum()) for i, c in enumerate(SPEC.classes)}
    assert sum(result["shares"].values()) == pytest.approx(1)
    with Image.open(result["preview"]) as picture:
        assert picture.width > 2 * 210


def test_parts_and_merge_give_the_bytes_of_one_run(adapter_file, scene, tmp_path):
    given = [f"input={scene}", f"adapter_file={adapter_file}", "window=[20,30,110,150]", "layers=[entropy]"]
    one = predict(*given, f"output={tmp_path}/one.tif")
    assert one["size"] == [110, 150]
    assert Path(one["preview"]).exists()
    parts = [*given, f"output={tmp_path}/two.tif", "engine=array", "of=2"]
    assert [predict(*parts, f"index={i}")["blocks"] for i in (1, 0)] == [0, 1]
    two = predict("engine=merge", f"output={tmp_path}/two.tif")
    assert two["pixels_per_class"] == one["pixels_per_class"]
    for key in ("map", "scores"):
        assert Path(two[key]).read_bytes() == Path(one[key]).read_bytes()
    for wrong, text in ((["engine=array"], "index= and of="), (["index=0", "of=2"], "engine=array")):
        with pytest.raises(UserError, match=text):
            predict(*given, *wrong)
    with pytest.raises(UserError, match="output= is missing"):
        predict("engine=merge")


def test_the_map_agrees_with_the_model_and_with_any_batch(adapter_file, scene, tmp_path):
    model = vfmadapt.load(adapter_file)
    maps = {}
    for batch in (1, 5):
        predict(
            f"input={scene}",
            f"adapter_file={adapter_file}",
            f"output={tmp_path}/m.tif",
            "preview=false",
            f"batch={batch}",
        )
        with rasterio.open(tmp_path / "m.tif") as made:
            maps[batch] = made.read(1)
    assert (maps[1] != maps[5]).mean() < 1e-4  # a GEMM of another shape may round a tie the other way
    assert not (tmp_path / "m_preview.png").exists()
    predict(f"input={scene}", f"adapter_file={adapter_file}", f"output={tmp_path}/m.tif", "tile=256", "overlap=0")
    with rasterio.open(scene) as source:
        image = torch.from_numpy(source.read()).float()[None] / 255
        valid = torch.from_numpy(source.dataset_mask() > 0)[None]
    padded = torch.nn.functional.pad(image, (0, 46, 0, 106), mode="reflect")
    mask = torch.nn.functional.pad(valid[None].float(), (0, 46, 0, 106), mode="reflect")[0] > 0
    with torch.inference_mode():
        expected = model(padded, mask).argmax(1)[0, :150, :210].numpy()
    with rasterio.open(tmp_path / "m.tif") as made:
        labels = made.read(1)
    assert (labels != expected)[valid[0].numpy()].mean() < 1e-4
    assert len(np.unique(labels)) > 2


def test_the_output_has_a_default_place(adapter_file, scene, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = predict(f"input={scene}", f"adapter_file={adapter_file}", "preview=false")
    assert result["map"] == str(Path("runs/predict/scene_mask.tif"))
    assert result["preview"] is None
    assert (tmp_path / result["map"]).exists()


def test_bands_are_chosen(adapter_file, tmp_path):
    path = tmp_path / "a.tif"
    place = {"crs": "EPSG:32632", "transform": from_origin(0, 0, 10, 10)}
    with rasterio.open(path, "w", driver="GTiff", count=5, height=30, width=30, dtype="uint16", **place) as dst:
        dst.write(np.full((5, 30, 30), 3000, dtype=np.uint16))
    given = [f"input={path}", f"adapter_file={adapter_file}", f"output={tmp_path}/m.tif"]
    with pytest.raises(UserError, match=r"5 bands, wanted are 3 \(red, green, blue\).*bands="):
        predict(*given)
    assert predict(*given, "bands=[3,2,1]")["void"] == 0


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "input= is missing"),
        (["input=SCENE"], "adapter_file= is missing"),
        (["input=nowhere.tif", "adapter_file=ADAPTER"], "no such file: nowhere.tif"),
        (["input=SCENE", "adapter_file=nowhere.safetensors"], "nowhere.safetensors"),
        (["input=SCENE", "adapter_file=SCENE"], "not an adapter file"),
        (["input=SCENE", "adapter_file=ADAPTER", "tile=16", "overlap=16"], "makes no grid"),
        (["input=SCENE", "adapter_file=ADAPTER", "device=abacus"], "device=abacus"),
        (["input=SCENE", "adapter_file=ADAPTER", "output=m.png"], "ends in .tif"),
    ],
)
def test_what_is_wrong_is_one_line(adapter_file, scene, tmp_path, monkeypatch, overrides, text):
    monkeypatch.chdir(tmp_path)
    filled = [o.replace("SCENE", str(scene)).replace("ADAPTER", str(adapter_file)) for o in overrides]
    with pytest.raises(UserError, match=text) as error:
        predict(*filled)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_command_line(adapter_file, scene, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tools" / "predict.py"),
        *SMALL,
        f"adapter_file={adapter_file}",
        "format=json",
    ]
    done = subprocess.run([*command, f"input={scene}"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / result["map"]).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    assert "map: runs" in done.stderr
    (tmp_path / "bad.tif").write_bytes(scene.read_bytes()[:2000])
    done = subprocess.run([*command, "input=bad.tif"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: a block of bad.tif failed; rows 0 to")
    assert len(done.stderr.splitlines()) == 1


def test_real_pictures(real_data, adapter_file, tmp_path):
    for path in sorted((real_data / "satellite_png").glob("*.png"))[:2]:
        result = predict(f"input={path}", f"adapter_file={adapter_file}", f"output={tmp_path}/m.tif", "tile=256")
        with Image.open(path) as picture:
            assert result["size"] == [picture.height, picture.width]
        assert result["area_km2"] is None
