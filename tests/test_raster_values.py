"""Maps of continuous values: what GDAL reads back is what the model gave."""

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rio_cogeo import cog_validate
from torch import nn

import vfmadapt
from vfmadapt.build import build_model, compose
from vfmadapt.contracts import ClassSpec, DataSpec, ValueSpec
from vfmadapt.errors import UserError
from vfmadapt.predict import main
from vfmadapt.raster.blocks import compress, decompress
from vfmadapt.raster.moments import joined, moments, statistics
from vfmadapt.raster.predict import Settings, merge_parts, predict_part, predict_raster

VALUES = (ValueSpec("canopy height", "m"), ValueSpec("index"))
BANDS = ("red", "green", "blue")
SPEC = DataSpec("trees", BANDS, (), mean=(0.5,) * 3, std=(0.2,) * 3, values=VALUES)
SMALL = {"tile": 64, "overlap": 16, "block": 512}


class Heights(nn.Module):
    """Two values of each pixel; with `size` they come from random weights over so many pixels."""

    def __init__(self, size=None, stop=None):
        super().__init__()
        self.spec, self.size, self.stop, self.calls = SPEC, size, stop, 0
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 2, size or 1, padding=(size or 1) // 2)
        if size is None:
            with torch.no_grad():
                self.layer.weight[:] = torch.tensor([[40.0, 0, 0], [0, -1, 1]])[..., None, None]
                self.layer.bias[:] = torch.tensor([-5.0, 0])

    def forward(self, image, valid):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return self.layer(image * valid[:, None])


def expected(scene):
    """What the model of single pixels gives, NaN where void."""
    with rasterio.open(scene) as source:
        image, valid = source.read().astype(np.float32) / 255, source.dataset_mask() > 0
    return np.where(valid, np.stack([40 * image[0] - 5, image[2] - image[1]]), np.nan)


@pytest.fixture(scope="module")
def scene(write_tiff, tmp_path_factory):
    """701 x 1103 pixels with a void corner larger than an output tile, and void pixels all over: six blocks of 512."""
    y, x = np.mgrid[0:701, 0:1103] / 17
    values = np.stack([127 + 100 * np.sin(y + i) * np.cos(x - i) for i in range(3)]).astype(np.uint8)
    values[:, :600, :600] = 0
    values[:, np.random.default_rng(0).random((701, 1103)) < 0.01] = 0
    return write_tiff(tmp_path_factory.mktemp("scene") / "scene.tif", values, nodata=0, tiled=True)


@pytest.fixture(scope="module")
def made(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "map.tif"
    return predict_raster(Heights(), scene, path, **SMALL), path


@pytest.fixture(scope="module")
def convolved(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "map.tif"
    predict_raster(Heights(7), scene, path, **SMALL)
    return path


def pixels(path, **options):
    with rasterio.open(path, **options) as file:
        return file.read()


def test_the_map_is_what_the_model_gave(scene, made):
    result, path = made
    wanted = expected(scene)
    np.testing.assert_allclose(pixels(path), wanted, atol=1e-5)
    assert (result.pixels, result.area_km2, result.scores) == ({}, None, None)
    assert result.void == np.isnan(wanted[0]).sum()
    height = result.values["canopy height"]
    found = (height.least, height.greatest, height.mean, height.deviation)
    of = wanted[0][~np.isnan(wanted[0])].astype(np.float64)
    assert found == pytest.approx((of.min(), of.max(), of.mean(), of.std()), rel=1e-5)


def test_the_map_is_a_valid_cog_that_says_what_it_is(made):
    result, path = made
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as file:
        assert file.dtypes == ("float32", "float32")
        assert np.isnan(file.nodatavals).all()
        assert file.descriptions == ("canopy height", "index")
        assert file.units == ("m", None)
        assert not any(name.startswith("CLASS") for name in file.tags())
        assert file.tags(ns="IMAGE_STRUCTURE")["PREDICTOR"] == "3"
        for band, value in enumerate(VALUES, start=1):
            tags, found = file.tags(band), result.values[value.name]
            said = [float(tags[f"STATISTICS_{n}"]) for n in ("MINIMUM", "MAXIMUM", "MEAN", "STDDEV")]
            assert said == pytest.approx([found.least, found.greatest, found.mean, found.deviation], rel=1e-6)


def means(values):
    """Mean of the values among each 2 x 2, by rows and columns that are filled up with NaN."""
    _, height, width = values.shape
    filled = np.pad(values, [(0, 0), (0, height % 2), (0, width % 2)], constant_values=np.nan)
    four = np.stack([filled[:, y::2, x::2] for y in (0, 1) for x in (0, 1)])
    known = ~np.isnan(four)
    with np.errstate(invalid="ignore"):
        return (np.where(known, four, 0).sum(axis=0, dtype=np.float64) / known.sum(axis=0)).astype(np.float32)


@pytest.mark.parametrize("window", [None, [0, 0, 601, 803], [37, 411, 601, 601]])
def test_overviews_are_means_of_the_pixels_with_data_inside_the_window(scene, tmp_path, window):
    path = tmp_path / "map.tif"
    predict_raster(Heights(), scene, path, **SMALL, window=window)
    level = pixels(path)
    with rasterio.open(path) as file:
        overviews = len(file.overviews(1))
    assert overviews == (2 if window is None else 1)
    for index in range(overviews):
        level = means(level)
        np.testing.assert_array_equal(pixels(path, overview_level=index), level)


@pytest.mark.parametrize("window", [[0, 0, 600, 700], [512, 512, 100, 512], [37, 411, 600, 601], [700, 1102, 1, 1]])
def test_a_window_has_the_bytes_of_that_part(scene, convolved, tmp_path, window):
    result = predict_raster(Heights(7), scene, tmp_path / "map.tif", **SMALL, window=window)
    row, column, height, width = window
    whole = pixels(convolved)[:, row : row + height, column : column + width]
    np.testing.assert_array_equal(pixels(tmp_path / "map.tif"), whole)
    assert cog_validate(tmp_path / "map.tif", strict=True)[0]
    assert result.void == np.isnan(whole[0]).sum()


def test_tiles_blend_to_the_whole_image(scene, convolved):
    with rasterio.open(scene) as source, torch.inference_mode():
        valid = torch.from_numpy(source.dataset_mask() > 0)[None]
        whole = Heights(7)(torch.from_numpy(source.read()).float()[None] / 255, valid)[0].numpy()
    inside = valid[0].numpy()
    inside[-3:], inside[:, -3:] = False, False  # tiles hang over the raster's edge and are filled up by reflection
    np.testing.assert_allclose(pixels(convolved)[:, inside], whole[:, inside], atol=1e-5)


def test_the_same_bytes_from_other_blocks_and_parts_and_after_an_interruption(scene, convolved, tmp_path):
    predict_raster(Heights(7), scene, tmp_path / "large.tif", **SMALL | {"block": 2048})
    np.testing.assert_array_equal(pixels(tmp_path / "large.tif"), pixels(convolved))
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Heights(7, stop=50), scene, tmp_path / "map.tif", **SMALL)
    assert list(tmp_path.glob("map.tif.blocks/*/*.block"))
    predict_raster(Heights(7), scene, tmp_path / "map.tif", **SMALL)
    assert (tmp_path / "map.tif").read_bytes() == convolved.read_bytes()
    for index in (1, 0):
        predict_part(Heights(7), scene, tmp_path / "parts.tif", Settings(**SMALL), index=index, of=2)
    merge_parts(tmp_path / "parts.tif")
    assert (tmp_path / "parts.tif").read_bytes() == convolved.read_bytes()


def test_all_void(write_tiff, tmp_path):
    path = write_tiff(tmp_path / "a.tif", np.zeros((3, 520, 70), dtype=np.uint8), nodata=0)
    result = predict_raster(Heights(), path, tmp_path / "map.tif", **SMALL)
    assert (result.values, result.void) == ({}, 520 * 70)
    assert np.isnan(pixels(tmp_path / "map.tif")).all()
    assert cog_validate(tmp_path / "map.tif", strict=True)[0]


def test_what_does_not_go_together(scene, tmp_path):
    with pytest.raises(UserError, match=r"layers=\['entropy'\] are scores of classes, the model gives values"):
        predict_raster(Heights(), scene, tmp_path / "map.tif", layers=["entropy"])
    with pytest.raises(UserError, match="both has classes and values"):
        DataSpec("both", BANDS, (ClassSpec("a", (0, 0, 0)),), (0.5,) * 3, (0.2,) * 3, values=VALUES)


def test_tiles_of_floats():
    tile = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    tile[3:50, 7] = np.nan
    tile[0, :4] = 0, -0.0, np.inf, 1e-42
    np.testing.assert_array_equal(decompress(compress(tile), np.float32).view(np.uint32), tile.view(np.uint32))
    assert compress(np.full((512, 512), np.nan, dtype=np.float32)) == b""
    assert np.isnan(decompress(b"", np.float32)).all()


def test_statistics_of_pieces_are_those_of_the_whole():
    values = np.random.default_rng(0).normal(1000, 3, (2, 999)).astype(np.float32)
    found = moments(values[:, :0])
    for piece in np.array_split(values, [1, 1, 400], axis=1):
        found = joined(found, moments(piece))
    for band, row in zip(values.astype(np.float64), found, strict=True):
        made = statistics(row, band.size)
        assert (made.least, made.greatest) == (band.min(), band.max())
        assert (made.mean, made.deviation) == pytest.approx((band.mean(), band.std()), rel=1e-6)


def test_from_an_adapter_file_to_map_and_picture(scene, tmp_path):
    config = {
        "backbone": {
            "_target_": "vfmadapt.backbones.timm_models.timm_backbone",
            "name": "vit_tiny_patch16_224",
            "pretrained": False,
            "settings": {"embed_dim": 32, "depth": 2, "num_heads": 2},
        },
        "adapter": {"_target_": "vfmadapt.adapters.frozen.Frozen"},
        "head": {"_target_": "vfmadapt.heads.linear.LinearHead"},
    }
    adapter = vfmadapt.save(tmp_path / "a.safetensors", build_model(config, SPEC))
    assert vfmadapt.load(adapter).spec == SPEC
    given = [f"input={scene}", f"adapter_file={adapter}", f"output={tmp_path / 'map.tif'}", "window=[500,600,90,200]"]
    told = main(compose("predict", [*given, "tile=64", "overlap=16", "device=cpu"]))
    assert told["values"].keys() == {"canopy height", "index"}
    assert pixels(told["map"]).shape == (2, 90, 200)
    with Image.open(told["preview"]) as picture:
        assert picture.mode == "RGB"
