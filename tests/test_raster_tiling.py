"""Tiles and their blending; what stored values mean."""

import numpy as np
import pytest

from vfmadapt.errors import UserError
from vfmadapt.raster.io import to_sensor_units, valid_pixels
from vfmadapt.raster.tiling import Blender, TileGrid, pad_to_tile, window, winning_class


def grids(count=60):
    rng = np.random.default_rng(1)
    for _ in range(count):
        tile = int(rng.integers(1, 40))
        yield TileGrid(int(rng.integers(1, 120)), int(rng.integers(1, 120)), tile, int(rng.integers(0, tile)))
    for size in (1, 31, 32, 33, 56, 57, 80, 81):  # one tile, a remainder of one pixel, exactly two and three tiles
        yield TileGrid(size, 90 - size, 32, 8)


def blended(array, grid, top, left, height, width):
    """The part of `array` that a block shows after its tiles went through an identity model."""
    rows, columns = grid.rows_over(top, top + height), grid.columns_over(left, left + width)
    blender, out = Blender(grid, columns, len(array), votes=True), []
    for first in rows:
        for column in columns:
            part = array[:, first : first + grid.tile, column : column + grid.tile]
            blender.add(column, pad_to_tile(part, grid.tile))
        done = grid.tile if first == rows[-1] else grid.stride
        out.append(blender.sums[:, :done] / blender.total[0, :done])
        blender.next_row()
    top, left = top - rows[0], left - columns[0]
    return np.concatenate(out, axis=1)[:, top : top + height, left : left + width]


@pytest.mark.parametrize("grid", list(grids()), ids=str)
def test_blending_tiles_of_an_array_gives_the_array(grid):
    array = np.random.default_rng(2).normal(size=(2, grid.height, grid.width)).astype(np.float32)
    whole = blended(array, grid, 0, 0, grid.height, grid.width)
    np.testing.assert_allclose(whole, array, rtol=1e-5, atol=1e-6)
    top, left = grid.height // 3, grid.width // 2
    part = blended(array, grid, top, left, grid.height // 2 + 1, grid.width - left)
    np.testing.assert_array_equal(part, whole[:, top : top + part.shape[1], left:])  # bit by bit, whatever the block


def test_winning_class_is_argmax():
    scores = np.random.default_rng(0).integers(0, 3, (5, 20, 30)).astype(np.float32)  # with ties
    np.testing.assert_array_equal(winning_class(scores), scores.argmax(axis=0))


@pytest.mark.parametrize("grid", list(grids(30)), ids=str)
def test_every_pixel_is_covered_and_no_tile_is_superfluous(grid):
    for starts, size in ((grid.rows, grid.height), (grid.columns, grid.width)):
        assert starts[0] == 0
        assert starts[-1] < size
        assert starts[-1] + grid.tile >= size
        assert len(starts) == 1 or starts[-2] + grid.tile < size


@pytest.mark.parametrize(("tile", "overlap"), [(1, 0), (8, 0), (8, 7), (256, 64), (5, 2)])
def test_weights_are_positive_everywhere_and_symmetric(tile, overlap):
    weights = window(tile, overlap)
    assert weights.min() > 0
    assert weights.max() <= 1
    np.testing.assert_array_equal(weights, weights[::-1, ::-1])


@pytest.mark.parametrize(("tile", "overlap"), [(16, 8), (16, 5), (16, 0)])
def test_windows_sum_to_one_inside(tile, overlap):
    grid = TileGrid(70, 70, tile, overlap)
    total = np.zeros((grid.rows[-1] + tile, grid.columns[-1] + tile))
    for row in grid.rows:
        for column in grid.columns:
            total[row : row + tile, column : column + tile] += window(tile, overlap)
    np.testing.assert_allclose(total[overlap : -overlap or None, overlap : -overlap or None], 1, rtol=1e-6)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (32, 32), (32, -1)])
def test_impossible_tiles(tile, overlap):
    with pytest.raises(UserError, match="makes no grid"):
        TileGrid(10, 10, tile, overlap)


def test_padding_reflects_and_repeats_single_rows():
    np.testing.assert_array_equal(pad_to_tile(np.array([[1, 2, 3]]), 5)[0], [1, 2, 3, 2, 1])
    assert (pad_to_tile(np.full((2, 1, 1), True), 7)).all()


@pytest.mark.parametrize(("dtype", "full"), [("uint8", 255), ("uint16", 10_000), ("int16", 10_000), ("float32", 1)])
def test_units_by_dtype(dtype, full):
    np.testing.assert_allclose(to_sensor_units(np.full((1, 1, 1), full, dtype=dtype)), 1, rtol=1e-6)


def test_units_given_go_before_tags_and_tags_before_dtype():
    values = np.full((2, 1, 1), 100, dtype=np.uint8)
    tags = {"tag_scales": [0.5, 1.0], "tag_offsets": [1.0, 0.0]}
    assert to_sensor_units(values, **tags).ravel().tolist() == [51.0, 100.0]
    assert to_sensor_units(values, scale=0.25, **tags).ravel().tolist() == [25.0, 25.0]
    assert to_sensor_units(values, offset=-1.0, **tags).ravel().tolist() == [99.0, 99.0]
    untagged = to_sensor_units(values, tag_scales=[1.0, 1.0], tag_offsets=[0.0, 0.0])
    np.testing.assert_allclose(untagged, 100 / 255, rtol=1e-6)
    with pytest.raises(UserError, match=r"int32.*scale="):
        to_sensor_units(values.astype(np.int32))


@pytest.mark.parametrize(
    ("values", "nodata", "valid"),
    [
        ([0, 5, 0], 0, True),  # a dark band is no hole
        ([0, 0, 0], 0, False),
        ([255, 255, 7], 255, True),
        ([-9999, 5, 7], -9999, False),  # no measurement is -9999
        ([1, 2, 3], None, True),
        ([1, float("nan"), 3], None, False),
        ([1, float("inf"), 3], 0, False),
        ([float("nan")] * 3, float("nan"), False),
    ],
)
def test_valid_pixels(values, nodata, valid):
    array = np.array(values, dtype=np.float32).reshape(3, 1, 1)
    assert valid_pixels(array, [nodata] * 3).item() is valid


def test_nodata_that_the_tag_rounds():
    lowest = np.finfo(np.float32).min
    assert not valid_pixels(np.full((1, 1, 1), lowest), [-3.402823e38]).item()
