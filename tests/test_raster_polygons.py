"""Regions of a map as polygons, against rasterio's own of the whole map and against counts of pixels."""

import json
import tracemalloc

import numpy as np
import pytest
import rasterio
import shapely
import torch
from rasterio.features import rasterize, shapes
from rasterio.transform import Affine
from scipy import ndimage
from torch import nn

from vfmadapt.contracts import ClassSpec, DataSpec, ValueSpec
from vfmadapt.errors import UserError
from vfmadapt.raster import polygons
from vfmadapt.raster.predict import Settings, merge_parts, predict_part, predict_raster

CLASSES = tuple(ClassSpec(name, (i * 60, 50, 200)) for i, name in enumerate(("land", "lake", "ice")))


class Stored(nn.Module):
    """The class that the pixel holds, x 100."""

    spec = DataSpec("fake", ("a",), CLASSES, (0.5,), (0.2,))

    def forward(self, image, valid):
        return torch.cat([-((image * 2.55 - i) ** 2) for i in range(len(self.spec.classes))], dim=1)


def patchy(height, width, size=5.0, seed=0):
    """Random patches of three classes, and of void (255)."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), size)
    return np.array([0, 1, 2, 255], dtype=np.uint8)[np.digitize(noise, np.quantile(noise, [0.3, 0.6, 0.9]))]


def oracle(labels):
    """(class, polygon) of a whole map."""
    found = shapes(labels, mask=labels != 255, connectivity=4)
    return {(int(label), shapely.geometry.shape(shape).normalize()) for shape, label in found}


def mapped(write_tiff, folder, labels, form="gpkg", **settings):
    values = np.where(labels == 255, 255, labels * 100)[None].astype(np.uint8)
    profile = {key: settings.pop(key) for key in ("crs", "transform", "gcps") if key in settings}
    path = write_tiff(folder / "scene.tif", values, nodata=255, **profile)
    options = {"tile": 64, "overlap": 0, "block": 512, "polygons": form} | settings
    return predict_raster(Stored(), path, folder / "map.tif", **options)


def rows(path):
    """The table, read by GeoPandas."""
    import geopandas

    return geopandas.read_file(path) if path.suffix == ".gpkg" else geopandas.read_parquet(path)


@pytest.mark.parametrize("side", [5, 16, 100])
@pytest.mark.parametrize("size", [0.0, 0.7, 3.0])
def test_regions_are_those_of_the_whole_map(side, size):
    labels = patchy(45, 61, size)
    found = list(polygons.regions(lambda y, x: labels[y : y + side, x : x + side], *labels.shape, side))
    assert all(polygon.is_valid for _, polygon in found)
    # normalize() keeps the vertex at which a ring begins apart from others of its side, simplify() does not
    assert {(n, p.normalize()) for n, p in found} == oracle(labels)
    assert len(found) == len(oracle(labels))


def test_one_lake_over_four_blocks_is_one_polygon(write_tiff, tmp_path):
    labels = np.zeros((1100, 1200), dtype=np.uint8)
    y, x = np.ogrid[:1100, :1200]
    lake = ((y - 512) ** 2 + (x - 512) ** 2 < 200**2) & ((y - 512) ** 2 + (x - 512) ** 2 > 90**2)
    labels[lake] = 1
    result = mapped(write_tiff, tmp_path, labels)
    assert result.polygons == tmp_path / "map.gpkg"
    table = rows(result.polygons)
    assert sorted(table.name) == ["lake", "land", "land"]  # around it, and its island
    (row,) = table[table.name == "lake"].itertuples()
    assert (row.pixels, row.area_m2) == (lake.sum(), lake.sum() * 100)
    assert row.geometry.area == pytest.approx(row.area_m2)
    assert len(row.geometry.interiors) == 1


@pytest.mark.parametrize("form", ["gpkg", "parquet"])
def test_the_table_says_what_the_map_says(write_tiff, tmp_path, monkeypatch, form):
    monkeypatch.setattr(polygons, "_SIDE", 100)
    monkeypatch.setattr(polygons, "_AT_ONCE", 7)
    labels = patchy(330, 270)
    result = mapped(write_tiff, tmp_path, labels, form)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["scene.tif", "map.tif", f"map.{form}"])
    table = rows(result.polygons)
    assert list(table.columns) == ["class", "name", "pixels", "area_m2", "geometry"]
    assert table.crs.to_epsg() == 32632
    assert table.geometry.is_valid.all()
    assert (table.geom_type == "Polygon").all()
    assert len(table) == len(oracle(labels)) > 20
    assert table.groupby("name").pixels.sum().to_dict() == result.pixels
    assert table.geometry.area.to_numpy() == pytest.approx(table.area_m2.to_numpy())
    with rasterio.open(result.path) as file:
        drawn = rasterize(
            zip(table.geometry, table["class"], strict=True),
            file.shape,
            fill=255,
            transform=file.transform,
            dtype="uint8",
        )
        np.testing.assert_array_equal(drawn, file.read(1))


PLACES = {
    "degrees": {"crs": "EPSG:4326", "transform": Affine(1e-4, 0, 179.99, 0, -1e-4, 10)},
    "rotated": {"transform": Affine(8, 6, 500_000, 6, -8, 5_300_000)},
    "feet": {"crs": "EPSG:2263", "transform": Affine(1, 0, 980_000, 0, -1, 200_000)},
    "nowhere": {"crs": None, "transform": Affine.identity()},
}


@pytest.mark.parametrize("form", ["gpkg", "parquet"])
@pytest.mark.parametrize("place", PLACES)
def test_places(write_tiff, tmp_path, place, form, recwarn):
    labels = patchy(60, 70)
    result = mapped(write_tiff, tmp_path, labels, form, window=[3, 5, 50, 61], **PLACES[place])
    assert not [w for w in recwarn if "crs" in str(w.message)]
    table = rows(result.polygons)
    with rasterio.open(result.path) as file:
        assert table.crs == (None if place == "nowhere" else file.crs)
        drawn = rasterize(table.geometry, file.shape, transform=file.transform)
        np.testing.assert_array_equal(drawn == 1, file.read(1) != 255)
    assert table.pixels.sum() == 50 * 61 - result.void
    assert ("area_m2" in table) == (place in ("rotated", "feet"))
    if place in ("rotated", "feet"):
        assert table.area_m2.sum() == pytest.approx(sum(result.area_km2.values()) * 1e6)
    if place == "feet":
        assert table.area_m2.sum() == pytest.approx(table.geometry.area.sum() * (1200 / 3937) ** 2)


def test_geoparquet_says_its_version_and_projection(write_tiff, tmp_path):
    from pyarrow import parquet

    result = mapped(write_tiff, tmp_path, patchy(20, 20), "parquet")
    geo = json.loads(parquet.read_metadata(result.polygons).metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    column = geo["columns"][geo["primary_column"]]
    assert (column["encoding"], column["geometry_types"]) == ("WKB", ["Polygon"])
    assert column["crs"]["id"] == {"authority": "EPSG", "code": 32632}


@pytest.mark.parametrize("form", ["gpkg", "parquet"])
def test_a_map_without_a_region(write_tiff, tmp_path, form):
    result = mapped(write_tiff, tmp_path, np.full((20, 20), 255, dtype=np.uint8), form)
    table = rows(result.polygons)
    assert len(table) == 0
    assert table.crs.to_epsg() == 32632


def test_a_run_that_was_killed_while_writing_goes_on(write_tiff, tmp_path, monkeypatch):
    labels = patchy(300, 300)

    def killed(target, *_):
        target.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(polygons, "_write_gpkg", killed)
        with pytest.raises(KeyboardInterrupt):
            mapped(write_tiff, tmp_path, labels)
    assert not (tmp_path / "map.gpkg").exists()
    scene, calls = tmp_path / "scene.tif", []
    model = Stored()
    model.register_forward_hook(lambda *_: calls.append(1))
    result = predict_raster(model, scene, tmp_path / "map.tif", tile=64, overlap=0, block=512, polygons="gpkg")
    assert not calls
    assert len(rows(result.polygons)) == len(oracle(labels))
    assert not (tmp_path / "map.tif.blocks").exists()


def test_merge_of_parts_writes_them(write_tiff, tmp_path):
    labels = patchy(600, 300)
    whole = mapped(write_tiff, tmp_path, labels, "parquet")
    before = whole.polygons.read_bytes()
    whole.polygons.unlink()
    settings = Settings(tile=64, overlap=0, block=512)
    for index in range(2):
        predict_part(Stored(), tmp_path / "scene.tif", tmp_path / "map.tif", settings, index=index, of=2)
    assert merge_parts(tmp_path / "map.tif", polygons="parquet").polygons.read_bytes() == before


class Values(Stored):
    spec = DataSpec("fake", ("a",), (), (0.5,), (0.2,), values=(ValueSpec("height"),))


def test_what_is_refused_before_the_work(write_tiff, tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tif", np.zeros((1, 20, 20), dtype=np.uint8))
    points = [rasterio.control.GroundControlPoint(r, c, c, -r) for r in (0, 20) for c in (0, 20)]
    placed = write_tiff(
        tmp_path / "b.tif", np.zeros((1, 20, 20), dtype=np.uint8), gcps=(points, rasterio.CRS.from_epsg(4326))
    )
    refused = [
        (Stored(), path, "shp", r"polygons=shp: allowed are gpkg, parquet"),
        (Values(), path, "gpkg", r"polygons=gpkg are regions of a class, the model gives values"),
        (Stored(), placed, "gpkg", r"b\.tif is placed by control points or RPCs; warp it first"),
    ]
    for model, source, form, line in refused:
        with pytest.raises(UserError, match=line):
            predict_raster(model, source, tmp_path / "out" / "map.tif", polygons=form)
    monkeypatch.setattr(polygons, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs shapely and pyogrio; run pip install 'vfmadapt\[geo\]'"):
        predict_raster(Stored(), path, tmp_path / "out" / "map.tif", polygons="gpkg")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full(write_tiff, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("sqlite3_step() failed: database or disk is full")

    monkeypatch.setattr("pyogrio.raw.write", full)
    with pytest.raises(UserError, match=r"cannot write map\.gpkg: .*disk is full"):
        mapped(write_tiff, tmp_path, patchy(30, 30))


def test_memory_follows_what_is_open():
    """A map eight times as long takes no more."""
    part = patchy(64, 128, 2.0)
    part[:, 0] = 255  # so that nothing is open for ever
    part[-1] = 255

    def peak(height):
        tracemalloc.start()
        count = sum(
            1 for _ in polygons.regions(lambda y, x: part[:, x : x + 32][y % 64 : y % 64 + 32], height, 128, 32)
        )
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, top

    peak(64)  # what is loaded once
    (few, short), (many, long) = peak(128), peak(1024)
    assert many == 8 * few
    assert long < 2 * short
