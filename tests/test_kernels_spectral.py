"""spectral_split: every implementation against the Fourier mask, and what each refuses.

Without a GPU, Triton's kernel runs in its interpreter and CUDA's is only compiled (test_kernels_dispatch.py).
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from vfmadapt.errors import UserError
from vfmadapt.kernels import _triton
from vfmadapt.kernels import spectral_split as module
from vfmadapt.kernels.spectral_split import (
    OPERATION,
    spectral_split,
    spectral_split_direct,
    spectral_split_reference,
)
from vfmadapt.testing_kernels import assert_as_exact_as_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# height, width, cutoff: even, odd, H != W, one cell, nothing kept, 2q = size, 2q > size on one axis and on both
GRIDS = [(32, 32, 4), (8, 6, 2), (5, 7, 1), (7, 4, 2), (1, 1, 0), (1, 1, 1), (1, 9, 1), (6, 4, 0), (6, 4, 3), (5, 3, 9)]
SHAPES = ["square", "disc"]
PLAIN = [spectral_split_reference, module._transformed, spectral_split_direct]
GPU = [
    pytest.param(
        module._triton, id="triton", marks=pytest.mark.skipif(bool(_triton.MISSING), reason="Triton is not installed")
    ),
    pytest.param(module._cuda, id="cuda", marks=pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")),
]


def grid(height: int, width: int, channels: int = 3, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    drawn = torch.randn(batch, height, width, channels, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return drawn.to(DEVICE)


@pytest.mark.parametrize(("height", "width", "cutoff"), GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("split", PLAIN[:2])
def test_split_is_the_fourier_mask(split: Any, height: int, width: int, cutoff: int, shape: Any) -> None:
    x = grid(height, width)
    for ours, theirs in zip(split(x, cutoff, shape), spectral_split_direct(x, cutoff, shape), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("split", PLAIN)
@pytest.mark.parametrize("shape", SHAPES)
def test_split_of_single_waves(split: Any, shape: Any) -> None:
    """Known answers, also for the oracle: at the cutoff the half-open band keeps one of two conjugate terms."""
    column = torch.arange(12, dtype=torch.float64)
    for frequency, kept in [(0, 1.0), (2, 1.0), (3, 0.5 if shape == "square" else 1.0), (4, 0.0)]:
        wave = torch.cos(2 * math.pi * frequency * column / 12).expand(1, 8, 12)[..., None]
        low, high = split(wave, 3, shape)
        torch.testing.assert_close(low, kept * wave, rtol=0, atol=1e-14)
        torch.testing.assert_close(low + high, wave, rtol=0, atol=1e-14)


@pytest.mark.parametrize("split", PLAIN)
def test_split_of_diagonal_waves(split: Any) -> None:
    """A disc of 5 keeps (3, 4) and not (4, 4); a square of 4 keeps half of (4, 4) and nothing of (4, -4)."""
    y, x = torch.arange(16.0, dtype=torch.float64)[:, None], torch.arange(12.0, dtype=torch.float64)

    def kept(u: int, v: int, *settings: Any) -> float:
        wave = torch.cos(2 * math.pi * (u * y / 16 + v * x / 12))[None, ..., None]
        low = split(wave, *settings)[0]
        share = float((low * wave).sum() / (wave * wave).sum())
        torch.testing.assert_close(low, share * wave, rtol=0, atol=1e-14)
        return round(share, 12)

    assert [kept(3, 4, 5, "disc"), kept(3, -4, 5, "disc"), kept(4, 4, 5, "disc")] == [1, 1, 0]
    assert [kept(4, 4, 4, "square"), kept(4, -4, 4, "square"), kept(4, 3, 4, "square")] == [0.5, 0, 0.5]


@pytest.mark.parametrize("shape", SHAPES)
def test_split_at_the_ends(shape: Any) -> None:
    x = grid(6, 5)
    low, high = spectral_split(x, 0, shape)
    torch.testing.assert_close(low, torch.zeros_like(x) if shape == "square" else x.mean((1, 2), True).expand_as(x))
    assert torch.equal(high, x - low)
    low, _ = spectral_split(x, 6, shape)
    torch.testing.assert_close(low, x)


@pytest.mark.parametrize("split", PLAIN[:2])
@pytest.mark.parametrize("shape", SHAPES)
def test_split_gradient(split: Any, shape: Any) -> None:
    x = grid(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: split(x, 1, shape), x)
    assert torch.autograd.gradgradcheck(lambda x: split(x, 1, shape), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("split", PLAIN[:2])
def test_split_precision(split: Any, dtype: torch.dtype, autocast: bool) -> None:
    """At most twice the error that torch's own transform makes in the dtype, and no less exact under autocast."""
    exact = spectral_split_direct(grid(17, 32, 8), 4)
    x = grid(17, 32, 8).to(dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        ours, theirs = split(x, 4, "square"), spectral_split_direct(x, 4)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        assert (a - true).abs().max() <= 2 * (b - true).abs().max()


@pytest.mark.parametrize("split", GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_precision(split: Any, dtype: torch.dtype, shape: Any) -> None:
    assert_as_exact_as_torch(split, spectral_split_reference, (grid(9, 6, 5), 2, shape), dtype)


@pytest.mark.parametrize("split", GPU)
@pytest.mark.parametrize(("height", "width", "cutoff"), [(1, 1, 0), (1, 1, 1), (1, 9, 1), (6, 4, 3), (4, 18, 8)])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_on_odd_grids(split: Any, height: int, width: int, cutoff: int, shape: Any) -> None:
    args = grid(height, width, 33 if width == 9 else 2), cutoff, shape
    assert_as_exact_as_torch(split, spectral_split_reference, args, torch.float32)


@pytest.mark.parametrize("split", [*PLAIN[:2], *GPU])
def test_views_and_empty_batches(split: Any) -> None:
    """Channels cut out of wider tokens, cells cut out of a larger grid; no tensor is made contiguous first."""

    def cut(run: Any, x: Tensor, *settings: Any) -> Any:
        return run(x[:, 1:, 2:-1, 1::2], *settings)

    args = grid(5, 7, 6), 1, "square"
    assert_as_exact_as_torch(partial(cut, split), partial(cut, spectral_split_reference), args, torch.float32)
    x = grid(5, 7, batch=0, dtype=torch.float32).requires_grad_()
    low, high = split(x, 1, "square")
    assert torch.autograd.grad(low.sum() + high.sum(), x)[0].shape == low.shape == high.shape == x.shape


@GPU[0].marks[0]
def test_operator_is_what_torch_expects() -> None:
    torch.library.opcheck(
        module._triton, (grid(2, 4, dtype=torch.float32)[:, :, 1:, ::2].requires_grad_(), 1, "square")
    )


@GPU[0].marks[0]
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    x = grid(6, 5, dtype=torch.float32)
    monkeypatch.setenv("VFMADAPT_KERNELS", "triton")
    theirs = spectral_split(x, 2)
    with pytest.raises(UserError, match="float64"):
        spectral_split(x.double(), 2)
    with pytest.raises(UserError, match="keeps up to 32 waves of an axis, not 41"):
        spectral_split(grid(64, 2, dtype=torch.float32), 20)
    monkeypatch.setenv("VFMADAPT_KERNELS", "reference")
    for a, b in zip(theirs, spectral_split(x, 2), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_where_transforms_are_less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large smooth grids and cutoffs; 101 is prime, and its transform takes three times as long."""
    monkeypatch.delenv("VFMADAPT_KERNELS", raising=False)
    for size, cutoff, chosen in [
        (32, 4, spectral_split_reference),
        (64, 9, spectral_split_reference),
        (128, 60, module._transformed),
        (101, 50, spectral_split_reference),
    ]:
        assert OPERATION.choose(torch.zeros(1, size, size, 1), cutoff, "square") is chosen


def test_what_a_block_of_threads_holds() -> None:
    """Shared memory bounds CUDA's products; beyond, cuFFT splits."""
    assert [module._lanes(m, m, 64) for m in (9, 17, 19, 25, 27)] == [32, 32, 16, 16, 0]
    assert "31 bits" in module._too_large(torch.empty(1, 2**16, 2**15 + 1, 1, device="meta"))


@pytest.mark.parametrize("x", [torch.zeros(2, 4, 3), torch.zeros(1, 4, 4, 1, dtype=torch.int64)])
def test_split_refuses(x: Tensor) -> None:
    with pytest.raises(ValueError, match="real"):
        spectral_split(x, 1)
    with pytest.raises(ValueError, match="negative"):
        spectral_split(torch.zeros(1, 4, 4, 1), -1)
    with pytest.raises(ValueError, match="square or disc"):
        spectral_split(torch.zeros(1, 4, 4, 1), 1, "ring")  # type: ignore[arg-type]
