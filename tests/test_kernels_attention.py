"""lowrank_attention in Triton against float64; without a GPU in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vfmadapt.errors import UserError
from vfmadapt.kernels import _triton
from vfmadapt.kernels import lowrank_attention as module
from vfmadapt.kernels.lowrank_attention import lowrank_attention, lowrank_attention_reference
from vfmadapt.testing_kernels import assert_as_exact_as_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(bool(_triton.MISSING), reason="Triton is not installed")


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFMADAPT_KERNELS", "triton")


def arguments(batch: int, queries: int, keys: int, rank: int, width: int, heads: int) -> tuple[Any, ...]:
    inner = heads * width
    shapes = [(batch, queries, rank), (batch, keys, rank), (batch, keys, rank), *[(inner, rank)] * 3, (rank, inner)]
    return *(torch.randn(s, device=DEVICE) / rank**0.5 for s in shapes), heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    """More than one block of queries and of keys, the last ones not full; ranks that are no power of two."""
    assert_as_exact_as_torch(lowrank_attention, lowrank_attention_reference, arguments(2, 67, 35, 5, 8, 2), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (1, 3, 66, 17, 4, 2)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    """One cell that sees one cell; a rank above the heads' width."""
    assert_as_exact_as_torch(lowrank_attention, lowrank_attention_reference, arguments(*shape), torch.float32)


def test_views() -> None:
    """Tokens after a prefix, and keys and values that are halves of one tensor."""
    q, k, _, *weights, heads = arguments(2, 5, 6, 4, 3, 2)

    def cut(attend: Any) -> Any:
        return lambda q, kv, *rest: attend(q[:, 1:], *kv.chunk(2, -1), *rest)

    both = (q, torch.cat([k, k.flip(1)], -1), *weights, heads)
    assert_as_exact_as_torch(cut(lowrank_attention), cut(lowrank_attention_reference), both, torch.float32)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")  # in what is not kept
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_from_zero(sign: int) -> None:
    """Exponentials that overflow, beyond the last key, spoil nothing; saturated weights leave float32's roundings."""
    q, k, *rest, heads = arguments(1, 4, 3, 4, 4, 1)
    tensors = [t.abs().requires_grad_() for t in (30 * q, 30 * k, *rest)]

    def run(attend: Any) -> tuple[Tensor, ...]:
        y = attend(tensors[0], sign * tensors[1], *tensors[2:], heads)
        return y, *torch.autograd.grad(y.sum(), tensors)

    for ours, theirs in zip(run(lowrank_attention), run(lowrank_attention_reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)


def test_empty_batches() -> None:
    *tensors, heads = arguments(0, 4, 5, 3, 2, 2)
    tensors = [t.requires_grad_() for t in tensors]
    y = lowrank_attention(*tensors, heads)
    assert y.shape == (0, 4, 3)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), tensors))


def test_operator_is_what_torch_expects() -> None:
    q, k, v = (torch.randn(s, device=DEVICE, requires_grad=True) for s in [(1, 5, 2, 3), (1, 4, 3), (1, 4, 3)])
    torch.library.opcheck(module._attend, (q, k, v))


def test_autocast_lowers_it_as_a_product() -> None:
    tensors = arguments(1, 5, 4, 3, 4, 2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours, theirs = lowrank_attention(*tensors), lowrank_attention_reference(*tensors)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 2, 2, 129, 1, 1), torch.float32, "ranks of 1 to 128, not 129"),
        ((1, 2, 0, 2, 1, 1), torch.float32, "no keys"),
        ((1, 2, 2, 2, 1, 1), torch.float64, "not torch.float64"),
    ],
)
def test_what_it_refuses(shape: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        lowrank_attention(*(t.to(dtype) if isinstance(t, Tensor) else t for t in arguments(*shape)))
