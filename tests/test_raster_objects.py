"""Maps of objects: what a tile missed comes from its neighbours' overlap; the raster's place is kept."""

import sys
import zlib

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine
from scipy import ndimage
from torch import nn

from vfmadapt.contracts import DataSpec
from vfmadapt.raster.objects import agreeing, missed
from vfmadapt.raster.predict import RayCluster, Settings, merge_parts, predict_part, predict_raster
from vfmadapt.raster.tiling import TileGrid, pad_to_tile

SMALL = {"tile": 64, "overlap": 16, "block": 512}
BLIND = 7  # grey value of a mark: a tile that sees it finds nothing


class Forgetful(nn.Module):
    """Finds the connected regions of each grey value but misses a share of them, by what else its tile holds."""

    spec = DataSpec("grey", ("grey",), (), (0.5,), (0.2,), objects=True)

    def __init__(self, share=0.0, stop=None):
        super().__init__()
        self.share, self.left = share, stop

    def forward(self, image, valid):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        tiles = np.rint(image[:, 0].numpy() * 255).astype(np.uint8) * valid.numpy()
        return torch.from_numpy(np.stack([self.numbers(tile) for tile in tiles]))[:, None]

    def numbers(self, values):
        found = np.zeros(values.shape, dtype=np.float32)
        if (values == BLIND).any():
            return found
        random = np.random.default_rng(zlib.crc32(values.tobytes()))
        for level in np.unique(values[values > 0]):
            regions, count = ndimage.label(values == level)
            kept = 1 + np.flatnonzero(random.random(count) >= self.share)
            inside = np.isin(regions, kept)
            found[inside] = found.max() + regions[inside]
        return found


def disc(size, centre, radius):
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2


def mapped(write_tiff, folder, values, model=None, **settings):
    path = write_tiff(folder / "scene.tif", values[None], nodata=255)
    result = predict_raster(model or Forgetful(), path, folder / "map.tif", **SMALL | settings)
    return result, numbers_of(result.path)


def numbers_of(path):
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("column", [0, 1])
def test_a_tile_of_four_misses_a_lake(write_tiff, tmp_path, row, column):
    """It stays a hole only where no other tile looks."""
    truth = disc((112, 112), (56, 56), 30)
    values = truth * np.uint8(80)
    values[5 + 100 * row, 5 + 100 * column] = BLIND
    result, found = mapped(write_tiff, tmp_path, values)
    alone = [slice(64, None) if at else slice(0, 48) for at in (row, column)]
    truth[*alone] = False
    assert result.objects == 1
    np.testing.assert_array_equal(found, truth)
    assert result.pixels == {"none": (~truth).sum(), "object": truth.sum()}


@pytest.mark.parametrize("across", [False, True])
def test_what_is_seen_in_an_overlap_only_is_an_object(write_tiff, tmp_path, across):
    """It lies in the middle of a tile that finds nothing, 2 pixels from a neighbour's edge; so does one too far in."""
    values = np.zeros((64, 112), dtype=np.uint8)
    values[10:20, 58:62] = 80
    values[30:40, 66:70] = 80
    truth = values > 0
    truth[:, 64:] = False
    values[40, 100] = BLIND
    if across:
        values, truth = values.T.copy(), truth.T
    result, found = mapped(write_tiff, tmp_path, values)
    assert result.objects == 1
    np.testing.assert_array_equal(found, truth)


def test_filling_makes_no_two_objects_one(write_tiff, tmp_path):
    """A lake over three tiles of a row, of which the middle one is blind, touches another lake."""
    values = np.zeros((64, 160), dtype=np.uint8)
    values[10:40] = 80
    values[40:50] = 160
    values[5, 80] = BLIND
    result, found = mapped(write_tiff, tmp_path, values)
    assert result.objects == 4  # nobody saw that the pieces to the left and to the right go together
    for rows, columns in ((slice(10, 40), slice(0, 64)), (slice(10, 40), slice(96, None))):
        first, second = found[rows, columns], found[40:50, columns]
        assert first.min() == first.max() != second.min() == second.max() != 0
    assert not found[:, 64:96].any()


class Outlined(nn.Module):
    """Sees all of a square of 12 columns in the first tile; in the second but those from column `start` on."""

    spec = Forgetful.spec

    def __init__(self, start):
        super().__init__()
        self.start = start

    def forward(self, image, valid):
        found = torch.zeros_like(image)
        for one, tile in zip(found, image, strict=True):
            place = int(tile[0, 0, 0] * 255)  # the raster holds its own tile's first column
            one[0, 20:40, (self.start if place else 52) - place : 64 - place] = 1
        return found


@pytest.mark.parametrize(("start", "objects", "filled"), [(57, 1, 0), (58, 2, 2), (61, 2, 5)])
def test_a_tile_that_found_the_object_says_where_it_ends(write_tiff, tmp_path, start, objects, filled):
    """The second tile's middle begins at column 56; it misses the object where it sees 6 of its 12 columns or less."""
    values = np.repeat(np.arange(112, dtype=np.uint8)[None], 64, axis=0)
    result, found = mapped(write_tiff, tmp_path, values, Outlined(start))
    assert result.objects == objects
    assert (found[30, 56:start] > 0).sum() == filled
    assert len(np.unique(found[30, 52 : 56 + filled])) == 1  # what is filled goes on with the first tile's number


def test_missed_against_counting():
    random = np.random.default_rng(0)
    keys = ndimage.zoom(random.integers(0, 5, (6, 5)), 4, order=0) * 10
    other = np.where(random.random(keys.shape) < keys / 45, 3, 0)
    found = missed(keys, other)
    for key in np.unique(keys[keys > 0]):
        inside = keys == key
        expected = key if 2 * (other[inside] > 0).sum() <= inside.sum() else 0
        assert (found[inside] == expected).all()
    assert len(np.unique(found)) == 3
    assert (found[keys == 0] == 0).all()
    assert missed(keys[:0], other[:0]).shape == (0, 20)
    assert not set(agreeing(keys, other)[:, 0]) & set(found.ravel())


@pytest.fixture(scope="module")
def scene(write_tiff, tmp_path_factory):
    """600 x 1100 pixels, hundreds of objects of 10 to 60 pixels that touch, and a void strip: six blocks of 512."""
    random, size = np.random.default_rng(0), (600, 1100)
    values = np.zeros(size, dtype=np.uint8)
    for _ in range(400):
        values[disc(size, random.uniform((0, 0), size), random.uniform(5, 30))] = random.integers(0, 4) * 60
    values[:, 700:703] = 255
    return write_tiff(tmp_path_factory.mktemp("scene") / "scene.tif", values[None], nodata=255), values


@pytest.fixture(scope="module")
def reference(scene, tmp_path_factory):
    return predict_raster(Forgetful(0.3), scene[0], tmp_path_factory.mktemp("map") / "map.tif", **SMALL).path


def by_hand(values, model, tile, overlap):
    """(keys of the map, how many pixels come from neighbours), object by object over the whole raster."""
    grid = TileGrid(*values.shape, tile, overlap)
    seen, keys, filled = {}, np.zeros(values.shape, dtype=np.int64), 0
    places = [(row, column) for row in grid.rows for column in grid.columns]
    for number, (row, column) in enumerate(places):
        part = values[row : row + tile, column : column + tile]
        found = model.numbers(pad_to_tile(np.where(part == 255, 0, part), tile))[: len(part), : part.shape[1]]
        seen[row, column] = np.where((found > 0) & (part != 255), found + 1000 * (number + 1), 0).astype(np.int64)
    for row, column in places:
        for other in ((0, 0), (-1, 0), (0, -1), (0, 1), (1, 0)):
            up, left = row + other[0] * grid.stride, column + other[1] * grid.stride
            if (up, left) not in seen:
                continue
            top, begin, bottom, end = max(row, up), max(column, left), min(row, up) + tile, min(column, left) + tile
            here = seen[row, column][top - row : bottom - row, begin - column : end - column]
            there = seen[up, left][top - up : bottom - up, begin - left : end - left]
            rows, columns = np.arange(top, top + len(here)), np.arange(begin, begin + here.shape[1])
            middle = belongs(rows, row, grid.rows, grid)[:, None] & belongs(columns, column, grid.columns, grid)
            into = keys[top : top + len(here), begin : begin + here.shape[1]]
            for key in np.unique(there[there > 0]):
                inside = there == key
                if other == (0, 0) or 2 * (here[inside] > 0).sum() <= inside.sum():
                    filled += (other != (0, 0)) * (inside & middle & (into == 0)).sum()
                    into[inside & middle & (into == 0)] = key
    return keys, filled


def belongs(pixels, start, starts, grid):
    half = grid.overlap // 2
    after = (pixels >= start + half) | (start == starts[0])
    return after & ((pixels < start + grid.stride + half) | (start == starts[-1]))


@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (64, 15), (100, 60), (256, 64)])
def test_any_tiles_against_the_whole_raster(scene, tmp_path, tile, overlap):
    keys, filled = by_hand(scene[1], Forgetful(0.3), tile, overlap)
    result = predict_raster(Forgetful(0.3), scene[0], tmp_path / "map.tif", tile=tile, overlap=overlap, block=512)
    found = numbers_of(result.path)
    np.testing.assert_array_equal(found > 0, keys > 0)
    pairs = np.unique(np.stack([keys, found]).reshape(2, -1), axis=1)
    assert pairs.shape[1] == len(np.unique(keys))  # a key has one number
    assert result.objects == len(np.unique(found)) - 1
    assert filled > 3000


@pytest.mark.parametrize("settings", [{"block": 1024}, {"block": 4096}, {"batch": 3}], ids=str)
def test_filling_depends_neither_on_blocks_nor_on_batches(scene, reference, tmp_path, settings):
    predict_raster(Forgetful(0.3), scene[0], tmp_path / "map.tif", **SMALL | settings)
    assert (tmp_path / "map.tif").read_bytes() == reference.read_bytes()


def test_an_interrupted_run_and_parts_in_any_order_fill_the_same(scene, reference, tmp_path):
    whole = tmp_path / "whole.tif"
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Forgetful(0.3, stop=80), scene[0], whole, **SMALL)
    assert list(tmp_path.glob("whole.tif.blocks/*/*.block"))
    predict_raster(Forgetful(0.3), scene[0], whole, **SMALL)
    assert whole.read_bytes() == reference.read_bytes()
    for number, order in enumerate(((2, 0, 1), (1, 2, 0))):
        path = tmp_path / f"parts{number}.tif"
        for index in order:
            predict_part(Forgetful(0.3), scene[0], path, Settings(**SMALL), index=index, of=3)
        merge_parts(path)
        assert path.read_bytes() == reference.read_bytes()


def test_a_window_is_filled_as_the_whole(scene, reference, tmp_path):
    top, left, height, width = 100, 300, 333, 444
    result = predict_raster(Forgetful(0.3), scene[0], tmp_path / "map.tif", **SMALL, window=[top, left, height, width])
    part = numbers_of(reference)[top : top + height, left : left + width]
    pairs = np.unique(np.stack([numbers_of(result.path), part]).reshape(2, -1), axis=1)
    assert pairs.shape[1] == len(np.unique(part)) == result.objects + 1


@pytest.mark.slow
def test_the_engine_ray_fills_the_same(scene, reference, tmp_path):
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # its workers cannot import tests
    here = {"cluster": RayCluster(address=None, actors=2), "device": "cpu"}
    predict_raster(Forgetful(0.3), scene[0], tmp_path / "map.tif", **SMALL, **here)
    assert (tmp_path / "map.tif").read_bytes() == reference.read_bytes()


@pytest.mark.parametrize("place", ["none", "world file", "control points"])
def test_a_scans_place_is_carried_through(write_tiff, tmp_path, place):
    values = disc((100, 140), (50, 60), 30) * np.uint8(80)
    transform, points = Affine(1.25, 0, 600_000, 0, -1.25, 200_000), []
    if place == "control points":
        corners = ((0, 0), (0, 140), (100, 140), (100, 0))
        points = [GroundControlPoint(r, c, 6e5 + 1.3 * c, 2e5 - 1.2 * r, id=str(i)) for i, (r, c) in enumerate(corners)]
        path = write_tiff(tmp_path / "sheet.tif", values[None], gcps=(points, rasterio.CRS.from_epsg(21781)))
    else:
        path = tmp_path / "sheet.png"
        Image.fromarray(values).save(path)
    if place == "world file":
        numbers = (1.25, 0, 0, -1.25, 600_000.625, 199_999.375)  # the last two of the first pixel's centre
        path.with_suffix(".pgw").write_text("\n".join(map(str, numbers)))
    result = predict_raster(Forgetful(), path, tmp_path / "map.tif", **SMALL)
    assert result.objects == 1
    with rasterio.open(result.path) as file:
        np.testing.assert_array_equal(file.read(1), values > 0)
        assert file.crs is None
        assert file.transform == (transform if place == "world file" else Affine.identity())
        found, crs = file.gcps
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
    assert (crs and crs.to_epsg()) == (21781 if points else None)
