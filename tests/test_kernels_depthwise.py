"""depthwise_dilated: every implementation against float64, and what each refuses.

Without a GPU, Triton's kernels run in its interpreter and CUDA's are only compiled (test_kernels_dispatch.py).
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from vfmadapt.kernels import _nvrtc, _triton
from vfmadapt.kernels import depthwise_dilated as module
from vfmadapt.kernels.depthwise_dilated import OPERATION, depthwise_dilated, depthwise_dilated_reference
from vfmadapt.testing_kernels import assert_as_exact_as_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = {
    "triton": pytest.mark.skipif(bool(_triton.MISSING), reason="Triton is not installed"),
    "cuda": pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU"),
}
HARDWARE = [pytest.param(n, marks=mark) for n, mark in GPU.items()]
# batch, height, width, channels, dilations: odd, more channels than a tile, a dilation beyond the grid, one pixel
SHAPES = [(2, 9, 7, 5, (1, 3)), (1, 4, 9, 33, (2,)), (1, 3, 2, 2, (1, 5)), (2, 1, 1, 1, (2,))]


def arguments(
    batch: int, height: int, width: int, channels: int, dilations: tuple[int, ...], activated: bool = True
) -> tuple[Any, ...]:
    made = partial(torch.randn, dtype=torch.float64)
    weight, bias = made(len(dilations), channels, 3, 3) / 3, made(len(dilations), channels)
    return *(t.to(DEVICE) for t in (made(batch, height, width, channels), weight, bias)), dilations, activated


def planar(x: Tensor) -> Tensor:
    """The same grid, in memory as (B, C, h, w)."""
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


@pytest.fixture
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VFMADAPT_KERNELS", request.param)
    return str(request.param)


@pytest.mark.parametrize("named", HARDWARE, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(named: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(depthwise_dilated, depthwise_dilated_reference, arguments(*SHAPES[0]), dtype)


@pytest.mark.parametrize("named", HARDWARE, indirect=True)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_shapes(named: str, shape: tuple[Any, ...]) -> None:
    assert_as_exact_as_torch(depthwise_dilated, depthwise_dilated_reference, arguments(*shape), torch.float32)


@pytest.mark.parametrize("named", HARDWARE, indirect=True)
def test_layouts_and_no_activation(named: str) -> None:
    """Planar grids stay planar; grids cut out of tokens with a prefix, and every second channel, are read in place."""

    def cut(x: Tensor) -> Tensor:
        return x.flatten(1, 2)[:, 2:].unflatten(1, (3, 4))[..., ::2]

    x, weight, bias, *rest = arguments(1, 2, 7, 4, (2,), False)
    for view in (lambda x: planar(x[..., :2]), cut):
        assert_as_exact_as_torch(
            lambda x, *others, view=view: depthwise_dilated(view(x), *others),
            lambda x, *others, view=view: depthwise_dilated_reference(view(x), *others),
            (x, weight[:, :2], bias[:, :2], *rest),
            torch.float32,
        )
    grid = planar(torch.empty(2, 3, 4, 2, device="meta"))
    assert module.TRITON(grid, weight, bias, [2], False).stride() == grid.stride()


@pytest.mark.parametrize("named", HARDWARE, indirect=True)
def test_empty_batches(named: str) -> None:
    x, weight, bias, *rest = arguments(0, 4, 3, 5, (1, 3))
    parameters = [t.float().requires_grad_() for t in (weight, bias)]
    out = depthwise_dilated(x.float(), *parameters, *rest)
    assert out.shape == x.shape
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), parameters))


@GPU["triton"]
def test_operator_is_what_torch_expects() -> None:
    x, weight, bias, dilations, activated = arguments(1, 2, 3, 2, (1,))
    tensors = [t.float().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(module.TRITON, (*tensors, list(dilations), activated))


@pytest.mark.parametrize("named", HARDWARE, indirect=True)
def test_autocast_lowers_it_as_a_convolution(named: str) -> None:
    x, weight, bias, dilations, _ = arguments(1, 3, 4, 2, (2,))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = depthwise_dilated(x.float(), weight.float(), bias.float(), dilations)
        theirs = depthwise_dilated_reference(x.float(), weight.float(), bias.float(), dilations)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.clone, planar])
def test_gradients_by_forward_passes(shape: tuple[Any, ...], layout: Any) -> None:
    x, *rest = arguments(*shape)

    def fast(x: Tensor, *rest: Any) -> Tensor:
        return module._cpu(layout(x), *rest)

    def plain(x: Tensor, *rest: Any) -> Tensor:
        return depthwise_dilated_reference(layout(x), *rest)

    assert_as_exact_as_torch(fast, plain, (x, *rest), torch.float32)


def test_gradients_by_forward_passes_are_derivatives() -> None:
    x, weight, bias, *rest = arguments(1, 4, 3, 2, (1, 3))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: module._cpu(*t, *rest), inputs)


def test_when_the_cpu_goes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFMADAPT_KERNELS", raising=False)
    large = [t.cpu().float() if isinstance(t, Tensor) else t for t in arguments(1, 32, 32, 64, (1, 3))]
    assert OPERATION.choose(*large) is depthwise_dilated_reference  # nothing wants a gradient
    large[1].requires_grad_()
    assert OPERATION.path(*large) == "cpu"
    for other in (
        [*large[:3], (1, 1), True],
        [large[0][:, :8, :8], *large[1:]],
        [*(t.bfloat16() for t in large[:3]), *large[3:]],
    ):
        assert OPERATION.choose(*other) is depthwise_dilated_reference


def test_what_kernels_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, *rest = arguments(1, 4, 4, 2, (1,))
    assert "float64" in module._gpu_reason(x, weight, bias, *rest)
    assert "float64" in module._gpu_reason(x.float(), weight, bias, *rest)
    small = [t.float() for t in (x, weight, bias)]
    assert not module._cuda_reason(*small, (31,), True)
    assert "shared memory" in module._cuda_reason(*small, (32,), True)
    monkeypatch.setattr(module, "OFFSETS", 31)  # the last value's
    assert "32 bits" in module._gpu_reason(*small, *rest)


@pytest.mark.skipif(bool(_nvrtc.MISSING), reason="NVRTC is not installed")
def test_planar_and_wide_tiles_compile() -> None:
    """The macros that the first benchmark case does not reach."""
    for x, dilations in ((planar(torch.zeros(1, 8, 8, 4)), [1, 3]), (torch.zeros(1, 8, 8, 64), [24])):
        weight, bias = torch.zeros(len(dilations), x.shape[3], 3, 3), torch.zeros(len(dilations), x.shape[3])
        with _nvrtc.ahead(80) as compiled:
            module.CUDA(x, weight, bias, dilations, False)
        assert [kernel for kernel, _ in compiled] == ["depthwise_dilated:forward"]


def test_refuses_shapes() -> None:
    x, weight, bias, *_ = arguments(1, 4, 4, 2, (1, 3))
    for wrong in ((x[0], weight, bias, (1, 3)), (x, weight, bias, (1,)), (x, weight, bias[:, :1], (1, 3))):
        with pytest.raises(ValueError, match="do not fit"):
            depthwise_dilated(*wrong)
