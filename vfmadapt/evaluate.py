"""The tool `evaluate`: an adapter file and labelled data in, metrics out."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt.build import data_source
from vfmadapt.device import choose_device
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vfmadapt.contracts import DataSpec, Samples
    from vfmadapt.model import AdaptedModel

log = logging.getLogger(__name__)

_MEDSEG = "vfmadapt.tasks.medseg.MedsegTask"  # as adapter files have it


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Measure the model in `cfg.adapter_file` on a split of `cfg.data`; keys: conf/evaluate.yaml.

    Returns:
        What `SegmentationMetrics.compute` gives, for models of task=medseg what `VolumeMetrics` does, with its details,
        for values what `vfmadapt.evaluate_values.measure_values` does; "images", and "previews" (paths; with
        `cfg.output` only).

    Raises:
        UserError: no adapter file, data whose bands or classes are not the model's, an unknown `tta`.
    """
    if not cfg.adapter_file:
        raise UserError(
            "adapter_file= is missing; write evaluate adapter_file=FILE.safetensors data=geotiff_folder data.root=DIR"
        )
    from vfmadapt.checkpoint import load, read_header

    header = read_header(cfg.adapter_file)  # a wrong path fails before the data are prepared
    source = data_source(as_trained(cfg, header["data"]))
    source.prepare()
    model = load(cfg.adapter_file).to(choose_device(cfg.device))
    check_fit(model.spec, source.spec)
    if cfg.tta is not None:
        model = _averaged(model, cfg.tta)
    samples = source.split(cfg.split)
    if len(samples) == 0:
        raise UserError(f"{source.spec.name}: the {cfg.split} split holds no sample; choose another with split=")
    task = ((header["training"] or {}).get("task") or {}).get("_target_")
    result, table = _measured(cfg, model, samples, source.spec, volumes=task == _MEDSEG)
    log.info("%s, %s split, %d images:\n%s", source.spec.name, cfg.split, len(samples), table)
    result["images"] = len(samples)
    result["previews"] = []
    if cfg.output:
        from vfmadapt.tasks.previews import evenly

        folder = Path(cfg.output)
        pictures = _draw(model, source.spec, samples, folder / "previews", evenly(samples, cfg.previews), cfg.window)
        result["previews"] = [str(p) for p in pictures]
        (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        log.info("metrics and previews: %s", folder)
    return result


def _averaged(model: "AdaptedModel", tta: str) -> Any:
    """The model that `tta` asks for."""
    from vfmadapt.raster.scoring import D4Mean

    if tta != "d4" or model.spec.values:
        raise UserError(f"tta={tta}: allowed are d4, for models of classes, and null")
    return D4Mean(model)


def _measured(
    cfg: "DictConfig", model: "AdaptedModel", samples: Any, data: "DataSpec", *, volumes: bool
) -> tuple[dict[str, Any], str]:
    """The metrics, and the same as text."""
    from vfmadapt.depth_metrics import as_table as values_table
    from vfmadapt.evaluate_values import measure_values
    from vfmadapt.metrics import as_table
    from vfmadapt.volume_metrics import volume_table

    if model.spec.values:
        result = measure_values(model, samples, data.values, align=cfg.align, side=cfg.window)
        return result, values_table(result)
    result = measure(model, samples, side=cfg.window, tolerance=cfg.boundary_tolerance, volumes=volumes)
    return result, f"{as_table(result)}\n{volume_table(result)}" if volumes else as_table(result)


def _draw(
    model: "AdaptedModel", data: "DataSpec", samples: Any, folder: Path, indices: list[int], side: int
) -> list[Path]:
    from vfmadapt.tasks.previews import write_previews
    from vfmadapt.tasks.value_previews import write_value_previews

    if not model.spec.values:
        return write_previews(model, samples, folder, indices=indices, side=side)
    inverse = data.values[0].inverse
    return write_value_previews(model, samples, folder, indices=indices, side=side, truth_inverse=inverse)


def as_trained(cfg: "DictConfig", data: Mapping[str, Any] | None) -> "DictConfig":
    """The config with the model's bands and classes where `data.bands` and `data.classes` are null."""
    cfg = cfg.copy()
    for key in ("bands", "classes"):
        if data is not None and key in cfg.data and cfg.data[key] is None:
            cfg.data[key] = data[key]
    return cfg


def measure(
    model: "AdaptedModel", samples: "Samples", *, side: int = 512, tolerance: float = 2.0, volumes: bool = False
) -> dict[str, Any]:
    """Metrics of a model over samples of any sizes; larger images go by windows of `side` pixels.

    `volumes`: measure also the volumes that the samples make up, which are then frames in order, see `VolumeMetrics`.
    """
    import torch

    from vfmadapt.metrics import SegmentationMetrics
    from vfmadapt.tasks.windows import whole_image
    from vfmadapt.volume_metrics import VolumeMetrics

    names, ignored = [c.name for c in model.spec.classes], model.spec.ignore_index
    lines = [c.name for c in model.spec.classes if c.line]
    kind = VolumeMetrics if volumes else SegmentationMetrics
    metrics = kind(names, ignore_index=ignored, tolerance=tolerance, lines=lines)
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for index in range(len(samples)):
            sample = samples[index]
            logits = whole_image(model, sample["image"][None].to(device), sample["valid"][None].to(device), side=side)
            mask = sample["mask"][None].to(device)
            if isinstance(metrics, VolumeMetrics):
                metrics.count(logits, {"mask": mask, "id": [sample["id"]], "spacing": [sample.get("spacing")]})
            else:
                metrics.update(logits, mask)
    return metrics.compute() | (metrics.details() if isinstance(metrics, VolumeMetrics) else {})


def check_fit(model: "DataSpec", data: "DataSpec") -> None:
    """Raise UserError unless the data have the model's bands and classes, or as many values, in its order."""
    if data.bands != model.bands:
        raise UserError(
            f"{data.name} has the bands {', '.join(data.bands)}; the model wants {', '.join(model.bands)}, "
            "in that order; set data.bands"
        )
    ours, theirs = ([c.name for c in s.classes] for s in (model, data))
    if ours != theirs:
        raise UserError(
            f"{data.name} has the classes {', '.join(theirs)}; the model knows {', '.join(ours)}; set data.classes"
        )
    if len(model.values) != len(data.values):
        what, found = (", ".join(v.name for v in spec.values) or "classes" for spec in (model, data))
        raise UserError(f"{data.name} has {found}, the model gives {what}; take data with the same")
