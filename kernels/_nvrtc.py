"""CUDA C++ compiled at first use by NVRTC, which PyTorch's Linux wheel brings: no nvcc, nothing at install time.

Sources lie in `csrc/`. A kernel is `extern "C" __global__`; its integer arguments are `long long`, its floating ones
`float`, and what it must know when compiled (scalar type, sizes of loops) are macros: `launch(...)` says their values.
Machine code is kept in the user's cache folder under a hash of everything that it depends on.
"""

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "csrc"
SCALARS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}

Macros = tuple[tuple[str, str], ...]


def _first(pattern: str) -> Path | None:
    """The first file that fits among those of NVIDIA's wheels."""
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    return next((f for folder in folders or () for f in sorted(Path(folder).glob(pattern))), None)


def _missing() -> str:
    if _LIBRARY is None:
        return "NVRTC is not installed (PyTorch's CUDA wheels for Linux bring it)"
    return (
        "" if _HEADER else "the CUDA runtime's headers are not installed (PyTorch's CUDA wheels for Linux bring them)"
    )


_LIBRARY = _first(f"*/lib/libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}")
_HEADER = _first("*/include/cuda_fp16.h")
MISSING = _missing()


def launch(
    kernel: str, macros: Mapping[str, object], grid: tuple[int, ...], block: int, args: tuple[Any, ...], shared: int = 0
) -> None:
    """Start `kernel` ("FILE:FUNCTION") on the GPU of its first argument, on torch's current stream.

    Args:
        kernel: file of `csrc/` without its suffix, and function.
        macros: {name: value} that the source is compiled with.
        grid: up to three numbers of blocks.
        block: threads.
        args: tensors (whose addresses are passed), ints and floats.
        shared: bytes of dynamic shared memory.
    """
    file, name = kernel.split(":")
    values = tuple((key, str(value)) for key, value in macros.items())
    if _ahead:
        _ahead[-1][1].append((kernel, compiled(file, values, _ahead[-1][0])))
        return
    with torch.cuda.device(args[0].device):
        major, minor = torch.cuda.get_device_capability()
        function = _function(file, name, values, 10 * major + minor, torch.cuda.current_device())
        held = [_argument(a) for a in args]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(a) for a in held))
        sizes = (*grid, 1, 1)[:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(_driver().cuLaunchKernel(function, *sizes, block, 1, 1, shared, stream, pointers, None))


@cache
def compiled(file: str, macros: Macros, capability: int) -> bytes:
    """Machine code (cubin) of a source for sm_CAPABILITY, from the cache folder where it is there.

    Raises:
        RuntimeError: the source does not compile; with NVRTC's log.
    """
    source = (SOURCES / f"{file}.cu").read_bytes()
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17", *(f"-D{key}={value}" for key, value in macros)]
    parts = [source, version().encode(), *(o.encode() for o in options)]
    kept = _folder() / f"{file}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.cubin"
    with suppress(OSError):
        return kept.read_bytes()
    assert _HEADER is not None
    binary = _compile(source, f"{file}.cu", [*options, f"-I{_HEADER.parent}"])
    with suppress(OSError):  # a folder that cannot be written costs a compilation each time, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file_:
            file_.write(binary)
        os.replace(file_.name, kept)
    return binary


@contextmanager
def ahead(capability: int) -> Iterator[list[tuple[str, bytes]]]:
    """Within, a launch only compiles its kernel for a GPU (80: A100, 90: H100), which need not be there.

    Yields:
        (kernel, machine code) of the launches so far.
    """
    done: list[tuple[str, bytes]] = []
    _ahead.append((capability, done))
    try:
        yield done
    finally:
        _ahead.pop()


_ahead: list[tuple[int, list[tuple[str, bytes]]]] = []


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vfmadapt"


@cache
def _nvrtc() -> ctypes.CDLL:
    return ctypes.CDLL(str(_LIBRARY))


@cache
def version() -> str:
    """NVRTC's."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _compile(source: bytes, name: str, options: list[str]) -> bytes:
    library, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None)
    try:
        failed = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        )
        what = "ProgramLog" if failed else "CUBIN"
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, text)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"NVRTC cannot compile {name} with {' '.join(options)}:\n{text.value.decode()}")
    return text.raw


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA error {status}: {(text.value or b'unknown').decode()}")


@cache
def _function(file: str, name: str, macros: Macros, capability: int, device: int) -> ctypes.c_void_p:
    """A kernel, loaded on the current device, which is `device`."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), compiled(file, macros, capability)))
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    return function


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_longlong(value)
