"""Tracking measured on clips with masks, beside copying the prompt's mask and carrying it along by optical flow."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from vfmadapt.build import plain
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from omegaconf import DictConfig

    from vfmadapt.datasets._clips import ClipItem
    from vfmadapt.frames import Clip
    from vfmadapt.frames.clip import Window
    from vfmadapt.frames.labelled import LabelledClip
    from vfmadapt.tracking.model import TrackingModel
    from vfmadapt.tracking.prompts import Prompt
    from vfmadapt.tracking.tracked import Tracked

    Labels = Callable[[int], NDArray[np.integer]]

log = logging.getLogger(__name__)

PLACES = ("middle", "first")
METHODS = ("", "_copy", "_flow")
"""What is added to the names of scores: nothing to the tracker's own, else which baseline's they are."""

_DISTANCES = ("hd95", "asd", "centre_distance")
_COLUMNS = ("dice3d", "dice", "jf", "hd95", "asd", "false_positive_frames", "seconds_per_frame")


@dataclass(frozen=True)
class Case:
    """A clip with masks: `open` gives it, and its labels (H, W) by frame.

    `labelled`: the frames that have labels, None for all; `ignored`: the label of pixels that do not count.
    """

    id: str
    open: "Callable[[], AbstractContextManager[tuple[Clip, Labels]]]"
    labelled: tuple[int, ...] | None = None
    ignored: int | None = None

    def frames(self, clip: "Clip") -> Sequence[int]:
        """The frames of the clip that have labels."""
        return range(len(clip)) if self.labelled is None else [i for i in self.labelled if i < len(clip)]


def evaluate(cfg: "DictConfig") -> dict[str, Any]:
    """Track every clip with masks in `cfg.evaluate` from the mask of one frame of each structure.

    `cfg.evaluate` is a folder, or where `cfg.data` is a source of clips the split that is taken; of its clips those
    frames count that have labels. `cfg.prompt`: "middle" gives the mask of the middle one of these frames, or of the
    frame nearest to it where the structure exists; "first" that of the first frame where it exists.

    Returns:
        Means over clips of `tracking_metrics.MEANS` and of "seconds_per_frame", each also with "_copy" and "_flow" for
        the baselines; "confidence": their 95 % intervals; "unit" of distances: "mm", or "px" where the spacing is
        unknown (None, and no mean of distances, where that differs); "structures": means and intervals per label;
        "volumes": of each clip "id", "unit", "frames", its scores (means over its structures), and "structures": those
        of each label, with its "prompt_frame", "frames" and "frames_present" counted.

    Raises:
        UserError: a prompt that is neither, no such folder, no clip with masks in it, or none where there is
            something to follow; a source without clips.
    """
    place = cfg.prompt or PLACES[0]
    if place not in PLACES:
        raise UserError(f"prompt={place}: with evaluate=, allowed are {' and '.join(PLACES)}")
    from vfmadapt.track import tracking_model
    from vfmadapt.tracking.regions import check_focus

    check_focus(cfg.focus)
    listed = cases(cfg)
    model = tracking_model(cfg)
    volumes = [scored for case in listed if (scored := _measured(model, case, place, cfg.focus)) is not None]
    if not volumes:
        raise UserError(f"evaluate={cfg.evaluate}: nothing can be followed; give clips of two frames or more and masks")
    result = {**_summary(volumes), "structures": _by_structure(volumes), "volumes": volumes}
    log.info("%d clips, means:\n%s", len(volumes), _as_table(result))
    return result


def cases(cfg: "DictConfig") -> list[Case]:
    """The clips with masks that `cfg.evaluate` and `cfg.data` mean; raises UserError as `evaluate` does."""
    return _of_folder(cfg) if cfg.data is None else _of_source(cfg)


def _of_folder(cfg: "DictConfig") -> list[Case]:
    """The clips of a folder, shown by the window given or trained on."""
    from vfmadapt.frames.labelled import labelled_clips
    from vfmadapt.track import windows

    shown, reader = windows(cfg), plain(cfg)["reader"] or {}
    return [Case(clip.id, partial(_opened_pair, clip, reader, *shown)) for clip in labelled_clips(cfg.evaluate)]


def _of_source(cfg: "DictConfig") -> list[Case]:
    """The clips of a split of a data source, shown by the window given, the source's or that trained on."""
    from vfmadapt.build import data_source
    from vfmadapt.contracts import IGNORE_INDEX
    from vfmadapt.datasets._cine_clips import GeneratedClips
    from vfmadapt.datasets._clips import ClipData
    from vfmadapt.track import windows

    if cfg.reader:
        raise UserError("reader= is for files and folders; leave it out with data=, which knows how its files lie")
    given, trained = windows(cfg)
    source = data_source(cfg)
    if not isinstance(source, ClipData):
        raise UserError(
            f"{source.spec.name} has images, evaluate= follows clips; take data=trackrad, echonet, camus or clip_folder"
        )
    if isinstance(source, GeneratedClips):  # the files of others are there
        source.prepare()
    clips = source.clips(cfg.evaluate)
    opened = partial(_opened_item, given=given or clips.window, trained=trained)
    return [Case(item.id, partial(opened, item), item.labelled, IGNORE_INDEX) for item in clips.items]


@contextmanager
def _opened_pair(
    pair: "LabelledClip", reader: Mapping[str, Any], given: "Window | None", trained: "Window | None"
) -> "Iterator[tuple[Clip, Labels]]":
    from vfmadapt.frames.labelled import label_map
    from vfmadapt.track import show

    clip, masks = pair.open(**reader)
    with clip, masks:
        show(clip, given, trained)
        yield clip, partial(label_map, masks)


@contextmanager
def _opened_item(
    item: "ClipItem", *, given: "Window | None", trained: "Window | None"
) -> "Iterator[tuple[Clip, Labels]]":
    from vfmadapt.track import show

    clip, labels = item.open()
    with clip:
        show(clip, given, trained)
        yield clip, labels


def truth_prompts(labels: "Labels", frames: Sequence[int], place: str, ignored: int | None = None) -> "list[Prompt]":
    """The true mask of each label but 0 and `ignored` in the frame that `place` means, see `evaluate`.

    Args:
        labels: those of a frame, (H, W).
        frames: those that have labels.
        place: one of `PLACES`.
        ignored: label of pixels that do not count.
    """
    import numpy as np

    from vfmadapt.tracking.prompts import Prompt

    wanted = frames[len(frames) // 2] if place == "middle" and frames else 0
    found: dict[int, Prompt] = {}
    for index in sorted(frames, key=lambda i: abs(i - wanted)):
        shown = labels(index)
        for label in {*np.unique(shown).tolist()} - {0, ignored, *found}:
            found[label] = Prompt(frame=index, object=label, mask=shown == label)
    return [found[label] for label in sorted(found)]


def _measured(model: "TrackingModel", case: Case, place: str, focus: float | None) -> dict[str, Any] | None:
    """The scores of one clip, None where there is nothing to follow."""
    from vfmadapt.tracking_metrics import MEANS, average

    with case.open() as (clip, labels):
        frames = case.frames(clip)
        prompts = truth_prompts(labels, frames, place, case.ignored)
        if not prompts or len(frames) == 1:
            reason = "its masks are empty" if not prompts else f"it has one frame{' with masks' * (len(clip) > 1)}"
            log.warning("%s: left out, %s", case.id, reason)
            return None
        facts: dict[str, Any] = {"id": case.id, "unit": _spacing(clip)[1], "frames": len(clip)}
        structures: dict[str, dict[str, Any]] = {str(p.object): {"prompt_frame": p.frame} for p in prompts}
        for method in METHODS:
            began = time.perf_counter()
            found = _followed(model, clip, prompts, method, focus)
            facts[f"seconds_per_frame{method}"] = (time.perf_counter() - began) / len(clip)
            for label, scores in _scores(clip, labels, frames, found, case.ignored).items():
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


def _scores(
    clip: "Clip", labels: "Labels", frames: Sequence[int], found: "Sequence[Tracked]", ignored: int | None
) -> dict[str, dict[str, Any]]:
    """The scores of each label over frames."""
    from vfmadapt.tracking_metrics import StructureMetrics

    spacing, unit = _spacing(clip)
    depth = clip.info.spacing[0] if clip.info.kind == "volume" and unit == "mm" else None
    metrics = [[StructureMetrics(spacing, prompt=prompt, depth=depth) for prompt in t.prompts] for t in found]
    for index in frames:
        truth = labels(index)
        counted = True if ignored is None else truth != ignored
        for tracked, structures in zip(found, metrics, strict=True):
            for k, structure in enumerate(structures):
                structure.update(index, tracked.mask(index, k) & counted, truth == tracked.objects[k])
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
