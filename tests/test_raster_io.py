"""Rasters in: void pixels, units, choice of bands."""

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from vfmadapt.errors import UserError
from vfmadapt.raster.bands import select_bands
from vfmadapt.raster.io import open_raster, raster_info


@pytest.mark.parametrize("kind", ["nodata", "nan", "mask", "alpha", "alpha_and_nodata"])
def test_every_way_to_say_void(write_tiff, tmp_path, kind):
    hole = np.zeros((40, 50), dtype=bool)
    hole[5:20, 10:30] = True
    values = np.random.default_rng(0).integers(1, 255, (3, 40, 50)).astype(np.uint8)
    path = tmp_path / "a.tif"
    alpha = np.where(hole, 0, 255).astype(np.uint8)
    interp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    if kind == "nodata":
        write_tiff(path, np.where(hole, 0, values).astype(np.uint8), nodata=0)
    elif kind == "nan":
        write_tiff(path, np.where(hole, np.nan, values / 255).astype(np.float32), nodata=float("nan"))
    elif kind == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            write_tiff(path, values, mask=alpha)
    else:
        nodata = {"nodata": 0} if kind == "alpha_and_nodata" else {}
        write_tiff(path, np.concatenate([values, alpha[None]]), colorinterp=interp, **nodata)
    with open_raster(path) as raster:
        assert raster.info.data_bands == (1, 2, 3)
        image, valid = raster.read((1, 2, 3))
        part, inside = raster.read((3, 1), row=3, column=7, height=20, width=11)
    np.testing.assert_array_equal(valid, ~hole)
    np.testing.assert_allclose(image, np.where(hole, 0, values / 255), rtol=1e-5)
    np.testing.assert_array_equal(part, image[[2, 0], 3:23, 7:18])
    np.testing.assert_array_equal(inside, valid[3:23, 7:18])


def test_scale_tags_of_the_file(write_tiff, tmp_path):
    path = write_tiff(
        tmp_path / "a.tif", np.full((2, 4, 4), 3000, dtype=np.int16), scales=(1e-4, 1.0), offsets=(-0.1, 0.0)
    )
    with open_raster(path) as raster:
        np.testing.assert_allclose(raster.read((2, 1))[0][:, 0, 0], [3000, 0.2], rtol=1e-5)


def test_bands_by_name_by_order_and_as_listed(write_tiff, tmp_path, caplog):
    values = np.zeros((3, 4, 4), dtype=np.uint8)
    named = raster_info(write_tiff(tmp_path / "a.tif", values, descriptions=("Blue", "Green", "Red")))
    plain = raster_info(write_tiff(tmp_path / "b.tif", values))
    wanted = ("red", "green", "blue")
    assert select_bands(named, wanted) == (3, 2, 1)
    assert select_bands(named, ("green",)) == (2,)
    assert select_bands(plain, wanted) == (1, 2, 3)
    assert select_bands(plain, wanted, [2, 2, 3]) == (2, 2, 3)
    assert select_bands(plain, ("blue", "green", "red")) == (3, 2, 1)  # GDAL knows the colours of three 8-bit bands
    twice = raster_info(write_tiff(tmp_path / "c.tif", values, descriptions=("x", "x", "x")))
    assert select_bands(twice, ("x", "x", "x")) == (1, 2, 3)
    caplog.clear()
    assert select_bands(plain, ("b04", "b03", "b02")) == (1, 2, 3)
    assert not caplog.records
    assert select_bands(named, ("b1", "b2", "b3")) == (1, 2, 3)
    assert "names differ" in caplog.text


def test_bands_that_do_not_fit_say_what_there_is(write_tiff, tmp_path):
    info = raster_info(write_tiff(tmp_path / "a.tif", np.zeros((2, 4, 4), dtype=np.uint8), descriptions=("VV", "VH")))
    for bands, text in (
        (None, r"has 2 bands \(VV, VH\).*3 \(r, g, b\).*bands=\["),
        ([1, 2], "does not fit"),
        ([1, 2, 3], "from 1 to 2"),
    ):
        with pytest.raises(UserError, match=text):
            select_bands(info, ("r", "g", "b"), bands)
