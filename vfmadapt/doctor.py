"""Which implementation each operation of `kernels/` takes on this machine, and why not the others."""

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from vfmadapt.errors import UserError
from vfmadapt.kernels import _nvrtc, _triton
from vfmadapt.kernels._dispatch import VARIABLE, Operation, operations

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Ask the dispatcher, for training at the first shape that an operation's file offers; nothing is run.

    Returns:
        "machine": what there is to run with; "operations": {name: {"DEVICE DTYPE": {"path", "not": {name: reason}}}}.
    """
    machine = _machine()
    for name, text in machine.items():
        log.info("%-17s%s", name, text)
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    found: dict[str, Any] = {}
    for name, operation in operations().items():
        log.info("%s", name)
        found[name] = {}
        for device, dtype in ((device, dtype) for device in devices for dtype in DTYPES):
            where = f"{device.type} {str(dtype).removeprefix('torch.')}"
            found[name][where] = told = _choice(operation, device, dtype)
            reasons = "; ".join(f"{other}: {why}" for other, why in told["not"].items())
            log.info("  %-15s%s%s", where, told["path"], f"  ({reasons})" if reasons else "")
    return {"machine": machine, "operations": found}


def _machine() -> dict[str, str]:
    gpu = "none"
    if torch.cuda.is_available():
        gpu = "{}, compute capability {}.{}".format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return {
        "torch": f"{torch.__version__}, built {built}",
        "GPU": gpu,
        "Triton": _triton.MISSING or _triton.no_launcher() or f"{_triton.version()}, with a C compiler",
        "NVRTC": _nvrtc.MISSING or _nvrtc.version(),
        VARIABLE: os.environ.get(VARIABLE, "auto"),
    }


def _choice(operation: Operation, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    case = next(c for c in operation.cases if c.device == "cpu")  # the small ones
    made = case.make(device, dtype)
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in made]
    try:
        path = operation.path(*args)
    except UserError as error:
        path = f"error: {error}"
    refused = {i.name: operation.reason(i, *args) for i in operation.implementations}
    return {"path": path, "not": {name: reason for name, reason in refused.items() if reason}}
