"""Rasters of many bands: what a model of a few bands is given of them."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from sklearn.decomposition import PCA
from torch import nn

from vfmadapt.build import compose
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster import reduction
from vfmadapt.raster.io import open_raster, raster_info
from vfmadapt.raster.planning import Settings, make_plan
from vfmadapt.raster.predict import predict_part, predict_raster, shown_bands
from vfmadapt.raster.reduction import read_reduced, reduce_bands
from vfmadapt.raster.tiling import Area

CLASSES = tuple(ClassSpec(name, (i * 60, 50, 200)) for i, name in enumerate(("a", "b", "c")))
SPEC = DataSpec("fake", ("red", "green", "nir"), CLASSES, mean=(0.3, 0.4, 0.5), std=(0.1, 0.2, 0.3))


class Brightest(nn.Module):
    """The class of the brightest band."""

    def __init__(self):
        super().__init__()
        self.spec = SPEC

    def forward(self, image, valid):
        return image


def spectra(bands, height, width, seed=0):
    """Reflectance (bands, height, width) of four smooth materials in mixture, and a little noise."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 6, bands)
    materials = np.stack([0.4 + 0.2 * np.sin(x * f + p) for f, p in rng.uniform(0.3, 1.5, (4, 2))])
    shares = rng.dirichlet(np.ones(4), (height, width))
    values = np.einsum("hwm,mb->bhw", shares, materials) + rng.normal(0, 0.005, (bands, height, width))
    return values.astype(np.float32)


def reduced(path, kind, spec=SPEC, area=None, **units):
    units = {"scale": None, "offset": None} | units
    with open_raster(path) as raster:
        bands, mix = reduce_bands(raster, spec, kind, **units)
        area = area or Area(0, 0, raster.info.height, raster.info.width)
        return bands, mix, *read_reduced(raster, bands, mix, area, **units)


def test_means_of_neighbouring_bands(write_tiff, tmp_path):
    values = spectra(11, 40, 50)
    values[:, 7, 9] = np.nan
    bands, _, image, valid = reduced(write_tiff(tmp_path / "a.tif", values), "mean")
    assert bands == tuple(range(1, 12))
    expected = np.stack([values[:4].mean(0), values[4:8].mean(0), values[8:].mean(0)])
    expected[:, 7, 9] = 0
    np.testing.assert_allclose(image, expected, atol=2e-6)
    assert not valid[7, 9]
    assert valid.sum() == 40 * 50 - 1


@pytest.mark.parametrize("layout", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 32}], ids=["strips", "tiles"])
def test_pieces_make_up_any_area(write_tiff, tmp_path, monkeypatch, layout):
    path = write_tiff(tmp_path / "a.tif", spectra(20, 90, 70), **layout)
    _, _, whole, _ = reduced(path, "mean")
    monkeypatch.setattr(reduction, "_PIECE", 4 * 20 * 16 * 5)
    for area in (Area(0, 0, 90, 70), Area(13, 21, 60, 49), Area(89, 69, 1, 1)):
        _, _, image, valid = reduced(path, "mean", area=area)
        np.testing.assert_allclose(image, whole[:, area.row : area.bottom, area.column : area.right], atol=1e-6)
        assert valid.all()


def test_components_are_those_of_sklearn_in_the_units_of_the_model(write_tiff, tmp_path):
    values = spectra(40, 32, 32)  # a piece of the sample: all of it is seen
    _, mix, image, _ = reduced(write_tiff(tmp_path / "a.tif", values), "pca")
    pixels = values.reshape(40, -1).T
    expected = PCA(3, svd_solver="full").fit(pixels)
    scores = expected.transform(pixels) / np.sqrt(expected.explained_variance_)
    for index in range(3):
        weights = np.array(mix[index][:-1])
        assert weights[np.abs(weights).argmax()] > 0
        sign = np.sign(weights @ expected.components_[index])
        got = (image[index].ravel() - SPEC.mean[index]) / SPEC.std[index]
        np.testing.assert_allclose(got, sign * scores[:, index], atol=2e-3)


def test_components_do_not_depend_on_the_window_and_survive_the_manifest(write_tiff, tmp_path):
    path = write_tiff(tmp_path / "a.tif", spectra(30, 200, 150))
    plans = [
        make_plan(Brightest(), str(path), torch.device("cpu"), Settings(bands="pca", window=window))[0]
        for window in (None, [0, 0, 9, 9])
    ]
    assert plans[0].mix == plans[1].mix
    assert type(plans[0]).from_json(plans[0].to_json()) == plans[0]
    assert plans[0].differences(replace(plans[0], mix=plans[0].mix[::-1])) == ["bands"]


def test_a_component_that_the_raster_does_not_have_is_constant(write_tiff, tmp_path):
    values = np.random.default_rng(0).random((1, 32, 32), dtype=np.float32) * np.ones((5, 1, 1), dtype=np.float32)
    _, _, image, _ = reduced(write_tiff(tmp_path / "a.tif", values), "pca")
    assert image[0].std() == pytest.approx(SPEC.std[0], rel=1e-3)
    np.testing.assert_allclose(image[1:], np.broadcast_to([[[0.4]], [[0.5]]], (2, 32, 32)), atol=1e-6)


def tagged(write_tiff, path, lengths, values=None, domain="IMAGERY", **profile):
    count = len(lengths)
    values = values if values is not None else np.asarray(lengths, dtype=np.float32)[:, None, None] * np.ones((8, 9))
    write_tiff(path, values.astype(np.float32), **profile)
    with rasterio.open(path, "r+") as file:
        for band in range(1, count + 1):
            if domain == "IMAGERY":
                file.update_tags(band, ns="IMAGERY", CENTRAL_WAVELENGTH_UM=str(lengths[band - 1]))
            else:
                file.update_tags(band, wavelength=str(lengths[band - 1] * 1000), wavelength_units="Nanometers")
    return path


@pytest.mark.parametrize("domain", ["IMAGERY", "plain"])
def test_bands_by_wavelength(write_tiff, tmp_path, domain):
    """The value is the wavelength, so that the model's band is that at which the response is centred."""
    lengths = np.round(np.arange(0.4, 1.0, 0.005), 4)
    bands, mix, image, _ = reduced(tagged(write_tiff, tmp_path / "a.tif", lengths, domain=domain), "wavelength")
    np.testing.assert_allclose(image[:, 0, 0], [0.665, 0.560, 0.833], atol=1e-3)
    assert all(0.52 < lengths[b - 1] < 0.95 for b in bands)
    weights = np.array(mix)
    np.testing.assert_allclose(weights[:, :-1].sum(axis=1), 1, atol=1e-5)
    red = {round(float(lengths[b - 1]), 4): w for b, w in zip(bands, weights[0], strict=False)}
    assert red[0.665] / red[0.68] == pytest.approx(2, rel=0.1)  # half the width from the centre: half the weight


def test_wavelengths_of_an_envi_header_without_its_bad_bands(tmp_path):
    path = tmp_path / "a.img"
    lengths = [550, 560, 570, 660, 665, 670, 820, 833, 845]
    shape = {"count": 9, "height": 6, "width": 7, "dtype": "float32"}
    with rasterio.open(path, "w", driver="ENVI", crs="EPSG:32632", **shape) as file:
        file.write(np.asarray(lengths, dtype=np.float32)[:, None, None] * np.ones((1, 6, 7), dtype=np.float32))
    with (tmp_path / "a.hdr").open("a") as header:
        header.write(f"wavelength units = Nanometers\nwavelength = {{{', '.join(map(str, lengths))}}}\n")
        header.write("bbl = {1, 1, 0, 1, 1, 1, 1, 1, 1}\n")
    bands, _, image, _ = reduced(path, "wavelength")
    assert bands == (1, 2, 4, 5, 6, 7, 8, 9)
    np.testing.assert_allclose(image[:, 0, 0], [665, 557, 833], atol=2)


@pytest.mark.parametrize("kind", ["mean", "pca"])
def test_bands_that_hold_no_data_are_left_out(write_tiff, tmp_path, kind):
    """Water vapour bands of imaging spectrometers: void in every pixel, which elsewhere makes the pixel void."""
    values = spectra(8, 40, 40)
    values[[2, 5]] = -9999
    bands, mix, _, valid = reduced(write_tiff(tmp_path / "a.tif", values, nodata=-9999), kind)
    assert bands == (1, 2, 4, 5, 7, 8)
    assert {len(row) for row in mix} == {7}
    assert valid.all()


def test_refusals(write_tiff, tmp_path):
    plain = write_tiff(tmp_path / "plain.tif", spectra(12, 20, 20))
    short = tagged(write_tiff, tmp_path / "short.tif", [0.45, 0.56, 0.665, 0.70])
    few = write_tiff(tmp_path / "few.tif", spectra(2, 20, 20))
    void = write_tiff(tmp_path / "void.tif", np.full((5, 9, 9), np.nan, dtype=np.float32))
    other = replace(SPEC, bands=("red", "green", "vv"))
    for path, kind, spec, text in (
        (plain, "median", SPEC, "bands=median: allowed are mean, pca, wavelength, or numbers"),
        (plain, "wavelength", SPEC, "does not say its bands' wavelengths"),
        (short, "wavelength", SPEC, r"no band within 106 nm of nir, 833 nm; its bands lie from 450 to 700 nm"),
        (plain, "wavelength", other, "'vv' is not known; known are coastal, blue"),
        (few, "mean", SPEC, r"few\.tif has 2 bands with data, wanted are 3 or more"),
        (void, "pca", SPEC, r"void\.tif has 0 bands with data"),
        (write_tiff(tmp_path / "tiny.tif", spectra(5, 1, 1)), "pca", SPEC, "holds 1 valid pixels, too few"),
    ):
        with pytest.raises(UserError, match=text) as error:
            reduced(path, kind, spec)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def hyperspectral(write_tiff, tmp_path_factory):
    """300 bands of 16 bits, four blocks of 512."""
    shares = np.random.default_rng(0).integers(0, 4000, (3, 600, 560)).astype(np.uint16)
    values = np.repeat(shares, 100, axis=0) + np.arange(300, dtype=np.uint16)[:, None, None]
    values[:, :70, :90] = 0
    return write_tiff(tmp_path_factory.mktemp("scene") / "a.tif", values, nodata=0, tiled=True, interleave="band")


@pytest.mark.parametrize("kind", ["mean", "pca"])
def test_300_bands(hyperspectral, tmp_path, kind):
    settings = {"tile": 128, "overlap": 16, "block": 512, "bands": kind}
    result = predict_raster(Brightest(), hyperspectral, tmp_path / "whole.tif", **settings)
    assert result.void == 70 * 90
    assert min(result.pixels.values()) > 0.02 * 600 * 560
    predict_raster(Brightest(), hyperspectral, tmp_path / "part.tif", **settings, window=[500, 40, 90, 500])
    with rasterio.open(tmp_path / "whole.tif") as whole, rasterio.open(tmp_path / "part.tif") as part:
        np.testing.assert_array_equal(part.read(1), whole.read(1)[500:590, 40:540])
        if kind == "mean":
            with rasterio.open(hyperspectral) as file:
                expected = file.read([50, 150, 250]).astype(float)
            labels = whole.read(1)
            clear = (np.sort(expected, axis=0)[-1] - np.sort(expected, axis=0)[-2] > 5) & (labels != 255)
            np.testing.assert_array_equal(labels[clear], expected.argmax(0)[clear])


def test_components_are_kept_over_an_interruption(hyperspectral, tmp_path):
    settings = Settings(tile=128, overlap=16, block=512, bands="pca")
    assert predict_part(Brightest(), hyperspectral, tmp_path / "a.tif", settings, index=1, of=2) == 2
    with pytest.raises(UserError, match="interrupted run with another bands"):
        predict_part(Brightest(), hyperspectral, tmp_path / "a.tif", replace(settings, bands="mean"), index=0, of=2)
    assert predict_part(Brightest(), hyperspectral, tmp_path / "a.tif", settings, index=0, of=2) == 2


def test_memory_does_not_grow_with_the_bands(write_tiff, tmp_path, monkeypatch):
    monkeypatch.setattr(reduction, "_PIECE", 4 << 20)
    path = write_tiff(tmp_path / "a.tif", np.ones((300, 160, 512), dtype=np.uint8), tiled=True, blockxsize=64)
    with open_raster(path) as raster:
        bands, mix = reduce_bands(raster, SPEC, "mean", scale=None, offset=None)
        tracemalloc.start()
        read_reduced(raster, bands, mix, Area(0, 0, 160, 512), scale=None, offset=None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20  # all bands at once are 98 MB as floats


def test_what_a_picture_shows(write_tiff, tmp_path):
    info = raster_info(write_tiff(tmp_path / "a.tif", np.ones((9, 4, 4), dtype=np.uint8)))
    assert shown_bands(info, SPEC.bands, "mean") == (2, 5, 8)
    assert shown_bands(info, SPEC.bands, [3, 2, 1]) == (3, 2, 1)


def test_the_setting():
    assert compose("predict", ["bands=pca"]).bands == "pca"
    assert compose("predict", ["bands=[3,2,1]"]).bands == [3, 2, 1]
    with pytest.raises(UserError, match=r"bands=median: wanted is .*mean, pca, wavelength"):
        compose("predict", ["bands=median"])
