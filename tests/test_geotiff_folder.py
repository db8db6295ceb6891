"""A user's folder of images and masks."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from vfmadapt.build import compose, data_source
from vfmadapt.contracts import IGNORE_INDEX, ClassSpec, DataSource
from vfmadapt.datasets.geotiff_folder import GeotiffFolder
from vfmadapt.errors import UserError

CLASSES = ["other", {"name": "water", "colour": [0, 0, 255]}]
PLACE = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_300_000, 10, 10)}


def tif(path, values, names=None, **profile):
    values = values[None] if values.ndim == 2 else values
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=values.dtype, **{**PLACE, **profile}
    ) as dst:
        dst.write(values)
        if names:
            dst.descriptions = names
    return path


def png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.moveaxis(values, 0, -1) if values.ndim == 3 else values).save(path)
    return path


def image(seed, bands=3, size=(20, 30), dtype=np.uint8):
    return np.random.default_rng(seed).integers(1, 250, (bands, *size)).astype(dtype)


def labels(seed, size=(20, 30)):
    return np.random.default_rng(100 + seed).integers(0, 2, size, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """20 pairs of GeoTIFFs in images/ and masks/."""
    for i in range(20):
        tif(tmp_path / "images" / f"s{i:02d}.tif", image(i))
        tif(tmp_path / "masks" / f"s{i:02d}.tif", labels(i))
    return tmp_path


def made(root, **settings):
    return GeotiffFolder(root=str(root), **{"classes": CLASSES, **settings})


def everything(data):
    return [data.split(s)[i] for s in ("train", "val", "test") for i in range(len(data.split(s)))]


def refused(data, text):
    with pytest.raises(UserError, match=text) as error:
        data.prepare()
    assert "\n" not in str(error.value)


def test_samples_keep_the_contract(folder):
    data = made(folder)
    assert isinstance(data, DataSource)
    data.prepare()
    assert data.spec.bands == ("red", "green", "blue")
    assert data.spec.classes == (ClassSpec("other", (34, 102, 51)), ClassSpec("water", (0, 0, 255)))
    samples = everything(data)
    assert sorted(s["id"] for s in samples) == [f"s{i:02d}" for i in range(20)]
    for sample in samples:
        number = int(sample["id"][1:])
        assert (sample["image"].dtype, sample["mask"].dtype, sample["valid"].dtype) == (
            torch.float32,
            torch.int64,
            torch.bool,
        )
        np.testing.assert_allclose(sample["image"].numpy(), image(number) / 255, rtol=1e-5)
        np.testing.assert_array_equal(sample["mask"].numpy(), labels(number))
        assert sample["bands"] == data.spec.bands
        assert "32632" in sample["crs"]
        assert sample["transform"] == (10, 0, 500_000, 0, -10, 5_300_000)


def test_statistics_are_those_of_valid_training_pixels(folder):
    values = image(3).astype(np.float32) / 255
    values[:, :10] = np.nan
    tif(folder / "images" / "s03.tif", values)
    data = made(folder)
    train = [data.split("train")[i] for i in range(len(data.split("train")))]
    assert "s03" in {s["id"] for s in train}
    pixels = np.concatenate([s["image"][:, s["valid"]].numpy() for s in train], axis=1)
    np.testing.assert_allclose(data.spec.mean, pixels.mean(1), rtol=1e-5)
    np.testing.assert_allclose(data.spec.std, pixels.std(1), rtol=1e-4)


def test_a_file_stays_in_its_split_when_others_come(folder):
    def places():
        data = made(folder, val_fraction=0.3, test_fraction=0.3)
        return {data.split(s)[i]["id"]: s for s in ("train", "val", "test") for i in range(len(data.split(s)))}

    before = places()
    assert set(before.values()) == {"train", "val", "test"}
    for i in range(20, 30):
        tif(folder / "images" / f"s{i:02d}.tif", image(i))
        tif(folder / "masks" / f"s{i:02d}.tif", labels(i))
    assert {k: v for k, v in places().items() if k in before} == before


@pytest.mark.parametrize("layout", ["{split}/{part}", "{part}/{split}"])
def test_folders_can_split(tmp_path, layout):
    for number, split in enumerate(("train", "val", "test")):
        for i in range(number + 1):
            tif(tmp_path / layout.format(split=split, part="images") / f"{split}{i}.tif", image(i))
            tif(tmp_path / layout.format(split=split, part="masks") / f"{split}{i}.tif", labels(i))
    data = made(tmp_path)
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [1, 2, 3]
    assert data.split("test")[2]["id"] == "test2"


def test_a_missing_split_says_what_to_do(tmp_path):
    for part, values in (("images", image(0)), ("masks", labels(0))):
        tif(tmp_path / "train" / part / "a.tif", values)
    with pytest.raises(UserError, match="none of its 1 images is for val"):
        made(tmp_path).split("val")
    with pytest.raises(UserError, match="allowed: train, val, test"):
        made(tmp_path).split("dev")


def test_pngs_and_suffixes_in_one_folder(tmp_path):
    for i in range(6):
        png(tmp_path / f"s{i}_image.png", image(i))
        png(tmp_path / f"s{i}_mask.png", labels(i))
    (tmp_path / "readme.txt").write_text("x")
    data = made(
        tmp_path, images=".", masks=".", image_suffix="_image", mask_suffix="_mask", test_fraction=1.0, val_fraction=0
    )
    samples = everything_of(data, "test")
    assert [s["id"] for s in samples] == [f"s{i}" for i in range(6)]
    assert samples[0]["crs"] is None
    assert samples[0]["transform"] is None
    refused(made(tmp_path, images=".", masks="."), "data.mask_suffix")


def everything_of(data, split):
    return [data.split(split)[i] for i in range(len(data.split(split)))]


def test_void_pixels_and_nodata_of_the_mask_are_ignored(tmp_path):
    values, target = image(0), labels(0)
    values[:, :5] = 0
    target[7] = 255
    target[9] = 99
    for name in ("a", "b"):
        tif(tmp_path / "images" / f"{name}.tif", values, nodata=0)
        tif(tmp_path / "masks" / f"{name}.tif", target, nodata=99)
    sample = made(tmp_path, test_fraction=1.0, val_fraction=0).split("test")[0]
    assert not sample["valid"][:5].any()
    assert (sample["image"][:, :5] == 0).all()
    assert (sample["mask"][[0, 1, 2, 3, 4, 7, 9]] == IGNORE_INDEX).all()
    np.testing.assert_array_equal(sample["mask"][10:].numpy(), target[10:])


def test_label_map(tmp_path):
    raw = np.array([[0, 255], [7, 3]], dtype=np.uint8)
    tif(tmp_path / "train/images/a.tif", image(0, size=(2, 2)))
    tif(tmp_path / "train/masks/a.tif", raw)
    data = made(tmp_path, label_map={"0": 0, 255: "water", 7: 1, 3: None})
    assert data.split("train")[0]["mask"].tolist() == [[0, 1], [1, IGNORE_INDEX]]
    refused(made(tmp_path, label_map={0: 0, 7: 1}), r"a.tif holds the labels \[3\]")
    for wrong, text in (({0: "sea"}, "no class 'sea'"), ({0: 5}, "no class 5"), ({"x": 0}, "whole numbers")):
        with pytest.raises(UserError, match=text):
            made(tmp_path, label_map=wrong)


def test_masks_of_0_and_255_are_no_silent_ignore(tmp_path):
    tif(tmp_path / "images/a.tif", image(0))
    tif(tmp_path / "masks/a.tif", labels(0) * 255)
    refused(made(tmp_path), r"data.label_map=\{0: 0, 255: 1\}")
    made(tmp_path, label_map={0: 0, 255: 1}).prepare()


def test_bands_by_name_whatever_their_order(tmp_path):
    values = image(0, bands=4, dtype=np.uint16)
    tif(tmp_path / "train/images/a.tif", values, names=("B02", "B03", "B04", "B08"))
    tif(tmp_path / "train/images/b.tif", values[::-1], names=("B08", "B04", "B03", "B02"))
    for name in "ab":
        tif(tmp_path / f"train/masks/{name}.tif", labels(0))
    data = made(tmp_path, bands=["B08", "B03"])
    first, second = data.split("train")[0], data.split("train")[1]
    assert data.spec.bands == ("B08", "B03")
    assert torch.equal(first["image"], second["image"])
    np.testing.assert_allclose(first["image"].numpy(), values[[3, 1]] / 10_000, rtol=1e-5)
    assert made(tmp_path).spec.bands == ("B02", "B03", "B04", "B08")
    np.testing.assert_allclose(made(tmp_path, scale=1.0).split("train")[0]["image"].numpy(), values)
    refused(made(tmp_path, bands=["B08", "B11"]), "wanted are 2")


def test_four_named_bands_where_gdal_sees_an_alpha(tmp_path):
    values = image(0, bands=4)
    tif(tmp_path / "train/images/a.tif", values, photometric="rgb", alpha="yes")
    tif(tmp_path / "train/masks/a.tif", labels(0))
    data = made(tmp_path, bands=["red", "green", "blue", "nir"])
    np.testing.assert_allclose(data.split("train")[0]["image"].numpy(), values / 255, rtol=1e-5)
    assert made(tmp_path).spec.bands == ("red", "green", "blue")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda r: (r / "masks/s03.tif").unlink(), r"s03\.tif in .*images: no mask"),
        (lambda r: tif(r / "masks/s03.tif", labels(0, (20, 31))), "s03.tif is 20 x 31 pixels, its image 20 x 30"),
        (lambda r: tif(r / "images/s03.tif", image(0, bands=2)), "s03.tif has 2 bands, .*s00.tif has 3"),
        (
            lambda r: tif(r / "masks/s03.tif", labels(0) + 1),
            r"s03.tif holds the labels \[2\]; allowed: \[0, 1\] and 255",
        ),
        (lambda r: tif(r / "masks/s03.tif", image(0)), "s03.tif has 3 bands; a mask has one"),
        (lambda r: (r / "images/s03.tif").write_text("no"), "s03.tif cannot be read"),
        (
            lambda r: (r / "masks/s03.tif").write_bytes((r / "masks/s03.tif").read_bytes()[:300]),
            "s03.tif cannot be read",
        ),
        (lambda r: png(r / "images/s03.png", image(0)), "same name s03"),
        (lambda r: (r / "masks").rename(r / "other"), "masks: no such folder"),
        (lambda r: (r / "images").rename(r / "other"), "images: no such folder"),
        (lambda r: [p.unlink() for p in (r / "images").iterdir()], "no image in images/"),
    ],
)
def test_what_is_wrong_is_named(folder, damage, text):
    damage(folder)
    refused(made(folder), text)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"classes": None}, "data.classes"),
        ({"classes": "water"}, "data.classes"),
        ({"classes": ["a"]}, "2 to 255"),
        ({"classes": ["a", "a"]}, "different names"),
        ({"classes": ["a", {"name": "b", "color": [1, 2, 3]}]}, "no class"),
        ({"classes": ["a", {"name": "b", "colour": [1, 2]}]}, "colour of three"),
        ({"val_fraction": 0.7, "test_fraction": 0.7}, "sum to at most 1"),
    ],
)
def test_wrong_settings(tmp_path, settings, text):
    with pytest.raises(UserError, match=text):
        made(tmp_path, **settings)


def test_missing_root(tmp_path):
    refused(made(tmp_path / "nothing"), "no such folder")


def test_samples_go_to_worker_processes(folder):
    split = made(folder).split("train")
    again = pickle.loads(pickle.dumps(split))
    assert torch.equal(again[0]["image"], split[0]["image"])


def test_the_entry_of_the_registry(folder):
    cfg = compose("train", ["data=geotiff_folder", f"data.root={folder}", "data.classes=[other,water]"])
    assert data_source(cfg).spec.bands == ("red", "green", "blue")
    assert Path(data_source(cfg).root) == folder
