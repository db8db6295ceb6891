"""Which implementation of an operation runs, as data.

An operation's file holds, from top to bottom: the public function, its reference in plain PyTorch with the same
signature, the other implementations, and one `OPERATION` (found by `operations`):

    def scaled(x: Tensor, factor: float) -> Tensor:              # checks shapes, documents, raises
        return OPERATION(x, factor)

    def scaled_reference(x: Tensor, factor: float) -> Tensor: ...

    OPERATION = Operation(
        "scaled", scaled_reference, (Implementation("triton", _triton_reason, _triton),), _work, CASES
    )

Implementations stand in the order of preference. Device, compiler and GPU are checked here; an implementation's own
`reason` says what else it refuses of its arguments ("" if nothing). "cpu" is plain PyTorch; "triton" (see `_triton`)
and "cuda" (see `_nvrtc`) call a `torch.library.custom_op` made with register_fake and register_autograd, on tensors
that `autocast` has cast where the operation is one that autocast lowers.
"""

import logging
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vfmadapt.errors import UserError
from vfmadapt.kernels import _nvrtc, _triton

VARIABLE = "VFMADAPT_KERNELS"
CHOICES = ("auto", "reference", "triton", "cuda")
CAPABILITY = (8, 0)  # the oldest GPUs with bfloat16, and the oldest that the tests compile for

log = logging.getLogger(__name__)


class Work(NamedTuple):
    """What an operation must do at the least: bytes read and written, floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One shape for tools/benchmark.py: `make(device, dtype)` gives the operation's arguments."""

    label: str
    device: Literal["cpu", "cuda"]
    make: Callable[[torch.device, torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    Attributes:
        name: what it needs: nothing ("cpu"), Triton, or NVRTC.
        reason: of the operation's arguments: why this cannot run them, or "".
        run: takes the operation's arguments.
    """

    name: Literal["cpu", "triton", "cuda"]
    reason: Callable[..., str]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """A reference, what may run in its place, and how to time them.

    Attributes:
        name: the file's.
        reference: plain PyTorch; what exporters see.
        implementations: by preference.
        work: of the arguments: of a forward pass and of forward + backward.
        cases: shapes to time; those on CUDA with tensors of 64 MB or more, so that no cache holds them.
        baselines: further functions to time beside the reference, with the same arguments.
    """

    name: str
    reference: Callable[..., Any]
    implementations: tuple[Implementation, ...]
    work: Callable[..., tuple[Work, Work]]
    cases: Sequence[Case]
    baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """Run whatever `choose` gives."""
        return self.choose(*args)(*args)

    def choose(self, *args: Any) -> Callable[..., Any]:
        """The function for these arguments: VFMADAPT_KERNELS's, or the first that supports them, or the reference.

        Raises:
            UserError: VFMADAPT_KERNELS is none of the known, or names what cannot run, with the reason.
        """
        setting = os.environ.get(VARIABLE, "auto")
        if setting not in CHOICES:
            raise UserError(f"{VARIABLE}={setting}: choose one of {', '.join(CHOICES)}")
        if setting == "reference" or _exporting():
            return self.reference
        if setting != "auto":
            return self._named(setting, args)
        for implementation in self.implementations:
            if not self.reason(implementation, *args):
                return implementation.run
        self._notice(_device(args))
        return self.reference

    def path(self, *args: Any) -> str:
        """Name of what `choose` gives: an implementation's, or "reference"."""
        run = self.choose(*args)
        return next((i.name for i in self.implementations if i.run == run), "reference")

    def reason(self, implementation: Implementation, *args: Any, interpret: bool = False) -> str:
        """Why an implementation cannot run these arguments, or ""; with `interpret`, Triton may run on the CPU."""
        return unavailable(implementation.name, _device(args), interpret) or implementation.reason(*args)

    def _named(self, name: str, args: tuple[Any, ...]) -> Callable[..., Any]:
        reason = f"it has no {name} implementation"
        for implementation in self.implementations:
            if implementation.name == name:
                reason = self.reason(implementation, *args, interpret=True)
                if not reason:
                    return implementation.run
        raise UserError(f"{VARIABLE}={name}: {self.name} cannot run so: {reason}; {VARIABLE}=auto takes what can")

    def _notice(self, device: torch.device) -> None:
        if device.type == "cuda" and not torch.compiler.is_compiling():  # a compiler cannot trace logging
            missing = {i.name: _missing(i.name) for i in self.implementations if i.name != "cpu"}
            if missing and all(missing.values()):
                _warn("; ".join(f"{name}: {why}" for name, why in missing.items()))


def unavailable(name: str, device: torch.device, interpret: bool = False) -> str:
    """Why nothing of that name runs on a device, or ""."""
    if name == "cpu":
        return "" if device.type == "cpu" else f"the tensors are on {device.type}"
    if name == "triton" and device.type == "cpu" and interpret and _triton.interpreting():
        return _triton.MISSING
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return "needs compute capability {}.{}, the GPU has {}.{}".format(*CAPABILITY, *capability)
    return _missing(name)


def operations() -> dict[str, Operation]:
    """Every operation by name: the `OPERATION` of each file of this folder that has one."""
    folder = import_module("vfmadapt.kernels").__path__
    files = (import_module(f"vfmadapt.kernels.{m.name}") for m in pkgutil.iter_modules(folder) if m.name[0] != "_")
    found: list[Operation] = [f.OPERATION for f in files if hasattr(f, "OPERATION")]
    return {operation.name: operation for operation in found}


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast casts the inputs of a convolution or a product; untouched where it is off."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _missing(name: str) -> str:
    return _triton.MISSING or _triton.no_launcher() if name == "triton" else _nvrtc.MISSING


def _device(args: tuple[Any, ...]) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))


def _exporting() -> bool:
    """Whether torch.export, torch.onnx or torch.jit.trace is at work."""
    # torch 2.6 has no is_exporting; its exporter says that it compiles
    asked: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return asked() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


@cache
def _warn(missing: str) -> None:
    """Once for each text."""
    log.warning("vfmadapt: kernels run in plain PyTorch (%s); `vfmadapt doctor` says more", missing)
