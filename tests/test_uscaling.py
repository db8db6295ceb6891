"""The multi-resolution side branch: scales, neighbourhoods, the attention against its definition."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import convolve1d

from vfmadapt.adapters.uscaling import Alignment, Pyramid, UScaling, low_pass
from vfmadapt.contracts import AfterBlock, OnImage, UserError
from vfmadapt.testing import vit_spec


def natural(height, width):
    """Waves of every length, as photographs have them."""
    waves = [torch.randn(1, 3, height // s, width // s) for s in (2, 4, 8, 16, 32)]
    return sum(F.interpolate(wave, size=(height, width), mode="bicubic") for wave in waves)


def test_scaling_the_image_shifts_the_levels():
    image = natural(64, 96)
    scaled = F.interpolate(image, scale_factor=2, mode="bicubic")
    pyramid, other = Pyramid(3, 16, 3), Pyramid(3, 16, 3)

    def error(level, response):
        """Difference from the next level of the scaled image, over what varies in space."""
        centred = [c - c.mean((1, 2), keepdim=True) for c in (pyramid(image)[level], response(scaled)[level + 1])]
        return (centred[0] - centred[1]).norm() / centred[0].norm()

    with torch.no_grad():
        for level in (0, 1):
            assert error(level, pyramid) < 0.4 < 1 < error(level, other)


def test_low_pass_is_the_spline():
    image = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    weights = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
    want = convolve1d(convolve1d(image.numpy(), weights, 2, mode="nearest"), weights, 3, mode="nearest")
    torch.testing.assert_close(low_pass(image), torch.from_numpy(want))


def test_a_flat_image_has_no_details():
    pyramid = Pyramid(4, 8, 3)
    for a, b in zip(pyramid(torch.zeros(1, 4, 40, 72)), pyramid(torch.full((1, 4, 40, 72), 3.0)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(5, 7), (64, 96), (65, 33)])
def test_cells_cover_the_image(size):
    cells = Pyramid(2, 8, 4)(torch.randn(3, 2, *size))
    assert [c.shape for c in cells] == [(3, -(-size[0] // s), -(-size[1] // s), 8) for s in (8, 16, 32, 64)]


def by_definition(layer, grid, pyramid):
    """The attention of each token in turn, over the cells whose place is near enough."""
    wanted = torch.zeros_like(grid)
    for y in range(grid.shape[1]):
        for x in range(grid.shape[2]):
            near = []
            for level, cells in enumerate(pyramid):
                pixels = torch.tensor([y + 0.5, x + 0.5]) * layer.stride
                last = torch.tensor(cells.shape[1:3]) - 1
                centre = (pixels / (8 * 2**level)).floor().minimum(last)
                reach = layer.window // 2
                near += [
                    cells[:, i, j]
                    for i in range(cells.shape[1])
                    for j in range(cells.shape[2])
                    if max(abs(i - centre[0]), abs(j - centre[1])) <= reach
                ]
            key, value = layer.key_value(torch.stack(near, 1)).chunk(2, -1)
            query = layer.query(layer.norm(grid[:, y, x])).unsqueeze(1)
            split = [t.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for t in (query, key, value)]
            found = F.scaled_dot_product_attention(*split).flatten(1)
            wanted[:, y, x] = grid[:, y, x] + layer.out(found)
    return wanted


@pytest.mark.parametrize(("stride", "window"), [(4, 1), (16, 3), (14, 5)])
def test_attention_against_its_definition(stride, window):
    layer = Alignment(10, stride, 6, 2, window)
    torch.nn.init.normal_(layer.out.weight)
    height, width = 5 * stride - 3, 4 * stride - 1
    pyramid = Pyramid(1, 6, 3)(torch.randn(2, 1, height, width))
    grid = torch.randn(2, 6, 4, 10)  # a row more than the image has, as where a backbone pads
    with torch.no_grad():
        torch.testing.assert_close(layer(grid, pyramid), by_definition(layer, grid, pyramid))


def test_identity_at_the_start_on_blocks_of_other_widths():
    stages = replace(vit_spec(8, 4), dims=(8, 16, 16, 32), strides=(4, 8, 8, 16), bands=6)
    adapter = UScaling(stages, dim=4, levels=2)
    image, *blocks = adapter.sites()
    assert isinstance(image, OnImage)
    context = image.fn(torch.randn(2, 6, 33, 50))
    assert [b.index for b in blocks] == [0, 1, 2, 3]
    for block in blocks:
        assert isinstance(block, AfterBlock)
        assert block.context
        grid = torch.randn(2, 5, 6, stages.dims[block.index])
        assert torch.equal(block.fn(grid, context), grid)


@pytest.mark.parametrize(
    ("depth", "layers", "used"),
    [
        (12, None, [2, 5, 8, 11]),
        (24, None, [5, 11, 17, 23]),
        (3, None, [0, 1, 2]),
        (1, None, [0]),
        (12, [-1, 0], [0, 11]),
    ],
)
def test_layers(depth, layers, used):
    assert [s.index for s in UScaling(vit_spec(8, depth), layers=layers).sites()[1:]] == used


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"levels": 0}, "levels=0"),
        ({"heads": 3}, "dim=32 must be a multiple of heads=3"),
        ({"heads": 0}, "heads=0"),
        ({"dim": 0}, "dim=0"),
        ({"window": 2}, "window=2 must be odd"),
        ({"window": -1}, "window=-1"),
        ({"layers": [4]}, r"layers=\[4\] must be whole numbers from -4 to 3"),
        ({"layers": []}, r"layers=\[\]"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(UserError, match=message) as caught:
        UScaling(vit_spec(8, 4), **setting)
    assert "\n" not in str(caught.value)
