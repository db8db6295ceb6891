"""What holds for every raster and however it is cut: identity in = out, no seams, symmetry, precision."""

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vfmadapt.contracts import ClassSpec, DataSpec, ValueSpec
from vfmadapt.raster.predict import predict_raster
from vfmadapt.raster.tiling import TileGrid

CLASSES = tuple(ClassSpec(name, (i * 60, 50, 200)) for i, name in enumerate(("a", "b", "c", "d")))
VALUES = (ValueSpec("first"), ValueSpec("second"))
FEW = settings(max_examples=12, deadline=None, derandomize=True, database=None)


class Identity(nn.Module):
    """Gives its two bands back, as values."""

    spec = DataSpec("fake", ("x", "y"), (), (0.0,) * 2, (1.0,) * 2, values=VALUES)

    def forward(self, image, valid):
        return image


class PerPixel(nn.Module):
    """The class that the first band holds, in whole numbers: no rounding decides."""

    spec = DataSpec("fake", ("x", "y"), CLASSES, (0.0,) * 2, (1.0,) * 2)

    def forward(self, image, valid):
        return -((image[:, :1] - torch.arange(4.0).view(1, 4, 1, 1)) ** 2)


@st.composite
def cuts(draw):
    """A raster's size, a void rectangle, and how to cut it: at most 13 tiles along a side."""
    height, width = (draw(st.integers(1, 1100)) for _ in range(2))
    least = max(height, width) // 12 + 1
    stride = draw(st.integers(least, 2 * least))
    tile = stride + draw(st.integers(0, 2 * least))
    row, column = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    window = [row, column, draw(st.integers(1, height - row)), draw(st.integers(1, width - column))]
    how = {"tile": tile, "overlap": tile - stride, "block": draw(st.sampled_from([512, 1024])), "window": window}
    how["batch"] = draw(st.integers(1, 5))
    hole = slice(draw(st.integers(0, height)), height), slice(0, draw(st.integers(0, width)))
    return (height, width), hole, how


def mapped(folder, write_tiff, values, nodata, model, how):
    path = write_tiff(folder / "a.tif", values, nodata=nodata, tiled=True, blockxsize=256, blockysize=256)
    predict_raster(model, path, folder / "map.tif", **how)
    with rasterio.open(folder / "map.tif") as made:
        return made.read()


def part(array, window):
    row, column, height, width = window
    return array[..., row : row + height, column : column + width]


@FEW
@given(cuts(), st.sampled_from([float("nan"), -9999.0]))
def test_what_an_identity_gives_is_the_raster(tmp_path_factory, write_tiff, cut, nodata):
    size, hole, how = cut
    values = np.random.default_rng(0).normal(size=(2, *size)).astype(np.float32)
    values[:, *hole] = nodata
    made = mapped(tmp_path_factory.mktemp("identity"), write_tiff, values, nodata, Identity(), how)
    expected = part(np.where(values == nodata, np.float32("nan"), values), how["window"])
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)  # sums of weighted float32


@FEW
@given(cuts())
def test_a_per_pixel_model_gives_the_classes_of_the_untiled_raster(tmp_path_factory, write_tiff, cut):
    size, hole, how = cut
    values = np.random.default_rng(0).integers(0, 4, (2, *size), dtype=np.uint8)
    values[:, *hole] = 9
    made = mapped(tmp_path_factory.mktemp("classes"), write_tiff, values, 9, PerPixel(), how | {"scale": 1.0})
    np.testing.assert_array_equal(made[0], part(np.where(values[0] == 9, 255, values[0]), how["window"]))


class Convolution(nn.Module):
    """Random weights; sees `radius` pixels around."""

    def __init__(self, radius, channels=2, spec=Identity.spec):
        super().__init__()
        torch.manual_seed(1)
        self.spec = spec
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(8, spec.outputs, 3, padding=radius - 1, dilation=radius - 1),
        )

    def forward(self, image, valid):
        return self.layers(image)


@pytest.mark.parametrize("size", [(700, 640), (515, 530)])
@pytest.mark.parametrize(("tile", "overlap", "block"), [(64, 16, 512), (100, 37, 1024), (128, 64, 512), (56, 28, 4096)])
def test_a_convolution_gives_the_values_of_the_untiled_raster(tmp_path, write_tiff, size, tile, overlap, block):
    """Of a model that sees no further than a quarter of the overlap no tile's edge is in the map."""
    values = np.random.default_rng(0).normal(size=(2, *size)).astype(np.float32)
    model = Convolution(overlap // 4)
    made = mapped(tmp_path, write_tiff, values, None, model, {"tile": tile, "overlap": overlap, "block": block})
    grid = TileGrid(*size, tile, overlap)
    missing = [(0, starts[-1] + tile - n) for starts, n in zip((grid.rows, grid.columns), size, strict=True)]
    whole = np.pad(values, [(0, 0), *missing], mode="reflect")  # as the outermost tiles are
    with torch.inference_mode():
        expected = model(torch.from_numpy(whole)[None], None)[0, :, : size[0], : size[1]].numpy()
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05  # not all the same


class WholeNumbers(Convolution):
    """Weights and, of an image in whole numbers, scores are whole numbers: no rounding, whatever the order."""

    def __init__(self):
        super().__init__(2, spec=PerPixel.spec)
        self.layers = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        with torch.no_grad():
            self.layers.weight.copy_(torch.randint(-9, 10, self.layers.weight.shape))


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_d4_turns_with_the_raster(tmp_path, write_tiff, turns, flip):
    """The map of the turned raster is the turned map, of a model for which that does not hold by itself."""
    values = np.random.default_rng(0).integers(0, 50, (2, 192, 192), dtype=np.uint8)

    def turned(array):
        return np.ascontiguousarray(np.rot90(array[..., ::-1] if flip else array, turns, (-2, -1)))

    def labels(image, tta):
        how = {"tile": 64, "overlap": 0, "scale": 1.0, "tta": tta}
        return mapped(tmp_path, write_tiff, image, None, WholeNumbers(), how)

    np.testing.assert_array_equal(labels(turned(values), "d4"), turned(labels(values, "d4")))
    assert (labels(turned(values), None) != turned(labels(values, None))).mean() > 0.1


def test_bfloat16_on_a_cpu(tmp_path, write_tiff):
    model = Convolution(3, spec=PerPixel.spec)
    seen = set()
    model.layers.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    y, x = np.mgrid[0:150, 0:170] / 17
    values = np.stack([np.sin(y) * np.cos(x), np.cos(y + x)]).astype(np.float32)
    how = {"tile": 64, "overlap": 16}
    exact = mapped(tmp_path, write_tiff, values, None, model, how)
    assert seen == {torch.float32}
    seen.clear()
    halves = [mapped(tmp_path, write_tiff, values, None, model, how | {"dtype": "bfloat16"}) for _ in range(2)]
    assert seen == {torch.bfloat16}
    np.testing.assert_array_equal(*halves)
    assert 0 < (halves[0] != exact).mean() < 0.02  # three digits: other classes at their borders only
