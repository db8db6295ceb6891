"""Tracking measured on clips with masks, beside copying the prompt's mask and carrying it along by optical flow."""

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from vfmadapt.build import plain
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vfmadapt.frames import Clip
    from vfmadapt.frames.labelled import LabelledClip
    from vfmadapt.tracking.model import TrackingModel
    from vfmadapt.tracking.prompts import Prompt
    from vfmadapt.tracking.tracked import Tracked

log = logging.getLogger(__name__)

PLACES = ("middle", "first")
METHODS = ("", "_copy", "_flow")
"""What is added to the names of scores: nothing to the tracker's own, else which baseline's they are."""

_DISTANCES = ("hd95", "asd", "centre_distance")
_COLUMNS = ("dice3d", "dice", "jf", "hd95", "asd", "false_positive_frames", "seconds_per_frame")


def evaluate(cfg: "DictConfig") -> dict[str, Any]:
    """Track every clip with masks in `cfg.evaluate` from the mask of one frame of each structure.

    `cfg.prompt`: "middle" gives the mask of the middle frame, or of the frame nearest to it where the structure exists;
    "first" that of the first frame where it exists.

    Returns:
        Means over clips of `tracking_metrics.MEANS` and of "seconds_per_frame", each also with "_copy" and "_flow" for
        the baselines; "confidence": their 95 % intervals; "unit" of distances: "mm", or "px" where the spacing is
        unknown (None, and no mean of distances, where that differs); "structures": means and intervals per label;
        "volumes": of each clip "id", "unit", "frames", its scores (means over its structures), and "structures": those
        of each label, with its "prompt_frame", "frames" and "frames_present" counted.

    Raises:
        UserError: a prompt that is neither, no such folder, no clip with masks in it, or none where there is
            something to follow.
    """
    place = cfg.prompt or PLACES[0]
    if place not in PLACES:
        raise UserError(f"prompt={place}: with evaluate=, allowed are {' and '.join(PLACES)}")
    from vfmadapt.frames.labelled import labelled_clips
    from vfmadapt.track import tracking_model
    from vfmadapt.tracking.regions import check_focus

    check_focus(cfg.focus)
    clips, reader = labelled_clips(cfg.evaluate), plain(cfg)["reader"] or {}
    model = tracking_model(cfg)
    volumes = [scored for clip in clips if (scored := _measured(model, clip, reader, place, cfg.focus)) is not None]
    if not volumes:
        raise UserError(f"evaluate={cfg.evaluate}: nothing can be followed; give clips of two frames or more and masks")
    result = {**_summary(volumes), "structures": _by_structure(volumes), "volumes": volumes}
    log.info("%d clips, means:\n%s", len(volumes), _as_table(result))
    return result


def truth_prompts(masks: "Clip", place: str) -> "list[Prompt]":
    """The true mask of each label in the frame that `place` means, see `evaluate`; empty where all masks are."""
    import numpy as np

    from vfmadapt.frames.labelled import label_map
    from vfmadapt.tracking.prompts import Prompt

    wanted = len(masks) // 2 if place == "middle" else 0
    found: dict[int, Prompt] = {}
    for index in sorted(range(len(masks)), key=lambda i: abs(i - wanted)):
        labels = label_map(masks, index)
        for label in {*np.unique(labels).tolist()} - {0, *found}:
            found[label] = Prompt(frame=index, object=label, mask=labels == label)
    return [found[label] for label in sorted(found)]


def _measured(
    model: "TrackingModel", labelled: "LabelledClip", reader: Mapping[str, Any], place: str, focus: float | None
) -> dict[str, Any] | None:
    """The scores of one clip, None where there is nothing to follow."""
    from vfmadapt.tracking_metrics import MEANS, average

    clip, masks = labelled.open(**reader)
    with clip, masks:
        prompts = truth_prompts(masks, place)
        if not prompts or len(clip) == 1:
            log.warning("%s: left out, %s", labelled.id, "it has one frame" if prompts else "its masks are empty")
            return None
        facts: dict[str, Any] = {"id": labelled.id, "unit": _spacing(clip)[1], "frames": len(clip)}
        structures: dict[str, dict[str, Any]] = {str(p.object): {"prompt_frame": p.frame} for p in prompts}
        for method in METHODS:
            began = time.perf_counter()
            found = _followed(model, clip, prompts, method, focus)
            facts[f"seconds_per_frame{method}"] = (time.perf_counter() - began) / len(clip)
            for label, scores in _scores(clip, masks, found).items():
                structures[label] |= {name + (method if name in MEANS else ""): v for name, v in scores.items()}
    names = [name for name in _names() if not name.startswith("seconds")]
    return {**facts, **average(list(structures.values()), names), "structures": structures}


def _followed(
    model: "TrackingModel", clip: "Clip", prompts: "list[Prompt]", method: str, focus: float | None
) -> "list[Tracked]":
    """What a method finds; a baseline by itself for each frame with prompts."""
    from vfmadapt.track import progress
    from vfmadapt.tracking.baselines import copy_masks, flow_masks
    from vfmadapt.tracking.tracked import collect
    from vfmadapt.tracking.tracker import track

    if not method:
        return [collect(clip.info, prompts, progress(track(model, clip, prompts, focus=focus), clip))]
    follow, frame = {"_copy": copy_masks, "_flow": flow_masks}[method], attrgetter("frame")
    groups = [list(group) for _, group in groupby(sorted(prompts, key=frame), key=frame)]
    return [collect(clip.info, group, follow(clip, group)) for group in groups]


def _scores(clip: "Clip", masks: "Clip", found: "Sequence[Tracked]") -> dict[str, dict[str, Any]]:
    """The scores of each label."""
    from vfmadapt.frames.labelled import label_map
    from vfmadapt.tracking_metrics import StructureMetrics

    spacing, unit = _spacing(clip)
    depth = clip.info.spacing[0] if clip.info.kind == "volume" and unit == "mm" else None
    metrics = [[StructureMetrics(spacing, prompt=prompt, depth=depth) for prompt in t.prompts] for t in found]
    for index in range(len(clip)):
        labels = label_map(masks, index)
        for tracked, structures in zip(found, metrics, strict=True):
            for k, structure in enumerate(structures):
                structure.update(index, tracked.mask(index, k), labels == tracked.objects[k])
    return {
        str(label): structure.compute()
        for tracked, structures in zip(found, metrics, strict=True)
        for label, structure in zip(tracked.objects, structures, strict=True)
    }


def _spacing(clip: "Clip") -> tuple[tuple[float, float], str]:
    """Spacing of rows and columns, and the unit of distances."""
    _, row, column = clip.info.spacing
    return ((1.0, 1.0), "px") if row is None or column is None else ((row, column), "mm")


def _names() -> list[str]:
    from vfmadapt.tracking_metrics import MEANS

    return [name + method for method in METHODS for name in (*MEANS, "seconds_per_frame")]


def _summary(volumes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and intervals over clips; of distances only where all have one unit."""
    from vfmadapt.tracking_metrics import average, confidence_intervals

    units = {volume["unit"] for volume in volumes}
    names = [name for name in _names() if len(units) == 1 or not name.startswith(_DISTANCES)]
    undefined = dict.fromkeys(_names())
    return {
        **undefined,
        **average(volumes, names),
        "unit": units.pop() if len(units) == 1 else None,
        "confidence": {**undefined, **confidence_intervals(volumes, names)},
    }


def _by_structure(volumes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same for each label, over the clips that have it."""
    labels = sorted({label for volume in volumes for label in volume["structures"]}, key=int)
    return {
        label: _summary([{**v, **v["structures"][label]} for v in volumes if label in v["structures"]])
        for label in labels
    }


def _as_table(result: Mapping[str, Any]) -> str:
    """Aligned text: a line for each method."""
    lines = [f"{'':<8}" + "".join(f"{name.replace('_frames', ''):>18}" for name in _COLUMNS)]
    for method in METHODS:
        values = [result[name + method] for name in _COLUMNS]
        cells = "".join(f"{'-':>18}" if value is None else f"{value:>18.3f}" for value in values)
        lines.append(f"{method[1:] or 'tracker':<8}{cells}")
    return "\n".join(lines)
