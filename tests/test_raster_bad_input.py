"""Odd, broken and hostile rasters: mapped right, or refused in one line."""

import errno
import os

import numpy as np
import pytest
import rasterio
import torch
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rio_cogeo import cog_validate
from torch import nn

from vfmadapt import files
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.io import raster_info
from vfmadapt.raster.predict import predict_raster

CLASSES = tuple(ClassSpec(name, (i * 60, 50, 200)) for i, name in enumerate(("dark", "middle", "bright")))
CENTRES = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1)


class Brightness(nn.Module):
    """The class of the nearest brightness, pixel by pixel."""

    def __init__(self, bands=3):
        super().__init__()
        self.spec = DataSpec("fake", tuple(f"b{i}" for i in range(bands)), CLASSES, (0.5,) * bands, (0.2,) * bands)
        self.calls = 0

    def forward(self, image, valid):
        self.calls += 1
        return -((image.mean(1, keepdim=True) - CENTRES) ** 2)


def noise(height, width, bands=3):
    return np.random.default_rng(0).integers(1, 256, (bands, height, width), dtype=np.uint8)


def expected(values):
    brightness = values.astype(np.float32).mean(0) / 255
    return np.abs(brightness[None] - CENTRES.numpy()[0]).argmin(0)


def mapped(path, out, bands=3, **settings):
    """Map a raster; the labels, after a look at what every map must be."""
    result = predict_raster(Brightness(bands), path, out, **{"tile": 64, "overlap": 16} | settings)
    with rasterio.open(out) as made, rasterio.open(path) as source:
        assert cog_validate(out, strict=source.width > 1)[0]  # one column: no overviews, of which a warning is given
        assert (made.shape, made.crs, made.transform) == (source.shape, source.crs, source.transform)
        labels = made.read(1)
    assert result.void == (labels == 255).sum()
    return labels


SIZES = {"one pixel": (1, 1), "one row": (1, 700), "one column": (700, 1), "smaller than a tile": (40, 50)}
SIZES |= {"a tile": (64, 64), "a tile and one pixel": (65, 65), "a tile and one column": (64, 65)}
SIZES |= {"an output tile and one pixel": (513, 513)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_sizes(write_tiff, tmp_path, size):
    values = noise(*size)
    labels = mapped(write_tiff(tmp_path / "a.tif", values), tmp_path / "map.tif")
    assert (labels != expected(values)).mean() < 0.01  # ties of brightness only


PLACES = {
    "rotated": {"transform": Affine(8, 6, 500_000, 6, -8, 5_300_000)},
    "south up": {"transform": Affine(10, 0, 500_000, 0, 10, 5_300_000)},
    "not square": {"transform": Affine(3, 0, 500_000, 0, -7, 5_300_000)},
    "no crs": {"crs": None},
    "no crs, no transform": {"crs": None, "transform": Affine.identity()},
    "degrees": {"crs": "EPSG:4326", "transform": Affine(1e-4, 0, 179.99, 0, -1e-4, 10)},
    "feet": {"crs": "EPSG:2263", "transform": Affine(1, 0, 980_000, 0, -1, 200_000)},
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_places(write_tiff, tmp_path, place):
    values = noise(70, 90)
    labels = mapped(write_tiff(tmp_path / "a.tif", values, **place), tmp_path / "map.tif")
    assert (labels != expected(values)).mean() < 0.01


def test_the_area_of_a_rotated_map_in_feet(write_tiff, tmp_path):
    place = {"crs": "EPSG:2263", "transform": Affine(8, 6, 980_000, 6, -8, 200_000)}
    path = write_tiff(tmp_path / "a.tif", noise(20, 30), **place)
    area = predict_raster(Brightness(), path, tmp_path / "map.tif").area_km2
    assert sum(area.values()) == pytest.approx(600 * 100 * (1200 / 3937) ** 2 / 1e6)


@pytest.mark.parametrize(
    "layout",
    [
        {"interleave": "band"},
        {"interleave": "pixel", "tiled": True, "blockxsize": 16, "blockysize": 32},
        {"compress": "jpeg", "jpeg_quality": 100},
        {"bigtiff": "YES", "endianness": "BIG"},
        {"photometric": "minisblack"},
        {"compress": "deflate", "predictor": 2},
    ],
    ids=str,
)
def test_layouts(write_tiff, tmp_path, layout):
    values = np.repeat(np.repeat(noise(10, 12), 16, axis=1), 16, axis=2)
    labels = mapped(write_tiff(tmp_path / "a.tif", values, **layout), tmp_path / "map.tif")
    assert (labels != expected(values)).mean() < 0.05  # JPEG moves values a little


def test_all_nodata(write_tiff, tmp_path, caplog):
    path = write_tiff(tmp_path / "a.tif", np.zeros((3, 600, 70), dtype=np.uint8), nodata=0)
    assert (mapped(path, tmp_path / "map.tif") == 255).all()
    assert "no valid pixel" in caplog.text


@pytest.mark.parametrize("kind", ["nan", "infinite", "nodata", "mask", "alpha"])
def test_one_void_pixel_does_not_spread(write_tiff, tmp_path, kind):
    values = noise(100, 130).astype(np.float32) / 255
    void = np.zeros((100, 130), dtype=bool)
    void[50, 60] = True
    path, profile = tmp_path / "a.tif", {}
    if kind in ("nan", "infinite"):
        values[1, void] = np.nan if kind == "nan" else np.inf
    elif kind == "nodata":
        values[:, void], profile = -9999, {"nodata": -9999}
    elif kind == "mask":
        profile = {"mask": np.where(void, 0, 255).astype(np.uint8)}
    else:
        interp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
        values, profile = np.concatenate([values, ~void[None] * np.float32(1)]), {"colorinterp": interp}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_tiff(path, values, **profile)
    labels = mapped(path, tmp_path / "map.tif")
    np.testing.assert_array_equal(labels == 255, void)


@pytest.mark.parametrize("side", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_header_that_claims_far_more_pixels_than_there_are(tmp_path, side):
    """What a sparse file leaves out is skipped: without reading it, without a forward pass."""
    path = tmp_path / "sparse.tif"
    shape = {"height": side, "width": side, "count": 3, "dtype": "uint8", "blockxsize": 4096, "blockysize": 4096}
    with rasterio.open(
        path, "w", driver="GTiff", sparse_ok=True, tiled=True, bigtiff="YES", compress="deflate", nodata=0, **shape
    ) as file:
        file.write(np.full((3, 3, 4), 200, dtype=np.uint8), window=rasterio.windows.Window(side // 2, side // 3, 4, 3))
    model = Brightness()
    with rasterio.open(path) as file:
        assert file.shape == (side, side)
    result = predict_raster(model, path, tmp_path / "map.tif", tile=512, overlap=0, block=512 * 32)
    assert result.size == (side, side)
    assert model.calls == 1
    assert result.pixels["bright"] == 12


def broken(write_tiff, folder, kind):
    path = folder / "bad.tif"
    good = write_tiff(folder / "good.tif", noise(300, 300))
    if kind == "zero bytes":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:100_000])
    elif kind == "header only":
        path.write_bytes(good.read_bytes()[:400])
    elif kind == "text":
        path.write_text("no raster")
    elif kind == "folder":
        path.mkdir()
    elif kind == "complex":
        write_tiff(path, np.zeros((3, 8, 8), dtype=np.complex64))
    elif kind == "random tiles":
        write_tiff(path, noise(300, 300), compress="deflate", tiled=True)
        data = bytearray(path.read_bytes())
        data[2000:60_000] = np.random.default_rng(1).bytes(58_000)
        path.write_bytes(data)
    elif kind == "units":
        write_tiff(path, np.ones((3, 8, 8), dtype=np.uint32))
    return path


KINDS = [
    "missing",
    "zero bytes",
    "truncated",
    "header only",
    "text",
    "folder",
    "complex",
    "random tiles",
    "units",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_mapped_is_one_line(write_tiff, tmp_path, kind, capfd):
    path = broken(write_tiff, tmp_path, kind)
    with pytest.raises(UserError) as error:
        predict_raster(Brightness(), path, tmp_path / "out" / "map.tif")
    assert "\n" not in str(error.value)
    assert "bad.tif" in str(error.value)
    assert not list((tmp_path / "out").glob("*"))
    assert capfd.readouterr().err == ""


def test_a_full_disk_stops_with_one_line_and_goes_on_later(write_tiff, tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tif", noise(600, 1500))
    settings = {"tile": 64, "overlap": 16, "block": 512}
    predict_raster(Brightness(), path, tmp_path / "reference.tif", **settings)
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk of .*map\.tif; make room"):
        predict_raster(Brightness(), path, tmp_path / "map.tif", **settings)
    monkeypatch.undo()
    assert not (tmp_path / "map.tif").exists()
    assert 1 <= len(list((tmp_path / "map.tif.blocks").glob("*/*.block"))) < 6
    predict_raster(Brightness(), path, tmp_path / "map.tif", **settings)
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "reference.tif").read_bytes()


REAL = "clp cog_cmap cog_dateline cog_gcps_ovr cog_int16 cog_nodata_nan cog_nonearth cog_rgb cog_scale cog_tags"
REAL += " cog_uint8_rgb_mask cog_uint8_rgb_nodata cog_uint8_rgba inverted_lat lowres"


@pytest.mark.parametrize("name", REAL.split())
def test_real_files(real_data, tmp_path, name):
    path, out = real_data / "geotiff_cases" / f"{name}.tif", tmp_path / "map.tif"
    info = raster_info(path)
    bands = len(info.data_bands)
    side = 1000 if max(info.height, info.width) > 5000 else 0  # a part of the 62 million pixels of cog_cmap
    window = [info.height // 2, info.width // 2, side, side] if side else None
    result = predict_raster(Brightness(bands), path, out, tile=256, overlap=32, block=1024, window=window)
    assert cog_validate(out, strict=True)[0]
    with rasterio.open(path) as source, rasterio.open(out) as made:
        if window is None:
            assert (made.crs, made.transform) == (source.crs, source.transform)
            assert made.gcps[1] == source.gcps[1]
            assert [(p.row, p.col, p.x, p.y) for p in made.gcps[0]] == [
                (p.row, p.col, p.x, p.y) for p in source.gcps[0]
            ]
        part = None if window is None else rasterio.windows.Window(window[1], window[0], side, side)
        void = source.dataset_mask(window=part) == 0
        if source.dtypes[0].startswith("float"):
            void |= np.isnan(source.read(1, window=part))
        np.testing.assert_array_equal(made.read(1) == 255, void)
    assert result.void == void.sum()
