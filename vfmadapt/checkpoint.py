"""The adapter file: what was trained, and a JSON header that says how to build the rest.

Only safetensors: nothing from a user's file is ever unpickled, and a `_target_` in the header may only name this
package's adapters, heads and backbones.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from vfmadapt import __version__
from vfmadapt.contracts import BackboneSpec, ClassSpec, DataSpec, ValueSpec
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.model import AdaptedModel

KEY = "vfmadapt"
FORMAT = 1


def save(
    path: str | Path, adapted: AdaptedModel | AdaptedBackbone, *, training: Mapping[str, Any] | None = None
) -> Path:
    """Write an adapter file: trained tensors and buffers, and a header with all that is needed to use them.

    Args:
        path: ends in .safetensors; appears complete or not at all.
        adapted: a whole model, or a backbone that `vfmadapt.adapt` made.
        training: the resolved configuration that it was trained with, kept for the record.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: an adapter file ends in .safetensors")
    model = adapted if isinstance(adapted, AdaptedModel) else None
    backbone = adapted.backbone if isinstance(adapted, AdaptedModel) else adapted
    if not backbone.config:
        raise UserError(
            "this object was put together by hand, so no file could rebuild it; use vfmadapt.adapt or a config"
        )
    header = {
        "format": FORMAT,
        "config": backbone.config,
        "backbone": {"name": backbone.spec.name, "weights_hash": backbone.spec.weights_hash},
        "data": asdict(model.spec) if model else None,
        "training": training,
        "versions": _versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapted.adapter_state().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata={KEY: json.dumps(header)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _versions() -> dict[str, str]:
    return {"vfmadapt": __version__, "torch": version("torch"), "timm": version("timm")}


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of an adapter file.

    Raises:
        UserError: no such file, not safetensors, not written by this project, or a later format.
    """
    return read_file(path)[0]


def read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and all tensors of an adapter file; raises as `read_header` does."""
    from safetensors import SafetensorError, safe_open

    if not isinstance(path, str | Path):
        raise UserError(f"adapter_file={path}: wanted here is one file; only predict takes several")
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such adapter file; train one with tools/train.py")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        header = json.loads(metadata[KEY])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not an adapter file of vfmadapt ({type(error).__name__}); train one with tools/train.py"
        ) from error
    if header["format"] > FORMAT:
        raise UserError(
            f"{path} was written by vfmadapt {header['versions']['vfmadapt']}; this is {__version__}, upgrade it"
        )
    return header, state


def check_hash(path: str | Path, header: Mapping[str, Any], spec: BackboneSpec) -> None:
    """Refuse a file that was trained on other frozen weights than `spec`'s."""
    trained = header["backbone"]
    if trained["weights_hash"] != spec.weights_hash:
        raise UserError(
            f"{path} was trained on {trained['name']} with weights {trained['weights_hash'][:12]}, "
            f"this backbone is {spec.name} with {spec.weights_hash[:12]}; load the weights that it was trained on"
        )


def read_adapter(path: str | Path, spec: BackboneSpec) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file for a backbone at hand; raises UserError where the frozen weights are others."""
    header, state = read_file(path)
    check_hash(path, header, spec)
    return header, {k: v for k, v in state.items() if k.startswith("adapters.")}


def load(path: str | Path, *, weights: str | None = None) -> AdaptedModel:
    """Load an adapter file as a model in evaluation mode: image (B, C, H, W) in sensor units -> logits (B, K, H, W).

    Args:
        path: written by `tools/train.py` or `vfmadapt.save`.
        weights: where the backbone's weights are now, if not where they were in training.

    Raises:
        UserError: not an adapter file, other backbone weights, or tensors that do not fit.
    """
    from vfmadapt.build import build_model

    header, state = read_file(path)
    if header["data"] is None:
        raise UserError(f"{path} holds an adapter without a head; attach it with vfmadapt.adapt(model, {str(path)!r})")
    config = header["config"]
    if weights is not None:
        config["backbone"]["weights"] = weights
    model = build_model(config, data_spec(header["data"]))
    check_hash(path, header, model.backbone.spec)
    model.load_adapter_state(state)
    return model.eval()


def data_spec(data: Mapping[str, Any]) -> DataSpec:
    """The data's spec from a header's `data`."""
    classes = tuple(ClassSpec(c["name"], tuple(c["colour"]), c.get("line", False)) for c in data["classes"])
    return DataSpec(
        name=data["name"],
        bands=tuple(data["bands"]),
        classes=classes,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        ignore_index=data["ignore_index"],
        values=tuple(ValueSpec(**v) for v in data.get("values", ())),  # a file from before there were any has none
    )
