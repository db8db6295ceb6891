"""The tool `pretrain`: a backbone goes on learning from unlabelled images; a plain timm checkpoint out."""

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt._settings import check_arguments
from vfmadapt.build import TRAINED_COPIES, adapter, data_source, instantiate, plain
from vfmadapt.errors import UserError
from vfmadapt.train import checkpoint_to_resume, fit, make_trainer

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

    from vfmadapt.contracts import UnlabelledSource
    from vfmadapt.host import AdaptedBackbone
    from vfmadapt.tasks.pretraining import PretrainingTask
    from vfmadapt.tasks.unlabelled import UnlabelledData

log = logging.getLogger(__name__)

_RGB = ("red", "green", "blue")


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Train the adapter of `cfg.adapter` by `cfg.objective` on images without labels, merge it, write the weights.

    The keys are those of conf/pretrain.yaml.

    Returns:
        "weights" (path, for `backbone.weights=`), "trainable" (parameters of the backbone that were trained), "steps",
        "seconds", "first_loss" and "loss" (means of the first and the last 50 steps), "first_rank" and "rank" (of the
        features), "skipped" (files left out) and "run". Of several processes only the first writes.

    Raises:
        UserError: an impossible setting, no usable image, nothing to resume from, a loss that is not finite.
        KeyboardInterrupt: Ctrl-C; the checkpoint of the last whole epoch is kept.
    """
    run = Path(cfg.output)
    resumed = checkpoint_to_resume(cfg.resume, run)
    source = unlabelled(cfg)
    task, data = _task(cfg, source)
    from vfmadapt.tasks.watch import callbacks

    watching, watch = callbacks(run, side=task.model.objective.smallest)
    trainer = make_trainer(cfg, run, watching)
    backbone = task.model.backbone
    trainable = sum(p.numel() for p in backbone.trainable_parameters())
    log.info("%d of the backbone's parameters are trained on %d images; run folder %s", trainable, len(source), run)
    start = time.perf_counter()
    fit(trainer, task, data, resumed)
    result = {
        "weights": str(run / "weights.safetensors"),
        "trainable": trainable,
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "skipped": len(getattr(source, "skipped", ())),
        "run": str(run),
    }
    if trainer.is_global_zero:
        result |= watch.summary()
        write_weights(exported(backbone, source.spec.bands), run / "weights.safetensors", cfg.dtype)
        (run / "pretrain.json").write_text(json.dumps({**result, "config": plain(cfg)}, indent=2) + "\n")
    return result


def _task(cfg: "DictConfig", source: "UnlabelledSource") -> "tuple[PretrainingTask, UnlabelledData]":
    """What is trained, and the loader of its samples."""
    import torch

    from vfmadapt.tasks.pretraining import PretrainingModel
    from vfmadapt.tasks.unlabelled import UnlabelledData

    if cfg.trainer.max_steps != -1:
        raise UserError(
            f"trainer.max_steps={cfg.trainer.max_steps}: set epochs= and loader.steps_per_epoch= instead; a run by "
            "steps does not resume where an epoch ended"
        )
    for part in ("pytorch", "fabric"):  # devices and tips: our own lines say what matters
        logging.getLogger(f"lightning.{part}").setLevel(logging.WARNING)
    torch.manual_seed(cfg.seed)
    backbone = backbone_of(cfg, source.spec.bands)
    objective = instantiate(cfg.objective, backbone, packages=("vfmadapt.objectives.",))
    source.require(objective.smallest)
    check_arguments(UnlabelledData, "loader", plain(cfg.loader))
    data = UnlabelledData(source, objective, seed=cfg.seed, **cfg.loader)
    task: PretrainingTask = instantiate(cfg.task, PretrainingModel(backbone, objective), packages=("vfmadapt.tasks.",))
    return task, data


def unlabelled(cfg: "DictConfig") -> "UnlabelledSource":
    """The images that `cfg.data` describes, prepared; of a labelled data set those that train."""
    from omegaconf import OmegaConf

    if missing := [key for key in OmegaConf.missing_keys(cfg) if key.startswith("data.")]:
        raise UserError(f"{missing[0]} is missing; write {missing[0]}=FOLDER, or choose generated images with data=")
    from vfmadapt.contracts import UnlabelledSource
    from vfmadapt.tasks.unlabelled import WithoutLabels

    source: Any = data_source(cfg)
    source.prepare()
    if isinstance(source, UnlabelledSource):
        return source

    return WithoutLabels(source, cache_mb=cfg.cache_mb)


def backbone_of(cfg: "DictConfig", bands: tuple[str, ...]) -> "AdaptedBackbone":
    """The backbone with what is trained in it.

    Raises:
        UserError: the first layer would be trained for bands other than red, green and blue, so that no plain
            checkpoint could hold it; a trained first layer beside the method.
    """
    from vfmadapt.backbones.scratch import start_from_scratch
    from vfmadapt.host import AdaptedBackbone

    config = {"backbone": plain(cfg.backbone), "adapter": plain(cfg.adapter)}
    if wrong := [key for key in TRAINED_COPIES if config["backbone"].pop(key, None)]:
        raise UserError(f"backbone.{wrong[0]}=true is for tools/train.py; here method= says what is trained")
    frozen = instantiate(config["backbone"], bands=bands)
    if cfg.scratch:
        start_from_scratch(frozen.exported(), seed=cfg.seed)
    made = adapter(config["adapter"], frozen)
    everything = getattr(made, "role", None) == "all"
    if cfg.scratch and not everything:
        raise UserError("scratch=true starts from random weights, all of which must be trained; add method=full")
    if everything and bands != _RGB:
        raise UserError(
            f"method=full trains the first layer for the bands {', '.join(bands)}, which no plain checkpoint holds; "
            "use method=explora or method=lora, which leave that layer, or give data.bands=[red,green,blue]"
        )
    return AdaptedBackbone(frozen, {"main": made}, config=config)


def exported(backbone: "AdaptedBackbone", bands: tuple[str, ...]) -> "nn.Module":
    """The merged network; for `bands` other than red, green and blue with the first layer that was widened for them.

    Such a layer was not trained, and widening it again gives what training had.
    """
    merged: Any = backbone.merge()
    if bands != _RGB:
        merged.patch_embed = instantiate(backbone.config["backbone"], bands=_RGB).exported().patch_embed
    network: nn.Module = merged
    return network


def write_weights(net: "nn.Module", path: Path, dtype: str) -> None:
    """Write a network's weights under its own names; `dtype`: float32 or float16."""
    import torch
    from safetensors.torch import save_file

    from vfmadapt.files import atomic_path

    kind = {"float32": torch.float32, "float16": torch.float16}[dtype]
    tensors = {name: value.detach().cpu().to(kind).contiguous() for name, value in net.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    log.info("weights: %s (%.1f MB), for backbone.weights=", path, path.stat().st_size / 1e6)
