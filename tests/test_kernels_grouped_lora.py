"""grouped_lora: a batch against its items one by one; Triton, in its interpreter where there is no GPU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vfmadapt.errors import UserError
from vfmadapt.kernels import _triton
from vfmadapt.kernels import grouped_lora as module
from vfmadapt.kernels.grouped_lora import grouped_lora, grouped_lora_reference
from vfmadapt.testing_kernels import assert_as_exact_as_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(_triton.MISSING), reason="Triton is not installed"))


@pytest.fixture
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VFMADAPT_KERNELS", request.param)
    return str(request.param)


def arguments(group: list[int], tokens: int, channels: int, outputs: int, rank: int) -> tuple[Any, ...]:
    items, adapters = len(group), 3
    shapes = [
        (items, tokens, outputs),
        (items, tokens, channels),
        (adapters, rank, channels),
        (adapters, outputs, rank),
    ]
    return *(torch.randn(s, device=DEVICE) for s in (*shapes, (adapters,))), torch.tensor(group, device=DEVICE).long()


@pytest.mark.parametrize("named", [TRITON, "reference"], indirect=True)
def test_is_each_item_by_itself(named: str) -> None:
    """Ranks below the widest are padded with zeros; nothing is added where there is no adapter."""
    base, x, down, up, scale, group = arguments([2, -1, 0, 2], 5, 7, 6, 4)
    down[0, 1:], up[0, :, 1:] = 0, 0
    y = grouped_lora(base, x, down, up, scale, group)
    assert torch.equal(y[1], base[1])
    for item, rank in ((0, 4), (2, 1), (3, 4)):
        g = group[item]
        update = scale[g] * F.linear(F.linear(x[item], down[g, :rank]), up[g, :, :rank])
        torch.testing.assert_close(y[item], base[item] + update, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("named", [TRITON], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(named: str, dtype: torch.dtype) -> None:
    """More than one block of tokens, channels and outputs, the last ones not full; one adapter has no item."""
    given = arguments([0, -1, 2, 0], 35, 37, 66, 5)
    assert_as_exact_as_torch(grouped_lora, grouped_lora_reference, given, dtype)


@pytest.mark.parametrize("named", [TRITON], indirect=True)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 5, 17)], ids=str)
def test_shapes(named: str, sizes: tuple[int, ...]) -> None:
    given = arguments([1, 0, 1, 2, 2], *sizes)
    assert_as_exact_as_torch(grouped_lora, grouped_lora_reference, given, torch.float32)


@pytest.mark.parametrize("named", [TRITON], indirect=True)
def test_views(named: str) -> None:
    """Tokens after a prefix, a third of the outputs, factors that lie transposed."""

    def cut(run: Any) -> Any:
        return lambda base, x, down, up, *rest: run(base[:, 1:, 2:4], x[:, 1:], down.mT, up.mT, *rest)

    base, x, down, up, *rest = arguments([1, 2, 0], 4, 3, 6, 2)
    given = (base, x, down.mT.contiguous(), up[:, 2:4].mT.contiguous(), *rest)
    assert_as_exact_as_torch(cut(grouped_lora), cut(grouped_lora_reference), given, torch.float32)


@pytest.mark.parametrize("named", [TRITON, "reference"], indirect=True)
@pytest.mark.parametrize(("group", "tokens"), [([], 3), ([0, 1], 0)])
def test_empty_batches(named: str, group: list[int], tokens: int) -> None:
    *tensors, index = arguments(group, tokens, 4, 5, 2)
    tensors = [t.requires_grad_() for t in tensors]
    y = grouped_lora(*tensors, index)
    assert y.shape == (len(group), tokens, 5)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), tensors))


@pytest.mark.parametrize("named", [TRITON], indirect=True)
def test_operator_is_what_torch_expects(named: str) -> None:
    *tensors, index = arguments([1, -1], 3, 4, 5, 2)
    torch.library.opcheck(module._update, (*(t.requires_grad_() for t in tensors), index))


@pytest.mark.parametrize("named", [TRITON], indirect=True)
def test_autocast_lowers_the_products(named: str) -> None:
    """What the frozen layer gave keeps its dtype."""
    given = arguments([1, 0], 3, 4, 5, 2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours, theirs = grouped_lora(*given), grouped_lora_reference(*given)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("named", [TRITON], indirect=True)
def test_what_triton_refuses(named: str) -> None:
    for given, reason in (
        (arguments([0], 2, 3, 4, 129), "ranks of 1 to 128, not 129"),
        ([t.double() if t.is_floating_point() else t for t in arguments([0], 2, 3, 4, 1)], "not torch.float64"),
    ):
        with pytest.raises(UserError, match=reason):
            grouped_lora(*given)


def test_refuses_shapes() -> None:
    base, x, down, up, scale, group = arguments([0, 1], 2, 3, 4, 2)
    for wrong in (
        (base[:1], x, down, up, scale, group),
        (base, x, down[:, :1], up, scale, group),
        (base, x, down, up, scale[:1], group),
        (base, x, down, up, scale, group[:1]),
        (base, x, down[:0], up[:0], scale[:0], group),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_lora(*wrong)
