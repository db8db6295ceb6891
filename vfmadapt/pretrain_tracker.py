"""The tool `pretrain_tracker`: SAM2's video model trained whole, from random weights, in stages; plain weights out."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt.build import compose
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

KEYS = {
    "size": "backbone.size",
    "focus": "augment.focus",
    "gap": "augment.gap",
    "leave": "augment.leave",
    "clip": "loader.clip",
    "batch_size": "loader.batch_size",
    "objects": "task.objects",
    "prompts": "task.prompts",
    "score_weight": "task.score_weight",
    "absent_weight": "task.absent_weight",
    "steps": "trainer.max_steps",
    "lr": "task.lr",
    "seed": "seed",
}
"""Settings of a stage, and what `tools/train.py` calls them."""


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Train the stages of `cfg.stages` that are not done yet; keys: conf/pretrain_tracker.yaml.

    Each stage is a run of `tools/train.py task=tracking adapter=full` that starts from the weights of the one before,
    and goes on from its last whole epoch where it was stopped.

    Returns:
        "weights": the file of the last stage, fp16, for `backbone.weights`; "stages": by name "steps" and "dice" (test
        split) of those that were trained now; "seconds".

    Raises:
        UserError: no stage, a setting that a stage does not have or that training refuses.
    """
    _check(cfg.stages)
    began = time.perf_counter()
    weights: Path | None = None
    trained = {}
    for name, settings in cfg.stages.items():
        run = Path(cfg.output) / name
        before, weights = weights, run / "weights.safetensors"
        if weights.is_file():
            log.info("%s: done, %s", name, weights)
        else:
            trained[name] = _train(cfg, settings, run, before)
            write_weights(trained[name].pop("adapter_file"), weights)
    return {"weights": str(weights), "stages": trained, "seconds": round(time.perf_counter() - began, 1)}


def _check(stages: Mapping[str, Mapping[str, Any]]) -> None:
    if not stages:
        raise UserError(f"stages is empty; give one or more, each with {', '.join(KEYS)}")
    for name, settings in stages.items():
        if wrong := settings.keys() ^ KEYS.keys():
            raise UserError(f"stages.{name}: {sorted(wrong)[0]} is missing or unknown; give {', '.join(KEYS)}")


def _train(cfg: "DictConfig", settings: Mapping[str, Any], run: Path, weights: Path | None) -> dict[str, Any]:
    """One stage, in the folder `run`; from random weights where there are none yet."""
    from vfmadapt import train

    start = "backbone.pretrained=false" if weights is None else f"backbone.weights={weights}"
    overrides = ["task=tracking", "adapter=full", "backbone.train_decoder=false", start, f"output={run}"]
    overrides += [f"data_root={cfg.data_root}", *cfg.train]
    overrides += [f"{KEYS[key]}={value}" for key, value in settings.items()]
    if (run / "checkpoints" / "last.ckpt").is_file():
        overrides.append("resume=true")
    log.info("\n$ python tools/train.py %s", " ".join(overrides))
    result = train.main(compose("train", overrides))
    return {key: result[key] for key in ("steps", "dice", "adapter_file")}


def write_weights(adapter_file: str, path: Path) -> None:
    """Write the model of an adapter file as plain fp16 weights, half the size on disk."""
    from safetensors.torch import save_file

    from vfmadapt.checkpoint import load
    from vfmadapt.files import atomic_path

    state = load(adapter_file).backbone.merge().state_dict()
    with atomic_path(path) as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, temporary)
    log.info("weights: %s (%.1f MB)", path, path.stat().st_size / 1e6)
