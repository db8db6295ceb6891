"""Kernels: the fast form of each operation against its equation."""

import copy
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vfmadapt.kernels.bottleneck_mixture import bottleneck_mixture, bottleneck_mixture_reference
from vfmadapt.kernels.spectral_split import spectral_split, spectral_split_direct

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


@pytest.mark.parametrize(("height", "width", "cutoff"), GRIDS)
def test_split_is_the_fourier_mask(height, width, cutoff):
    x = grid(height, width)
    for ours, theirs in zip(spectral_split(x, cutoff), spectral_split_direct(x, cutoff), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("split", [spectral_split, spectral_split_direct])
def test_split_of_single_waves(split):
    """Known answers, also for the oracle: at the cutoff the half-open band keeps one of two conjugate terms."""
    column = torch.arange(12, dtype=torch.float64)
    for frequency, kept in [(0, 1.0), (2, 1.0), (3, 0.5), (4, 0.0)]:
        wave = torch.cos(2 * math.pi * frequency * column / 12).expand(1, 8, 12)[..., None]
        low, high = split(wave, 3)
        torch.testing.assert_close(low, kept * wave, rtol=0, atol=1e-14)
        torch.testing.assert_close(low + high, wave, rtol=0, atol=1e-14)


def test_split_at_the_ends():
    x = grid(6, 5)
    low, high = spectral_split(x, 0)
    assert torch.equal(low, torch.zeros_like(x))
    assert torch.equal(high, x)
    low, _ = spectral_split(x, 6)
    torch.testing.assert_close(low, x)


def test_split_gradient():
    x = grid(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spectral_split(x, 1), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_split_precision(dtype, autocast):
    """At most twice the error that torch's own transform makes in the dtype, and no less exact under autocast."""
    exact = spectral_split_direct(grid(17, 32, 8), 4)
    x = grid(17, 32, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours, theirs = spectral_split(x, 4), spectral_split_direct(x, 4)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        assert (a - true).abs().max() <= 2 * (b - true).abs().max()


@pytest.mark.parametrize("x", [torch.zeros(2, 4, 3), torch.zeros(1, 4, 4, 1, dtype=torch.int64)])
def test_split_refuses(x):
    with pytest.raises(ValueError, match="real"):
        spectral_split(x, 1)
    with pytest.raises(ValueError, match="negative"):
        spectral_split(torch.zeros(1, 4, 4, 1), -1)


@pytest.mark.parametrize(("height", "width", "cutoff"), GRIDS)
def test_mixture_is_its_equations(height, width, cutoff):
    x, parameters = grid(height, width, 10).requires_grad_(), layer()
    ours = bottleneck_mixture(x, *parameters, cutoff)
    theirs = bottleneck_mixture_reference(x, *parameters, cutoff)
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
    """At most twice the error of the direct form in the same dtype, results and gradients."""

    def run(form, dtype):
        x = grid(16, 9, 64).to(dtype).requires_grad_()
        parameters = layer(64, 8, dtype)
        y = form(x, *parameters, 2)
        return [y, *torch.autograd.grad(y, [x, *parameters], grid(16, 9, 64).flip(0).to(dtype))]

    exact = run(bottleneck_mixture_reference, torch.float64)
    for ours, theirs, true in zip(
        run(bottleneck_mixture, dtype), run(bottleneck_mixture_reference, dtype), exact, strict=True
    ):
        assert ours.dtype == dtype
        # a single number (the scale's gradient) may be exact by luck: a few roundings are always allowed to it
        few = 8 * torch.finfo(dtype).eps * true.abs() if true.ndim == 0 else 0
        assert (ours - true).norm() <= max(2 * (theirs - true).norm(), few)


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
    torch.testing.assert_close(bottleneck_mixture(x, *parameters, 1), bottleneck_mixture_reference(x, *parameters, 1))


def test_functions_are_plain_values():
    for function in (spectral_split, bottleneck_mixture):
        assert copy.deepcopy(function) is function
        assert pickle.loads(pickle.dumps(function)) is function
