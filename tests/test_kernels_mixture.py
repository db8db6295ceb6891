"""bottleneck_mixture: plain PyTorch and Triton's kernels against the equations, and what they refuse.

Without a GPU, Triton's kernels run in its interpreter.
"""

import copy
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vfmadapt.kernels import _triton
from vfmadapt.kernels import bottleneck_mixture as module
from vfmadapt.kernels.bottleneck_mixture import (
    bottleneck_mixture,
    bottleneck_mixture_direct,
    bottleneck_mixture_reference,
)
from vfmadapt.kernels.spectral_split import spectral_split
from vfmadapt.testing_kernels import SLACK, assert_as_exact_as_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(bool(_triton.MISSING), reason="Triton is not installed")
# height, width, cutoff: even, odd, H != W, one cell, nothing kept, 2q = size, 2q > size on one axis and on both
GRIDS = [(32, 32, 4), (8, 6, 2), (5, 7, 1), (7, 4, 2), (1, 1, 0), (1, 1, 1), (1, 9, 1), (6, 4, 0), (6, 4, 3), (5, 3, 9)]


def grid(height, width, channels=3, dtype=torch.float64, batch=2):
    return torch.randn(batch, height, width, channels, dtype=dtype, generator=torch.Generator().manual_seed(0))


def layer(channels=10, dim=4, dtype=torch.float64):
    """Parameters of one layer, each of a size that shows in the output."""
    made = torch.Generator().manual_seed(1)
    shapes = [(3 * dim + 3, channels), (3 * dim + 3,), (3 * dim, channels), (3, channels)]
    drawn = [torch.randn(s, generator=made, dtype=torch.float64) / math.sqrt(channels) for s in shapes]
    return [p.to(dtype).requires_grad_() for p in (*drawn, torch.tensor(0.7))]


def on_device(*args):
    return [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize(("height", "width", "cutoff"), GRIDS)
def test_mixture_is_its_equations(height, width, cutoff):
    x, parameters = grid(height, width, 10).requires_grad_(), layer()
    ours = bottleneck_mixture(x, *parameters, cutoff)
    theirs = bottleneck_mixture_direct(x, *parameters, cutoff)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    cotangent = grid(height, width, 10) + 1
    for a, b in zip(
        torch.autograd.grad(ours, [x, *parameters], cotangent),
        torch.autograd.grad(theirs, [x, *parameters], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_mixture_gradient():
    x = grid(3, 4, 5, batch=1).requires_grad_()
    parameters = layer(5, 2)
    assert torch.autograd.gradcheck(lambda *t: bottleneck_mixture(*t, 1), (x, *parameters))
    frozen_input = torch.autograd.grad(bottleneck_mixture(x.detach(), *parameters, 1).sum(), parameters)
    assert all(g.abs().max() > 0 for g in frozen_input)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mixture_precision(dtype):
    """At most `SLACK` times the error of the direct form in the same dtype, results and gradients."""

    def run(form, dtype):
        x = grid(16, 9, 64).to(dtype).requires_grad_()
        parameters = layer(64, 8, dtype)
        y = form(x, *parameters, 2)
        return [y, *torch.autograd.grad(y, [x, *parameters], grid(16, 9, 64).flip(0).to(dtype))]

    exact = run(bottleneck_mixture_direct, torch.float64)
    for ours, theirs, true in zip(
        run(bottleneck_mixture, dtype), run(bottleneck_mixture_direct, dtype), exact, strict=True
    ):
        assert ours.dtype == dtype
        # a single number (the scale's gradient) may be exact by luck: a few roundings are always allowed to it
        few = 8 * torch.finfo(dtype).eps * true.abs() if true.ndim == 0 else 0
        assert (ours - true).norm() <= max(SLACK * (theirs - true).norm(), few)


def test_mixture_keeps_the_residual_under_autocast():
    """The products run in bfloat16, the stream of tokens does not."""
    x, parameters = grid(6, 5, 10, torch.float32), layer(dtype=torch.float32)
    parameters[-1] = torch.tensor(1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bottleneck_mixture(x, *parameters, 1)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x, rtol=0, atol=1e-4)


def test_mixture_on_a_view():
    """A grid cut out of tokens with a prefix is not contiguous."""
    tokens, parameters = grid(1, 21, 10).squeeze(1), layer()
    view = tokens[:, 1:].unflatten(1, (5, 4))
    assert torch.equal(bottleneck_mixture(view, *parameters, 1), bottleneck_mixture(view.contiguous(), *parameters, 1))
    assert torch.equal(bottleneck_mixture(view[:0], *parameters, 1), view[:0])


def test_mixture_refuses_shapes():
    x, parameters = grid(4, 4, 10), layer()
    with pytest.raises(ValueError, match="do not fit"):
        bottleneck_mixture(x[..., :9], *parameters, 1)
    with pytest.raises(ValueError, match="do not fit"):
        bottleneck_mixture(x, *parameters[:3], parameters[3][:2], parameters[4], 1)


@pytest.mark.filterwarnings("error")
def test_compiles_whole():
    """No graph break, no warning, before and after plain use; the matrices' cache is not touched by the compiler."""
    x, parameters = grid(9, 11, 10), layer()
    compiled = torch.compile(bottleneck_mixture, fullgraph=True, backend="aot_eager")
    first = compiled(x, *parameters, 2)
    plain = bottleneck_mixture(x, *parameters, 2)
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(
        torch.autograd.grad(first.sum(), parameters), torch.autograd.grad(plain.sum(), parameters)
    )
    torch.testing.assert_close(
        compiled(grid(4, 13, 10), *parameters, 1), bottleneck_mixture(grid(4, 13, 10), *parameters, 1)
    )


def test_first_use_in_inference_mode_spoils_no_training():
    x, parameters = grid(3, 14, 10), layer()
    with torch.inference_mode():
        first = bottleneck_mixture(x, *parameters, 1)
    second = bottleneck_mixture(x, *parameters, 1)
    second.sum().backward()
    assert torch.equal(first.clone(), second)


def test_first_use_without_data_spoils_no_later_one():
    x, parameters = grid(3, 15, 10), layer()
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t.detach()) for t in (x, *parameters)]
    with mode:
        assert bottleneck_mixture(*fake, 1).shape == x.shape
    meta = [t.detach().to("meta") for t in (x, *parameters)]
    assert bottleneck_mixture(*meta, 1).shape == x.shape
    torch.testing.assert_close(bottleneck_mixture(x, *parameters, 1), bottleneck_mixture_direct(x, *parameters, 1))


def test_functions_are_plain_values():
    for function in (spectral_split, bottleneck_mixture):
        assert copy.deepcopy(function) is function
        assert pickle.loads(pickle.dumps(function)) is function


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_precision(dtype):
    args = on_device(grid(5, 6, 10), *layer(), 2)
    assert_as_exact_as_torch(module._triton, bottleneck_mixture_reference, args, dtype)


@needs_triton
@pytest.mark.parametrize(
    ("height", "width", "channels", "dim", "cutoff"), [(1, 1, 3, 1, 1), (1, 9, 130, 5, 0), (5, 4, 4, 17, 8)]
)
def test_kernels_on_odd_sizes(height, width, channels, dim, cutoff):
    """One cell, everything filtered out, more channels than a tile, bottlenecks wider than a block, all waves kept."""
    args = on_device(grid(height, width, channels), *layer(channels, dim), cutoff)
    for dtype in (torch.float32, torch.float16):
        assert_as_exact_as_torch(module._triton, bottleneck_mixture_reference, args, dtype)


@needs_triton
def test_kernels_on_views_and_empty_batches():
    """A grid cut out of tokens with a prefix is read in place."""

    def cut(run):
        return lambda x, *rest: run(x[:, 2:].unflatten(1, (5, 4)), *rest)

    tokens, *parameters = on_device(grid(1, 22, 10).squeeze(1), *layer())
    args = tokens, *parameters, 1
    assert_as_exact_as_torch(cut(module._triton), cut(bottleneck_mixture_reference), args, torch.float16)
    x, *parameters = (t.float().detach().requires_grad_() for t in (tokens[:0].unflatten(1, (11, 2)), *parameters))
    y = module._triton(x, *parameters, 1)
    assert y.shape == x.shape
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), [x, *parameters]))


@needs_triton
def test_kernels_under_autocast():
    """Products run in bfloat16, the stream of tokens does not; gradients come in the parameters' dtype."""
    x, *parameters = on_device(grid(4, 5, 10, torch.float32), *layer(dtype=torch.float32))
    run = []
    for form in (module._triton, bottleneck_mixture_reference):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = form(x, *parameters, 1)
        run.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
    for ours, theirs in zip(*run, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@needs_triton
def test_operators_are_what_torch_expects():
    x, down, bias, up, up_bias, scale = on_device(grid(2, 3, 4, torch.float32, 1), *layer(4, 1, torch.float32))
    weights = torch.cat((up, up_bias)).detach().requires_grad_()
    torch.library.opcheck(module._forward, (x.requires_grad_(), down, bias, weights, scale, 1))


@needs_triton
def test_the_environment_chooses(monkeypatch):
    x, *parameters = on_device(grid(5, 6, 10, torch.float32), *layer(dtype=torch.float32))
    monkeypatch.setenv("VFMADAPT_KERNELS", "triton")
    ours = bottleneck_mixture(x, *parameters, 2)
    monkeypatch.setenv("VFMADAPT_KERNELS", "reference")
    torch.testing.assert_close(ours, bottleneck_mixture(x, *parameters, 2), rtol=0, atol=1e-5)


def test_what_kernels_refuse():
    x, parameters = grid(2, 2, 4, torch.float32), layer(4, 257, torch.float32)
    assert "256 channels, not 257" in module._triton_reason(x, *parameters, 1)
    small = layer(4, 1, torch.float32)
    assert "32 waves" in module._triton_reason(grid(50, 2, 4, torch.float32), *small, 20)
    assert "float64" in module._triton_reason(x.double(), *layer(4, 1), 1)
    assert "float32" in module._triton_reason(x.half(), *small, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module._triton_reason(x, *small, 1) == ""
