"""Files of published numbers, and the adapters' agreement with them.

A golden file (safetensors) holds what a method's published implementation computes on small inputs: `input/NAME`,
`param/NAME` (its state under its published names), `output/NAME`, `cotangent/y` (a random G), and the gradients of
sum(G * output/y): `grad_input/NAME`, `grad_param/NAME`. Metadata: `method`, `settings` (JSON).
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
"""Largest |ours - theirs| over max(1, largest |theirs|): float32 sums in another order."""


@dataclass(frozen=True)
class Golden:
    """One file. `inputs` and `params` are leaves that require a gradient where the file stores one."""

    method: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    params: Mapping[str, Tensor]
    cotangent: Tensor | None
    stored: Mapping[str, Tensor]

    def backward(self, y: Tensor) -> None:
        """Gradients of sum(G * y), in the `.grad` of every leaf."""
        assert self.cotangent is not None
        y.backward(self.cotangent)


def read(path: str | Path) -> Golden:
    """Read a golden file; raises UserError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        method, settings = metadata["method"], json.loads(metadata["settings"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no golden file ({type(error).__name__}: {error})") from error

    def group(prefix: str) -> dict[str, Tensor]:
        found = {}
        for key, tensor in stored.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                wanted = f"grad_{prefix}{name}" in stored
                found[name] = tensor.clone().requires_grad_(wanted)
        return found

    return Golden(method, settings, group("input/"), group("param/"), stored.get("cotangent/y"), stored)


def compare(golden: Golden, ours: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest difference over its tolerance (at most 1 is agreement), and where it is.

    `ours` must hold every key of the file but inputs, parameters and the cotangent; a missing one differs infinitely.
    """
    worst, where = 0.0, ""
    for key, theirs in golden.stored.items():
        if key.split("/")[0] in ("input", "param", "cotangent"):
            continue
        if key not in ours or ours[key].shape != theirs.shape:
            return float("inf"), key
        mine = ours[key].detach()
        if not theirs.is_floating_point():
            share = 0.0 if torch.equal(mine.to(theirs.dtype), theirs) else float("inf")
        else:
            limit = GRADIENT_TOLERANCE if "grad" in key.split("/")[0] else OUTPUT_TOLERANCE
            scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
            share = float((mine - theirs).abs().max()) / (limit * scale) if theirs.numel() else 0.0
        if not share <= worst:
            worst, where = share, key
    return worst, where


def check(path: str | Path) -> tuple[str, float, str]:
    """("ok", "FAILED" or "waiting", difference over tolerance, where it is) of one file.

    A method without a replay in `vfmadapt.interop` is waiting.
    """
    from vfmadapt.interop import replays

    golden = read(path)
    replay = replays().get(golden.method)
    if replay is None:
        return "waiting", float("nan"), golden.method
    share, where = compare(golden, replay(golden))
    return "ok" if share <= 1 else "FAILED", share, where


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Check every golden file of a folder, a line each.

    Raises:
        UserError: no such folder, or no golden file in it.
        SystemExit: status 1 where a file fails.
    """
    folder = Path(cfg.path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder] if folder.is_file() else []
    if not files:
        raise UserError(f"path={cfg.path}: no .safetensors file there; give a golden file or a folder of them")
    result: dict[str, Any] = {"ok": [], "failed": [], "waiting": []}
    for file in files:
        verdict, share, where = check(file)
        detail = f"no replay of {where!r}" if verdict == "waiting" else f"{share:.3f} of the tolerance, at {where}"
        log.info("%-8s%-40s%s", verdict, file.name, detail)
        result[verdict.lower()].append(file.name)
    log.info("%d ok, %d failed, %d waiting", *(len(result[k]) for k in ("ok", "failed", "waiting")))
    if result["failed"]:
        raise SystemExit(1)
    return result
