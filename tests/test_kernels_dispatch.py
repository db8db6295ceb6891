"""Which implementation runs, and that every kernel compiles for GPUs that are not here."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from vfmadapt import benchmark, benchmark_kernels, doctor
from vfmadapt.build import compose
from vfmadapt.errors import UserError
from vfmadapt.kernels import _dispatch, _nvrtc, _triton
from vfmadapt.kernels._dispatch import Case, Implementation, Operation, Work, autocast, operations, unavailable
from vfmadapt.testing_kernels import compile_ahead

X = torch.ones(3)
CUDA = torch.device("cuda", 0)


def double(x: Tensor) -> Tensor:
    return 2 * x


def triple(x: Tensor) -> Tensor:
    return 3 * x


def operation(name: Any, reason: str = "") -> Operation:
    return Operation(
        "doubled", double, (Implementation(name, lambda x: reason, triple),), lambda x: (Work(0, 0), Work(0, 0)), ()
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an A100, as far as the questions go that are asked before anything runs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for module in (_triton, _nvrtc):
        monkeypatch.setattr(module, "MISSING", "")
    return monkeypatch


def test_auto_takes_the_first_that_can_and_else_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFMADAPT_KERNELS", raising=False)
    assert operation("cpu").choose(X) is triple
    assert operation("cpu", "too small").choose(X) is double
    assert operation("cpu").choose(X.to("meta")) is double
    assert operation("triton").choose(X) is double  # though its interpreter could: that one is for tests


def test_reference_by_name_and_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFMADAPT_KERNELS", "reference")
    assert operation("cpu").choose(X) is double
    monkeypatch.setenv("VFMADAPT_KERNELS", "fast")
    with pytest.raises(UserError, match="fast: choose one of auto, reference, triton, cuda"):
        operation("cpu")(X)


def test_a_named_implementation_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFMADAPT_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not _triton.MISSING:
        assert operation("triton").choose(X) is triple
        with pytest.raises(UserError, match="doubled cannot run so: odd sizes"):
            operation("triton", "odd sizes")(X)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="tensors are on cpu"):
        operation("triton")(X)
    monkeypatch.setenv("VFMADAPT_KERNELS", "cuda")
    with pytest.raises(UserError, match="no cuda implementation"):
        operation("triton")(X)


def test_what_a_gpu_needs(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(_triton, "no_launcher", lambda: "")
    assert [unavailable(name, CUDA) for name in ("triton", "cuda")] == ["", ""]
    assert "on cuda" in unavailable("cpu", CUDA)
    gpu.setattr(_triton, "no_launcher", lambda: "no compiler")
    gpu.setattr(_nvrtc, "MISSING", "no NVRTC")
    assert [unavailable(name, CUDA) for name in ("triton", "cuda")] == ["no compiler", "no NVRTC"]
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, the GPU has 7.5" in unavailable("cuda", CUDA)
    gpu.setattr(torch.version, "cuda", None)
    assert "not built for CUDA" in unavailable("triton", CUDA)


def test_a_missing_compiler_is_told_once(gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpu.delenv("VFMADAPT_KERNELS", raising=False)
    gpu.setattr(_nvrtc, "MISSING", "no NVRTC")
    gpu.setattr(_dispatch, "_device", lambda args: CUDA)
    _dispatch._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert operation("cuda").choose(X) is double
    assert len(caplog.records) == 1
    assert "cuda: no NVRTC" in caplog.text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("setting", ["auto", "reference"])
def test_compilers_trace_the_choice(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("VFMADAPT_KERNELS", setting)
    compiled = torch.compile(lambda x: operation_of_the_test(x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), X * (3 if setting == "auto" else 2))


operation_of_the_test = operation("cpu")


def test_export_sees_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFMADAPT_KERNELS", raising=False)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = operation_of_the_test(x)
            return result

    exported = torch.export.export(Module(), (X,))
    assert torch.equal(exported.module()(X), 2 * X)


def test_autocast_casts_what_torch_would() -> None:
    whole, double_ = torch.arange(3), X.double()
    assert autocast(X)[0] is X
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = autocast(X, whole, double_)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.int64, torch.float64]


@pytest.mark.parametrize("name", operations())
def test_no_choice_changes_results(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At most 1e-5 of the largest value, float32."""
    chosen = operations()[name]
    args = next(c for c in chosen.cases if c.device == "cpu").make(torch.device("cpu"), torch.float32)
    monkeypatch.setenv("VFMADAPT_KERNELS", "reference")
    expected = chosen(*args)
    monkeypatch.setenv("VFMADAPT_KERNELS", "auto")
    torch.testing.assert_close(chosen(*args), expected, rtol=1e-5, atol=1e-5)


def having(name: str) -> list[str]:
    return [n for n, o in operations().items() if any(i.name == name for i in o.implementations)]


@pytest.mark.skipif(bool(_nvrtc.MISSING) and sys.platform != "linux", reason="NVRTC comes with PyTorch for Linux")
@pytest.mark.parametrize("name", having("cuda"))
@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.bfloat16), (90, torch.float32)])
def test_cuda_sources_compile(name: str, capability: int, dtype: torch.dtype) -> None:
    assert all(compile_ahead(operations()[name], "cuda", capability, dtype).values())


def test_every_cuda_source_is_used() -> None:
    assert {f.stem for f in _nvrtc.SOURCES.iterdir()} == set(having("cuda"))


def test_an_error_in_a_source_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(_nvrtc, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void f(SCALAR* x) { y[0] = 1; }')
    with pytest.raises(RuntimeError, match=r'wrong.cu with .*-DSCALAR=float.*\n.*identifier "y" is undefined'):
        _nvrtc.compiled("wrong", (("SCALAR", "float"),), 80)
    source.write_text(source.read_text().replace("y[0]", "x[0]"))
    code = _nvrtc.compiled("wrong", (("SCALAR", "float"),), 80)
    kept = list((tmp_path / "vfmadapt").iterdir())
    assert [f.read_bytes() for f in kept] == [code]


AHEAD = """
import json, sys, torch
from vfmadapt.kernels._dispatch import operations
from vfmadapt.testing_kernels import compile_ahead
found = {}
for name, operation in operations().items():
    for capability, dtype in ((80, torch.bfloat16), (90, torch.float32)):
        if any(i.name == "triton" for i in operation.implementations):
            compiled = compile_ahead(operation, "triton", capability, dtype)
            found[f"{name} {capability}"] = {kernel: len(code) for kernel, code in compiled.items()}
print(json.dumps(found))
"""


@pytest.mark.skipif(bool(_triton.MISSING), reason="Triton is not installed")
def test_triton_kernels_compile() -> None:
    """In a process of its own: this one interprets."""
    done = subprocess.run(
        [sys.executable, "-c", AHEAD], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == sorted(f"{name} {capability}" for name in having("triton") for capability in (80, 90))
    assert all(sizes and all(sizes.values()) for sizes in found.values())


def small(*overrides: str) -> Any:
    return compose("benchmark", ["what=kernels", "only=[doubled]", "repeats=1", "threads=1", *overrides])


def test_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The dispatcher's choice against the reference; the same code needs no clock; columns of CUDA say why empty."""
    case = Case("three values", "cpu", lambda device, dtype: (torch.ones(3, device=device, dtype=dtype),))
    timed = dataclasses.replace(operation("cpu"), cases=(case,))
    monkeypatch.setattr(benchmark_kernels, "operations", lambda: {"doubled": timed})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("VFMADAPT_KERNELS", raising=False)
    output = tmp_path / "figures.json"
    result = benchmark.main(small(f"output={output}"))
    assert json.loads(output.read_text()) == result
    (row,) = result["cpu"]
    assert (row["operation"], row["shape"], row["train_path"]) == ("doubled", "three values", "cpu")
    assert row["train_ratio"] == pytest.approx(row["train_reference_ms"] / row["train_ms"], rel=0.5)
    assert not result["cuda"]
    assert "no CUDA device" in result["note"]
    alone = dataclasses.replace(timed, implementations=())
    monkeypatch.setattr(benchmark_kernels, "operations", lambda: {"doubled": alone})
    (row,) = benchmark.main(small())["cpu"]
    assert (row["train_path"], row["train_ratio"], "train_ms" in row) == ("reference", 1.0, False)
    with pytest.raises(UserError, match="only=tripled: choose from doubled"):
        benchmark.main(small("only=[tripled]"))
    monkeypatch.setenv("VFMADAPT_KERNELS", "reference")
    with pytest.raises(UserError, match="unset it"):
        benchmark.main(small())


def test_shares_of_what_the_device_reaches() -> None:
    rates = (100e9, 1e12)
    copied = benchmark_kernels._speed(Work(10**9, 10**9), 0.02, rates)
    assert copied == {"ms": 20.0, "gb_per_s": 50.0, "tflop_per_s": 0.05, "share": "50% of copy"}
    assert benchmark_kernels._speed(Work(10**6, 10**10), 0.04, rates)["share"] == "25% of matrix"


def test_doctor_tells_each_path_and_why_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFMADAPT_KERNELS", raising=False)
    told = doctor.main(compose("doctor"))
    assert sorted(told["operations"]) == sorted(operations())
    assert told["machine"]["VFMADAPT_KERNELS"] == "auto"
    half = told["operations"]["depthwise_dilated"]["cpu bfloat16"]
    assert half["path"] == "reference"
    assert set(half["not"]) == {"cpu", "triton", "cuda"}
    monkeypatch.setenv("VFMADAPT_KERNELS", "cuda")
    assert doctor.main(compose("doctor"))["operations"]["grouped_lora"]["cpu float32"]["path"].startswith("error: ")
