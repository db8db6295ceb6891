"""Maps of generated and real rasters."""

import json
import logging

import numpy as np
import pytest
import rasterio
import torch
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from torch import nn

from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.files import atomic_path
from vfmadapt.raster.io import raster_info
from vfmadapt.raster.predict import predict_raster
from vfmadapt.raster.preview import VOID_COLOUR, write_preview

CLASSES = (
    ClassSpec("clear", (34, 102, 51)),
    ClassSpec("thick cloud", (255, 255, 255)),
    ClassSpec("thin cloud", (120, 190, 255)),
    ClassSpec("shadow", (90, 40, 120)),
)
CENTRES = torch.tensor([0.3, 0.8, 0.5, 0.1]).view(1, 4, 1, 1)


class PerPixel(nn.Module):
    """Class of the nearest brightness: every pixel by itself, so tiling must not matter at all."""

    def __init__(self, bands=("red", "green", "blue")):
        super().__init__()
        count = len(bands)
        self.spec = DataSpec("fake", tuple(bands), CLASSES, mean=(0.5,) * count, std=(0.2,) * count)
        self.calls = []

    def forward(self, image, valid):
        assert not self.training
        assert image.dtype == torch.float32
        assert valid.dtype == torch.bool
        assert valid.shape == (len(image), *image.shape[2:])
        self.calls.append(len(image))
        return -((image.mean(1, keepdim=True) - CENTRES) ** 2)


class Blurred(PerPixel):
    """Sees its surroundings: an 9 x 9 mean before the classes."""

    def forward(self, image, valid):
        return super().forward(nn.functional.avg_pool2d(image, 9, 1, 4, count_include_pad=False), valid)


def nearest(image):
    return np.abs(image.mean(0)[None] - CENTRES.numpy()[0]).argmin(0)


@pytest.fixture
def scene(write_tiff, tmp_path):
    values = np.random.default_rng(0).integers(1, 256, (3, 83, 131), dtype=np.uint8)
    return write_tiff(tmp_path / "scene.tif", values), values


def damaged(write_tiff, tmp_path, kind):
    good = write_tiff(tmp_path / "good.tif", np.random.default_rng(0).integers(0, 255, (3, 300, 300), dtype=np.uint8))
    bad = tmp_path / "bad.tif"
    if kind == "text":
        bad.write_text("no raster")
    elif kind == "empty":
        bad.touch()
    elif kind == "truncated":
        bad.write_bytes(good.read_bytes()[:40_000])
    elif kind == "folder":
        bad.mkdir()
    elif kind == "jpeg":
        from PIL import Image

        bad = tmp_path / "bad.jpg"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(bad)
        bad.write_bytes(bad.read_bytes()[:20_000])
    elif kind == "complex":
        write_tiff(bad, np.zeros((3, 8, 8), dtype=np.complex64))
    return bad


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "truncated", "jpeg", "complex"])
def test_unusable_input_is_one_line_and_leaves_nothing(write_tiff, tmp_path, kind, capfd, caplog):
    with pytest.raises(UserError) as error:
        predict_raster(PerPixel(), damaged(write_tiff, tmp_path, kind), tmp_path / "out" / "map.tif")
    assert "\n" not in str(error.value)
    assert "bad." in str(error.value)
    assert not list((tmp_path / "out").glob("*"))
    assert capfd.readouterr().err == ""
    assert not [r for r in caplog.records if r.name.startswith("rasterio")]


def test_an_alpha_band_is_data_only_if_listed(write_tiff, tmp_path):
    values = np.random.default_rng(0).integers(1, 255, (4, 20, 20), dtype=np.uint8)
    values[3, :10] = 0
    interp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    path = write_tiff(tmp_path / "a.tif", values, colorinterp=interp)
    model = PerPixel(("r", "g", "b", "nir"))
    with pytest.raises(UserError, match="an alpha band, 4"):
        predict_raster(model, path, tmp_path / "map.tif")
    assert predict_raster(model, path, tmp_path / "map.tif", bands=[1, 2, 3, 4]).void == 0
    assert predict_raster(PerPixel(), path, tmp_path / "map.tif").void == 200


@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (32, 0), (17, 11), (64, 32), (200, 64)])
def test_a_per_pixel_model_gives_the_map_of_the_whole_image(scene, tmp_path, tile, overlap):
    path, values = scene
    predict_raster(PerPixel(), path, tmp_path / "map.tif", tile=tile, overlap=overlap)
    with rasterio.open(tmp_path / "map.tif") as made:
        labels = made.read(1)
    expected = nearest(values.astype(np.float32) / 255)
    assert (labels != expected).mean() < 1e-3  # a sum of weights rounds; only exact ties may fall the other way


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (33, 1), (256, 257), (64, 64), (7, 300)])
def test_any_size(write_tiff, tmp_path, size):
    values = np.random.default_rng(0).integers(1, 256, (3, *size), dtype=np.uint8)
    path = write_tiff(tmp_path / "a.tif", values)
    result = predict_raster(PerPixel(), path, tmp_path / "map.tif", tile=64, overlap=16)
    assert result.size == size
    assert sum(result.pixels.values()) == size[0] * size[1]
    with rasterio.open(tmp_path / "map.tif") as made:
        assert (made.read(1) != nearest(values.astype(np.float32) / 255)).mean() < 0.01


def test_the_map_does_not_depend_on_the_batch(scene, tmp_path):
    path, _ = scene
    maps = []
    for batch in (1, 2, 3, 100):
        predict_raster(Blurred(), path, tmp_path / "map.tif", tile=32, overlap=8, batch=batch)
        maps.append((tmp_path / "map.tif").read_bytes())
    assert len(set(maps)) == 1
    with pytest.raises(UserError, match="batch=0"):
        predict_raster(Blurred(), path, tmp_path / "map.tif", batch=0)


def test_the_map_does_not_depend_on_where_the_raster_ends(write_tiff, scene, tmp_path):
    path, values = scene
    predict_raster(Blurred(), path, tmp_path / "whole.tif", tile=32, overlap=8)
    part = write_tiff(tmp_path / "part.tif", values[:, :70, :110])
    predict_raster(Blurred(), part, tmp_path / "part_map.tif", tile=32, overlap=8)
    with rasterio.open(tmp_path / "whole.tif") as a, rasterio.open(tmp_path / "part_map.tif") as b:
        whole, cut = a.read(1), b.read(1)
    np.testing.assert_array_equal(whole[: 70 - 32, : 110 - 32], cut[: 70 - 32, : 110 - 32])


def test_seams_do_not_show(write_tiff, tmp_path):
    ramp = np.linspace(0, 1, 150, dtype=np.float32)
    path = write_tiff(tmp_path / "a.tif", np.broadcast_to(ramp, (3, 100, 150)).copy())
    predict_raster(Blurred(), path, tmp_path / "map.tif", tile=48, overlap=24)
    with rasterio.open(tmp_path / "map.tif") as made:
        labels = made.read(1)
    assert (labels == labels[:1]).all()  # the same in every row, across the rows of tiles
    assert (np.diff(labels[0].astype(int)) != 0).sum() == 3  # shadow, clear, thin, thick: three borders


def test_georeference_classes_and_statistics_are_in_the_map(write_tiff, scene, tmp_path):
    path, values = scene
    values[:, :20] = 0
    write_tiff(path, values, nodata=0)
    result = predict_raster(PerPixel(), path, tmp_path / "map.tif", tile=64, overlap=16)
    with rasterio.open(path) as source, rasterio.open(tmp_path / "map.tif") as made:
        assert (made.crs, made.transform, made.shape) == (source.crs, source.transform, source.shape)
        assert made.dtypes == ("uint8",)
        assert made.nodata == 255
        assert made.block_shapes == [(512, 512)]
        assert made.compression.name == "deflate"
        labels, table, tags = made.read(1), made.colormap(1), made.tags()
        assert made.descriptions == ("class",)
    assert (labels[:20] == 255).all()
    assert (labels[20:] < 4).all()
    assert [table[i][:3] for i in range(4)] == [c.colour for c in CLASSES]
    assert table[255][3] == 0
    assert json.loads(tags["CLASS_NAMES"]) == [c.name for c in CLASSES]
    assert tags["CLASS_3"] == "shadow"
    counts = {c.name: int((labels == i).sum()) for i, c in enumerate(CLASSES)}
    assert json.loads(tags["CLASS_PIXELS"]) == counts == result.pixels
    assert result.void == 20 * 131
    assert sum(result.shares.values()) == pytest.approx(1)
    assert result.area_km2["shadow"] == pytest.approx(counts["shadow"] * 100 / 1e6)
    assert json.loads(tags["CLASS_AREA_KM2"])["shadow"] == pytest.approx(result.area_km2["shadow"], abs=1e-5)


def test_ground_control_points_are_kept(write_tiff, tmp_path):
    points = [GroundControlPoint(r, c, 7 + c / 100, 47 - r / 100) for r in (0, 40) for c in (0, 60)]
    path = write_tiff(
        tmp_path / "a.tif", np.full((3, 40, 60), 90, dtype=np.uint8), gcps=(points, rasterio.CRS.from_epsg(4326))
    )
    predict_raster(PerPixel(), path, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as made:
        kept, crs = made.gcps
    assert crs.to_epsg() == 4326
    assert [(p.row, p.col, p.x, p.y) for p in kept] == [(p.row, p.col, p.x, p.y) for p in points]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_without_georeference_is_mapped_with_one_warning(tmp_path, suffix, caplog, recwarn):
    from PIL import Image

    path = tmp_path / f"photo{suffix}"
    Image.fromarray(np.full((50, 70, 3), 200, dtype=np.uint8)).save(path)
    result = predict_raster(PerPixel(), path, tmp_path / "map.tif", tile=32, overlap=8)
    assert result.pixels["thick cloud"] == 50 * 70
    assert result.area_km2 is None
    assert [r.levelno for r in caplog.records if r.levelno > logging.INFO] == [logging.WARNING]
    assert "no CRS" in caplog.text
    assert not recwarn.list
    assert raster_info(tmp_path / "map.tif").crs is None


def test_an_empty_raster_gives_an_empty_map_and_no_forward(write_tiff, tmp_path, caplog):
    path = write_tiff(tmp_path / "a.tif", np.zeros((3, 90, 70), dtype=np.uint8), nodata=0)
    model = PerPixel()
    result = predict_raster(model, path, tmp_path / "map.tif", tile=32, overlap=8)
    with rasterio.open(tmp_path / "map.tif") as made:
        assert (made.read(1) == 255).all()
    assert (result.void, sum(result.pixels.values()), model.calls) == (90 * 70, 0, [])
    assert "no valid pixel" in caplog.text


def test_tiles_without_data_are_skipped(write_tiff, tmp_path, caplog):
    caplog.set_level("INFO")
    values = np.zeros((3, 64, 256), dtype=np.uint8)
    values[:, :, :10] = 100
    model = PerPixel()
    predict_raster(model, write_tiff(tmp_path / "a.tif", values, nodata=0), tmp_path / "map.tif", tile=64, overlap=0)
    assert model.calls == [4]  # a batch is always full: one tile, repeated
    assert "tiles forwarded / planned 0.25" in caplog.text


def test_the_mode_of_every_module_is_restored(scene, tmp_path):
    model = PerPixel()
    model.frozen = nn.Dropout().eval()
    model.train()
    model.frozen.eval()
    predict_raster(model, scene[0], tmp_path / "map.tif")
    assert model.training
    assert not model.frozen.training


def test_scores_that_are_nan_are_an_error(scene, tmp_path):
    class Broken(PerPixel):
        def forward(self, image, valid):
            return super().forward(image, valid) / 0 * 0

    with pytest.raises(UserError, match="check scale="):
        predict_raster(Broken(), scene[0], tmp_path / "map.tif")
    assert not (tmp_path / "map.tif").exists()


def test_values_in_other_units_are_told(write_tiff, tmp_path, caplog):
    path = write_tiff(tmp_path / "a.tif", np.full((3, 20, 20), 3000, dtype=np.float32))
    predict_raster(PerPixel(), path, tmp_path / "map.tif")
    assert "check scale=" in caplog.text
    caplog.clear()
    predict_raster(PerPixel(), path, tmp_path / "map.tif", scale=1e-4)
    assert not caplog.records


def test_outputs_that_cannot_be(scene, tmp_path):
    path, _ = scene
    (tmp_path / "file").touch()
    (tmp_path / "folder.tif").mkdir()
    for output, text in (
        (tmp_path / "map.png", "GeoTIFF"),
        (path, "input itself"),
        (tmp_path / "folder.tif", "is a folder"),
        (tmp_path / "file" / "map.tif", "cannot write"),
    ):
        with pytest.raises(UserError, match=text):
            predict_raster(PerPixel(), path, output)


def test_atomic_path_makes_folders_and_cleans_up(tmp_path):
    with atomic_path(tmp_path / "a" / "b.txt") as temporary:
        temporary.write_text("x")
        assert not (tmp_path / "a" / "b.txt").exists()
    assert (tmp_path / "a" / "b.txt").read_text() == "x"
    with pytest.raises(ValueError, match="stop"), atomic_path(tmp_path / "a" / "c.txt") as temporary:
        raise ValueError("stop")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_preview_of_a_large_raster_is_small(write_tiff, tmp_path):
    values = np.random.default_rng(0).integers(1, 255, (3, 700, 1300), dtype=np.uint8)
    values[:, :100] = 0
    path = write_tiff(tmp_path / "a.tif", values, nodata=0)
    result = predict_raster(PerPixel(), path, tmp_path / "map.tif")
    made = write_preview(
        path,
        tmp_path / "map.tif",
        tmp_path / "map.png",
        bands=(1, 2, 3),
        names=("r", "g", "b"),
        classes=CLASSES,
        shares=result.shares,
        max_side=500,
    )
    from PIL import Image

    with Image.open(made) as picture:
        assert picture.width < 2 * 500
        assert VOID_COLOUR in {c for _, c in picture.getcolors(1 << 24)}


def fake(info):
    return PerPixel(tuple(info.band_names[b - 1] or f"band{b}" for b in info.data_bands))


CASES = (
    "clp cog_dateline cog_gcps_ovr cog_int16 cog_nodata_nan cog_nonearth cog_rgb cog_scale cog_tags cog_uint8_rgb_mask "
    "cog_uint8_rgb_nodata cog_uint8_rgba inverted_lat lowres"
)


@pytest.mark.parametrize(
    "name", [*CASES.split(), pytest.param("cog_cmap", marks=pytest.mark.slow)]
)  # 62 million pixels
def test_real_rasters_are_mapped_where_they_lie(real_data, tmp_path, name):
    path, out = real_data / "geotiff_cases" / f"{name}.tif", tmp_path / "map.tif"
    result = predict_raster(fake(raster_info(path)), path, out, tile=512, overlap=32)
    with rasterio.open(path) as source, rasterio.open(out) as made:
        assert made.shape == source.shape
        assert made.crs == source.crs
        assert made.transform == source.transform
        assert len(made.gcps[0]) == len(source.gcps[0])
        assert made.gcps[1] == source.gcps[1]
        void = source.dataset_mask() == 0
        if source.dtypes[0].startswith("float"):
            void |= np.isnan(source.read(1))
        np.testing.assert_array_equal(made.read(1) == 255, void)
    assert result.void == void.sum()


def test_hls_scene_with_ten_bands(real_data, tmp_path):
    path = real_data / "hls" / "hls_10band.tif"
    result = predict_raster(
        PerPixel([f"b{i}" for i in range(10)]), path, tmp_path / "map.tif", scale=1e-4, tile=100, overlap=20
    )
    assert result.size == (224, 224)
    assert result.void == 0
    with pytest.raises(UserError, match="10 bands"):
        predict_raster(PerPixel(), path, tmp_path / "other.tif")
    assert not (tmp_path / "other.tif").exists()
