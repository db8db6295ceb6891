"""Many files as one raster."""

import json

import numpy as np
import pytest
from rasterio.transform import from_origin

from vfmadapt.errors import UserError
from vfmadapt.raster.io import open_raster
from vfmadapt.raster.mosaic import one_raster

VALUES = np.random.default_rng(0).integers(1, 255, (2, 60, 80), dtype=np.uint8)


@pytest.fixture
def quarters(write_tiff, tmp_path):
    """Four files that make up VALUES, and a text file among them."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    (folder / "readme.txt").write_text("not a raster")
    for r in (0, 30):
        for c in (0, 50):
            part = VALUES[:, r : r + 30, c : c + (50 if c == 0 else 30)]
            place = from_origin(500_000 + 10 * c, 5_300_000 - 10 * r, 10, 10)
            write_tiff(folder / f"{r}_{c}.tif", part, transform=place, nodata=0, descriptions=("vv", "vh"))
    return folder


def read(path):
    with open_raster(path) as raster:
        image, valid = raster.read((1, 2), scale=1.0)
        return raster.info, image, valid


@pytest.mark.parametrize("kind", ["folder", "glob", "collection"])
def test_a_mosaic(quarters, tmp_path, kind):
    given = {"folder": str(quarters), "glob": f"{quarters}/*_*.tif", "collection": str(quarters / "collection.json")}
    links = []
    for file in quarters.glob("*.tif"):
        item = {"type": "Feature", "assets": {"image": {"href": file.name, "roles": ["data"]}, "thumb": {"href": "x"}}}
        (quarters / f"{file.stem}.json").write_text(json.dumps(item))
        links.append({"rel": "item", "href": f"./{file.stem}.json"})
    (quarters / "collection.json").write_text(json.dumps({"type": "Collection", "links": links}))
    path = one_raster(given[kind], tmp_path / "map.tif")
    assert path == str(tmp_path / "map_input.vrt")
    info, image, valid = read(path)
    np.testing.assert_array_equal(image, VALUES)
    assert valid.all()
    assert info.band_names == ("vv", "vh")
    assert info.transform == from_origin(500_000, 5_300_000, 10, 10)
    before = (tmp_path / "map_input.vrt").stat().st_mtime_ns
    one_raster(given[kind], tmp_path / "map.tif")
    assert (tmp_path / "map_input.vrt").stat().st_mtime_ns == before


def test_a_hole_in_a_mosaic_is_void(quarters, tmp_path):
    (quarters / "30_0.tif").unlink()
    _, _, valid = read(one_raster(str(quarters), tmp_path / "map.tif"))
    expected = np.ones((60, 80), dtype=bool)
    expected[30:, :50] = False
    np.testing.assert_array_equal(valid, expected)


def test_one_file_per_band(write_tiff, tmp_path):
    (tmp_path / "scene").mkdir()
    write_tiff(tmp_path / "scene" / "B02.tif", VALUES[:1])
    coarse = VALUES[1:, ::2, ::2]
    write_tiff(tmp_path / "scene" / "B11.tif", coarse, transform=from_origin(500_000, 5_300_000, 20, 20))
    assets = {n: {"href": f"scene/{n}.tif", "type": "image/tiff; application=geotiff"} for n in ("B02", "B11")}
    (tmp_path / "item.json").write_text(json.dumps({"type": "Feature", "assets": assets}))
    for given in ("scene", "item.json"):
        info, image, _ = read(one_raster(str(tmp_path / given), tmp_path / "map.tif"))
        assert info.band_names == ("B02", "B11")
        np.testing.assert_array_equal(image[0], VALUES[0])
        np.testing.assert_array_equal(image[1], np.repeat(np.repeat(coarse[0], 2, 0), 2, 1))


def test_a_single_raster_is_left_alone(quarters, tmp_path):
    file = str(quarters / "0_0.tif")
    assert one_raster(file, tmp_path / "map.tif") == file
    assert one_raster(f"{quarters}/0_0*.tif", tmp_path / "map.tif") == file
    assert one_raster("https://example.org/a*.tif", tmp_path / "map.tif") == "https://example.org/a*.tif"
    assert one_raster("nowhere.tif", tmp_path / "map.tif") == "nowhere.tif"
    assert [p.name for p in tmp_path.iterdir()] == ["tiles"]


def test_files_that_do_not_fit(quarters, write_tiff, tmp_path):
    for name, profile in (
        ("crs", {"crs": "EPSG:32633"}),
        ("shifted", {"transform": from_origin(500_004, 5_300_000, 10, 10)}),
        ("size", {"transform": from_origin(500_000, 5_300_000, 12, 12)}),
    ):
        path = write_tiff(quarters / f"z_{name}.tif", VALUES[:, :7, :9], nodata=0, **profile)
        with pytest.raises(UserError, match=rf"z_{name}\.tif and .*0_0\.tif are not of one grid"):
            one_raster(str(quarters), tmp_path / "map.tif")
        path.unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    for given, text in (("empty", "no raster there"), ("*.xyz", "no raster there"), ("bad.json", "no STAC item")):
        with pytest.raises(UserError, match=text):
            one_raster(str(tmp_path / given), tmp_path / "map.tif")
