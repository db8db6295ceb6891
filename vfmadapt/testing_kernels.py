"""What the tests ask of every implementation of a kernel; for tests of one's own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vfmadapt.kernels import _nvrtc, _triton
from vfmadapt.kernels._dispatch import Operation


def results(run: Callable[..., Any], args: Sequence[Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of `run` in a dtype and the gradients of its floating arguments, for seeded cotangents."""
    cast = [a.detach().to(dtype).requires_grad_() if _floating(a) else a for a in args]
    outputs = run(*cast)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    drawn = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=drawn, dtype=torch.float64).to(dtype).to(o.device) for o in outputs]
    inputs = {i: a for i, a in enumerate(cast) if _floating(a)}
    gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"gradient of argument {i}": g for i, g in zip(inputs, gradients, strict=True)}


SLACK = 3.0
"""Torch's own error depends on how a CPU sums: a kernel at 1.9 times that of one is at 2.2 times that of another."""


def assert_as_exact_as_torch(
    run: Callable[..., Any], reference: Callable[..., Any], args: Sequence[Any], dtype: torch.dtype
) -> None:
    """Outputs and gradients of `run` are at most `SLACK` times as far from float64's as the reference's in its dtype.

    Far is meant as the norm of the difference. Nothing need be closer than the float64 result rounded to the dtype.

    Args:
        run: takes `args`.
        reference: likewise, in plain PyTorch.
        args: floating tensors, which are rounded to the dtype for all three; anything else is passed as it is.
        dtype: in which `run` works.
    """
    rounded = [a.detach().to(dtype) if _floating(a) else a for a in args]
    exact = results(reference, rounded, torch.float64)
    ours, theirs = results(run, rounded, dtype), results(reference, rounded, dtype)
    for name, true in exact.items():
        assert ours[name].dtype == dtype, f"{name} is {ours[name].dtype}"
        assert ours[name].shape == true.shape, f"{name} is {tuple(ours[name].shape)}, not {tuple(true.shape)}"
        error, allowed = (float((x - true).norm()) for x in (ours[name], theirs[name]))
        rounding = float((true.to(dtype) - true).norm())
        assert error <= SLACK * max(allowed, rounding), f"{name}: error {error:.3g}, torch's own {allowed:.3g}"


def compile_ahead(operation: Operation, name: str, capability: int, dtype: torch.dtype) -> dict[str, bytes]:
    """Compile what an implementation launches, forward and backward, for a GPU that need not be there.

    Triton must not be interpreting in this process.

    Args:
        operation: whose first CPU case gives the sizes.
        name: "triton" or "cuda".
        capability: 80 (A100), 90 (H100), ...
        dtype: of the tensors.

    Returns:
        {kernel: machine code}.
    """
    case = next(c for c in operation.cases if c.device == "cpu")
    run = next(i.run for i in operation.implementations if i.name == name)
    args = [a.requires_grad_() if _floating(a) else a for a in case.make(torch.device("cpu"), dtype)]
    module = {"triton": _triton, "cuda": _nvrtc}[name]
    with module.ahead(capability) as compiled:
        outputs = run(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.zeros_like(o) for o in outputs])
    return dict(compiled)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
