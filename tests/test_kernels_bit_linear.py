"""bit_linear in Triton, in its interpreter where there is no GPU, and by bytes, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vfmadapt.check_golden import read
from vfmadapt.errors import UserError
from vfmadapt.kernels import _triton
from vfmadapt.kernels import bit_linear as module
from vfmadapt.kernels.bit_linear import OPERATION, bit_linear, bit_linear_reference, codebook, packed_size
from vfmadapt.testing_kernels import assert_as_exact_as_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(_triton.MISSING), reason="Triton is not installed"))


@pytest.fixture
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VFMADAPT_KERNELS", request.param)
    return str(request.param)


def layer(inputs: int, outputs: int, bits: int) -> tuple[Any, ...]:
    """What follows x in the arguments."""
    packed = torch.randint(256, (packed_size(inputs * outputs, bits),), dtype=torch.uint8, device=DEVICE)
    statistics = torch.tensor([0.01, 0.5, *codebook(bits)], device=DEVICE)
    return packed, statistics[0], statistics[1], statistics[2:], outputs


def of_x(run: Any, rest: tuple[Any, ...]) -> Any:
    """A function of x alone: mean, deviation and codebook are float32 whatever x is, and not trained."""

    def call(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y: Tensor = run(x, *(t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t for t in rest))
        return y

    return call


@pytest.mark.parametrize("named", [TRITON], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_precision(named: str, bits: int, dtype: torch.dtype) -> None:
    """Rows that end within a byte; more than one block of tokens and step of inputs, the last ones not full."""
    rest = layer(71, 5, bits)
    x = torch.randn(3, 13, 71, device=DEVICE)
    assert_as_exact_as_torch(of_x(bit_linear, rest), of_x(bit_linear_reference, rest), [x], dtype)


@pytest.mark.parametrize("named", [TRITON], indirect=True)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 67)])
def test_shapes(named: str, inputs: int, outputs: int) -> None:
    """One weight; more outputs than a block has. Tokens are cut out of longer ones."""
    rest = layer(inputs, outputs, 1)
    ours, theirs = (of_x(lambda x, *r, f=f: f(x[:, 1:, ::2], *r), rest) for f in (bit_linear, bit_linear_reference))
    assert_as_exact_as_torch(ours, theirs, [torch.randn(2, 4, 2 * inputs, device=DEVICE)], torch.float32)


@pytest.mark.parametrize("named", [TRITON], indirect=True)
def test_empty_batches(named: str) -> None:
    x = torch.zeros(0, 3, 5, device=DEVICE, requires_grad=True)
    y = bit_linear(x, *layer(5, 7, 2))
    assert y.shape == (0, 3, 7)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("named", [TRITON, "auto"], indirect=True)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_published_bytes(named: str, bits: int, request: pytest.FixtureRequest) -> None:
    golden = read(request.path.parent / f"golden/bit{bits}_linear_a.safetensors")
    stored = {k: t.to(DEVICE) for k, t in golden.stored.items()}
    x, y = golden.inputs["x"].detach().to(DEVICE), stored["output/y"]
    statistics = stored["output/mean"][0], stored["output/std"][0], stored["output/codebook"]
    torch.testing.assert_close(bit_linear(x, stored["output/packed"], *statistics, y.shape[-1]), y)


@pytest.mark.parametrize("named", [TRITON], indirect=True)
def test_operator_is_what_torch_expects(named: str) -> None:
    x = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    torch.library.opcheck(module._product, (x, *layer(5, 7, 1), False))


@pytest.mark.parametrize("named", [TRITON], indirect=True)
def test_autocast_lowers_it_as_a_product(named: str) -> None:
    x, rest = torch.randn(4, 6, device=DEVICE), layer(6, 5, 2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours, theirs = bit_linear(x, *rest), bit_linear_reference(x, *rest)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("named", [TRITON], indirect=True)
def test_what_triton_refuses(named: str) -> None:
    x, (packed, mean, *rest) = torch.randn(4, 6, device=DEVICE), layer(6, 5, 2)
    with pytest.raises(UserError, match=r"not torch\.float64"):
        bit_linear(x.double(), packed, mean, *rest)
    trained = mean.clone().requires_grad_()
    with pytest.raises(UserError, match="no gradient to mean"):
        bit_linear(x, packed, trained, *rest)
    with torch.no_grad():
        bit_linear(x, packed, trained, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_by_bytes(bits: int, dtype: torch.dtype) -> None:
    rest = layer(71, 5, bits)
    x = torch.randn(3, 71, device=DEVICE)
    assert_as_exact_as_torch(of_x(module._by_bytes, rest), of_x(bit_linear_reference, rest), [x], dtype)


def test_when_the_cpu_goes_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFMADAPT_KERNELS", raising=False)
    for inputs, outputs, bits, chosen in [
        (128, 128, 4, module._by_bytes),
        (128, 127, 4, bit_linear_reference),
        (128, 128, 8, bit_linear_reference),
    ]:
        rest = (t.cpu() if isinstance(t, Tensor) else t for t in layer(inputs, outputs, bits))
        assert OPERATION.choose(torch.zeros(1, inputs), *rest) is chosen
