"""DD-Adapter and its kernel."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.adapters.dd import DD
from vfmadapt.contracts import UserError
from vfmadapt.interop import load_published
from vfmadapt.kernels.depthwise_dilated import depthwise_dilated
from vfmadapt.testing import vit_spec

HIERA_TINY = (96, 192, 192, *(384,) * 7, 768, 768)  # stages of 1, 2, 7 and 2 blocks


@pytest.mark.parametrize(
    ("blocks", "parameters"),
    [(1, 10_320), (2, 49_392), (4, 240_336), (6, 544_080), (8, 847_824), (10, 1_151_568), (12, 2_348_880)],
)
def test_published_counts(blocks: int, parameters: int) -> None:
    with torch.device("meta"):
        adapter = DD(replace(vit_spec(96, 12), dims=HIERA_TINY), blocks=blocks)
    assert sum(p.numel() for p in adapter.parameters()) == parameters


def test_first_blocks_only() -> None:
    assert [site.index for site in DD(vit_spec(8, 9)).sites()] == list(range(6))
    assert [site.index for site in DD(vit_spec(8, 3)).sites()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "blocks=0 must be at least 1"),
        ({"dilations": []}, r"dilations=\[\] must be"),
        ({"dilations": [1, 0]}, r"dilations=\[1, 0\]"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DD(vit_spec(8), **settings)


def shifted(x: Tensor, weight: Tensor, bias: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """The equation by shifted copies of the grid, without a convolution."""
    height, width = x.shape[1:3]
    total = torch.zeros_like(x)
    for kernel, offset, d in zip(weight, bias, dilations, strict=True):
        padded = F.pad(x, (0, 0, d, d, d, d))
        taps = [
            padded[:, r * d : r * d + height, c * d : c * d + width] * kernel[:, r, c]
            for r in range(3)
            for c in range(3)
        ]
        total = total + F.gelu(sum(taps) + offset)
    return total


def operands(size: tuple[int, int], rates: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = [(2, *size, 5), (rates, 5, 3, 3), (rates, 5)]
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    ("size", "dilations"), [((7, 4), (1, 3)), ((1, 1), (1, 3)), ((2, 9), (5,)), ((5, 6), (1, 2, 4))]
)
def test_kernel_is_its_equation(size: tuple[int, int], dilations: tuple[int, ...]) -> None:
    tensors = operands(size, len(dilations))
    ours, theirs = depthwise_dilated(*tensors, dilations), shifted(*tensors, dilations)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, tensors, cotangent) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_kernel_copies_no_grid() -> None:
    """Channels-last in, channels-last out: neither convolution is given a rearranged grid."""
    x, weight, bias = (t.detach() for t in operands((6, 8), 2, torch.float32))
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.conv2d:
                seen.append(args[0].data_ptr() == x.data_ptr())
            return func(*args, **(kwargs or {}))

    with Watch():
        assert depthwise_dilated(x, weight, bias, (1, 3)).is_contiguous()
    assert seen == [True, True]


def test_kernel_refuses_shapes_that_do_not_fit() -> None:
    x, weight, bias = operands((3, 3), 2)
    for wrong in ((x, weight, bias, (1,)), (x, weight[:, 1:], bias, (1, 3)), (x[0], weight, bias, (1, 3))):
        with pytest.raises(ValueError, match="do not fit x"):
            depthwise_dilated(*wrong)


def official(adapter: DD) -> dict[str, Tensor]:
    """The adapter's own tensors, shifted by 1, under their published names."""
    state = {}
    for i, layer in enumerate(adapter.layers):
        parts = {"pw1": (layer.down.weight[..., None, None], layer.down.bias)}
        parts |= {f"dw2_{k + 1}": (layer.weight[k][:, None], layer.bias[k]) for k in range(2)}
        parts |= {"pw2": (layer.up.weight[..., None, None], layer.up.bias)}
        for name, (weight, bias) in parts.items():
            stem = f"image_encoder.trunk.blocks.{i}.adapter.{name}.0"
            state |= {f"{stem}.weight": weight.detach() + 1, f"{stem}.bias": bias.detach() + 1}
    return state


def test_official_weights_are_loaded_strictly() -> None:
    adapter = DD(vit_spec(6, 2))
    state, before = official(adapter), [p.detach().clone() for p in adapter.parameters()]
    load_published("dd", adapter, state | {"sam_mask_decoder.iou_token.weight": torch.zeros(1)})
    for new, old in zip(adapter.parameters(), before, strict=True):
        torch.testing.assert_close(new, old + 1)
    missing = dict(list(state.items())[1:])
    with pytest.raises(UserError, match=r"no 'blocks\.0\.pw1\.0\.weight'"):
        load_published("dd", adapter, missing)
    with pytest.raises(UserError, match="8 tensors are left over"):
        load_published("dd", DD(vit_spec(6, 2), blocks=1), state)
