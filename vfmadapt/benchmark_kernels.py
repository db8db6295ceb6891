"""How fast each operation of `kernels/` is beside its reference, on the CPU and, where there is one, on a GPU."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vfmadapt.benchmark import interleaved
from vfmadapt.errors import UserError
from vfmadapt.kernels._dispatch import VARIABLE, Case, Operation, Work, operations

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

COPIED = 2**28  # values of the copy that measures the memory's bandwidth: 1 GiB of float32, larger than any cache
MATRIX = 8192  # rows of the product that measures the matrix rate
DTYPES = (torch.float32, torch.bfloat16)
NO_GPU = "no CUDA device here: the columns of CUDA stay empty"


def kernels(cfg: "DictConfig") -> dict[str, Any]:
    """Time every operation at the shapes that its file offers, forward and forward + backward.

    CPU: float32, what the dispatcher takes against the reference in interleaved pairs. CUDA: every implementation,
    the reference in eager mode and compiled, the file's baselines; bytes and operations are those that the
    operation needs at the least, and the share is of the device's own copy bandwidth or matrix rate, whichever binds.

    Returns:
        "cpu" and "cuda": one mapping for each row of the table; "note": why a column is empty; and the set-up.

    Raises:
        UserError: an unknown operation, or VFMADAPT_KERNELS is set.
    """
    if os.environ.get(VARIABLE, "auto") != "auto":
        raise UserError(f"benchmark kernels: {VARIABLE}={os.environ[VARIABLE]} is set; unset it, all are timed")
    found = operations()
    chosen = list(cfg.only or found)
    if unknown := [name for name in chosen if name not in found]:
        raise UserError(f"benchmark only={','.join(unknown)}: choose from {', '.join(found)}")
    before = torch.get_num_threads()
    torch.set_num_threads(int(cfg.threads))
    torch.manual_seed(int(cfg.seed))
    cases = [(found[name], case) for name in chosen for case in found[name].cases]
    try:
        rows = [_cpu(operation, case, int(cfg.repeats)) for operation, case in cases if case.device == "cpu"]
    finally:
        torch.set_num_threads(before)
    setup = {"torch": torch.__version__, "threads": int(cfg.threads), "repeats": int(cfg.repeats)}
    result: dict[str, Any] = {"setup": setup, "cpu": rows, "cuda": [], "note": ""}
    if torch.cuda.is_available():
        setup["gpu"] = torch.cuda.get_device_name()
        rates = {dtype: _rates(dtype) for dtype in DTYPES}
        on_cuda = [(operation, case) for operation, case in cases if case.device == "cuda"]
        result["cuda"] = [row for o, c in on_cuda for d in DTYPES for row in _cuda(o, c, d, rates[d], int(cfg.repeats))]
    else:
        result["note"] = NO_GPU
        log.info(NO_GPU)
    if cfg.output:
        Path(cfg.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _cpu(operation: Operation, case: Case, repeats: int) -> dict[str, Any]:
    """One row: the dispatcher's choices against the reference; the same code needs no clock."""
    args = case.make(torch.device("cpu"), torch.float32)
    row: dict[str, Any] = {"operation": operation.name, "shape": case.label}
    for name, step, sample in (("forward", _forward, args), ("train", _train, _leaves(args))):
        path = operation.path(*sample)
        ours, theirs = 1.0, 1.0
        if path != "reference":
            runs = operation.choose(*sample), operation.reference
            ours, theirs = interleaved((partial(step, runs[0], args), partial(step, runs[1], args)), repeats)
            row |= {f"{name}_ms": round(ours, 3), f"{name}_reference_ms": round(theirs, 3)}
        row |= {f"{name}_path": path, f"{name}_ratio": round(theirs / ours, 2)}
    keys = ("operation", "shape", "forward_path", "forward_ratio", "train_path", "train_ratio")
    log.info("| %s |", " | ".join(str(row[key]) for key in keys))
    return row


def _cuda(
    operation: Operation, case: Case, dtype: torch.dtype, rates: tuple[float, float], repeats: int
) -> Iterator[dict[str, Any]]:
    """One row for each function that can run the case."""
    args = case.make(torch.device("cuda"), dtype)
    runs: dict[str, Callable[..., Any]] = {
        i.name: i.run for i in operation.implementations if not operation.reason(i, *args)
    }
    runs |= {"eager": operation.reference, "compiled": torch.compile(operation.reference), **operation.baselines}
    for path, run in runs.items():
        row: dict[str, Any] = {"operation": operation.name, "shape": case.label, "dtype": str(dtype), "path": path}
        for name, step, work in zip(("forward", "train"), (_forward, _train), operation.work(*args), strict=True):
            try:
                seconds = _timed(partial(step, run, args), repeats)
            except RuntimeError as error:  # out of memory, or a baseline that does not take the dtype
                row[f"{name}_error"] = str(error).partition("\n")[0]
                continue
            row |= {f"{name}_{key}": value for key, value in _speed(work, seconds, rates).items()}
        log.info("| %s |", " | ".join(str(value) for value in row.values()))
        yield row


def _speed(work: Work, seconds: float, rates: tuple[float, float]) -> dict[str, Any]:
    """Time and what it means, `rates` being bytes and operations per second that the device reaches."""
    least = [work.bytes / rates[0], work.flops / rates[1]]
    bound = "copy" if least[0] >= least[1] else "matrix"
    return {
        "ms": round(1e3 * seconds, 3),
        "gb_per_s": round(work.bytes / seconds / 1e9, 1),
        "tflop_per_s": round(work.flops / seconds / 1e12, 2),
        "share": f"{max(least) / seconds:.0%} of {bound}",
    }


def _rates(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a copy, and operations per second of a matrix product in IEEE arithmetic (no TF32)."""
    source, target = torch.empty(2, COPIED, device="cuda")
    copy = 2 * source.nbytes / _timed(partial(target.copy_, source), 10)
    matrix = torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype)
    return copy, 2 * MATRIX**3 / _timed(partial(torch.mm, matrix, matrix), 10)


def _timed(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds on the GPU; two turns to warm up, in which kernels are compiled."""
    taken = []
    for turn in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if turn >= 2:
            taken.append(start.elapsed_time(end) / 1e3)
    return median(taken)


@torch.no_grad()
def _forward(run: Callable[..., Any], args: tuple[Any, ...]) -> None:
    run(*args)


def _train(run: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Forward and backward into every floating argument."""
    leaves = _leaves(args)
    outputs = run(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    inputs = [leaf for leaf in leaves if _floating(leaf)]
    torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs], allow_unused=True)


def _leaves(args: tuple[Any, ...]) -> list[Any]:
    """The same arguments, the floating ones wanting gradients."""
    return [a.detach().requires_grad_() if _floating(a) else a for a in args]


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
