"""Triton kernels written as plain functions, so that importing their file needs no Triton.

An operation's file begins with `from __future__ import annotations` (without it Triton's interpreter knows no constants
that are annotated before Triton is imported; custom operators then keep to Tensor, int, float and list[int]) and

    if TYPE_CHECKING:
        import triton.language as tl
        from triton.language import constexpr

Kernels are module-level functions without a decorator; `_TRITON = (_gelu, _forward_kernel)` lists them, helpers first.
To launch: `*_, forward = jit(_TRITON)`, then `forward[grid](..., **OPTIONS)` within `on_device(x)`. The interpreter's
bfloat16 arithmetic is wrong: cast to float32 on load, and give `tl.dot` what `operand` says.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MISSING = "" if find_spec("triton") else "Triton is not installed (PyTorch's CUDA wheels for Linux bring it)"
OPTIONS = {"enable_fp_fusion": True}  # for every launch: what Triton 3.9 does anyway, and warns that 3.10 will not
_COMPILERS = tuple(c for c in ("gcc", "clang") if shutil.which(c))


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, which takes tensors on the CPU and is there to test kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def version() -> str:
    """Triton's."""
    return metadata.version("triton")


def no_launcher() -> str:
    """Why Triton cannot build its launchers, small C programs made at a kernel's first use; or ""."""
    return "" if _COMPILERS or os.environ.get("CC") else "Triton needs a C compiler (gcc or clang; or set CC)"


def operand(dtype: torch.dtype) -> Any:
    """The Triton dtype in which `tl.dot` is given tensors of a dtype: theirs, but float32 for bfloat16 interpreted."""
    import triton.language as tl

    return {torch.float16: tl.float16, torch.bfloat16: tl.float32 if interpreting() else tl.bfloat16}.get(
        dtype, tl.float32
    )


def unsupported(*tensors: Tensor) -> str:
    """Why kernels do not take these floating tensors, or "": all must be of one of the three dtypes."""
    dtypes = {t.dtype for t in tensors}
    known = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float16, torch.bfloat16}
    return "" if known else f"takes float32, float16 or bfloat16, not {', '.join(sorted(map(str, dtypes)))}"


@cache
def jit(functions: tuple[Callable[..., Any], ...]) -> tuple[Any, ...]:
    """Kernels of the plain functions of one module, which then call each other under their own names."""
    import triton
    import triton.language as tl

    if interpreting():
        _round_as_gpus()
    for function in functions:  # to Triton "int" means 32 bits, and a stride that is never known to be 1
        kept = {name: kind for name, kind in function.__annotations__.items() if kind == "constexpr"}
        function.__annotations__ = kept
    made = tuple(triton.jit(f) for f in functions)
    for function, kernel in zip(functions, made, strict=True):
        # Triton and its interpreter look names up in the module of the kernel
        function.__globals__.update({"tl": tl, "constexpr": tl.constexpr, function.__name__: kernel})
    return made


@cache
def _round_as_gpus() -> None:
    """Make the interpreter round to bfloat16, to nearest and even: it cuts the lower bits off."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        return TensorHandle(torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.cast_impl = rounded


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which kernels start on the tensor's GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@contextmanager
def ahead(capability: int) -> Iterator[list[tuple[str, bytes]]]:
    """Within, a launch only compiles its kernel for a GPU (80: A100, 90: H100), which need not be there.

    Yields:
        (kernel, machine code) of the launches so far. Not for a process that interprets.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Target:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: capability)  # the key of the kernels' caches
        get_current_stream = staticmethod(lambda device: 0)

    done: list[tuple[str, bytes]] = []
    launch = triton.JITFunction.__getitem__
    before = driver._active

    def compile_only(kernel: Any, grid: Any) -> Callable[..., None]:
        def start(*args: Any, **options: Any) -> None:
            compiled = kernel.warmup(*args, grid=grid, **options)
            done.append((compiled.name, compiled.asm["cubin"]))

        return start

    triton.JITFunction.__getitem__ = compile_only
    driver.set_active(Target())
    try:
        yield done
    finally:
        triton.JITFunction.__getitem__ = launch
        driver._active = before
