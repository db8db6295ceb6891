"""Tracking in one command: adapt the small model to a domain that it never saw, compare with it frozen, draw a clip."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt.build import compose, data_source

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

SCORES = ("dice3d", "dice", "jf", "hd95", "false_positive_frames")
ROWS = {
    "frozen": ("frozen", ""),
    "adapted": ("adapted", ""),
    "copy": ("adapted", "_copy"),
    "flow": ("adapted", "_flow"),
}
"""Lines of the table: whose evaluation, and what the names of its scores end in."""


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Adapt `sam2_mini` with DD-Adapter, measure it beside the frozen model on unseen clips, and draw one of them.

    Without weights in the package the model is trained first, only as far as the time allows.

    Returns:
        "frozen", "adapted", "copy" and "flow": the scores of `SCORES`, means over clips; "shipped": whether the weights
        came with the package; "gif", "mp4", "pictures" and "adapter_file": paths; "seconds".
    """
    from vfmadapt import track, train

    began, output = time.perf_counter(), Path(cfg.output)
    start, shipped = _start(cfg)
    overrides = ["task=tracking", "adapter=dd", *start, f"data_root={cfg.data_root}", f"seed={cfg.seed}", *cfg.train]
    overrides.append(f"output={output / 'adapted'}")
    log.info("\n$ python tools/train.py %s", " ".join(overrides))
    settings = compose("train", overrides)
    trained = train.main(settings)
    clips = data_source(settings).folder / "test"  # type: ignore[attr-defined]  # generated clips are files
    models = {
        "frozen": [*start, *(override for override in cfg.train if override.startswith("backbone."))],
        "adapted": [f"adapter_file={trained['adapter_file']}"],
    }
    scores = {}
    for name, model in models.items():
        asked = [f"evaluate={clips}", "prompt=first", *model]
        log.info("\n$ python tools/track.py %s", " ".join(asked))
        scores[name] = track.main(compose("track", asked))
    table = {row: {score: scores[run][score + end] for score in SCORES} for row, (run, end) in ROWS.items()}
    result = {
        **table,
        "shipped": shipped,
        **_draw(clips, models["adapted"], output),
        "pictures": trained["previews"],
        "adapter_file": trained["adapter_file"],
        "seconds": round(time.perf_counter() - began, 1),
    }
    _tell(result)
    return result


def _start(cfg: "DictConfig") -> tuple[list[str], bool]:
    """Overrides that choose the weights to adapt, and whether they lie in the package."""
    from vfmadapt.backbones.sam2_video import shipped

    if shipped(compose("track").backbone.name):
        return [], True
    from vfmadapt import pretrain_tracker

    log.info("the package holds no weights of sam2_mini: training some, far shorter than the recipe does")
    overrides = [f"output={Path(cfg.output) / 'pretrain'}", f"data_root={cfg.data_root}"]
    trained = pretrain_tracker.main(compose("pretrain_tracker", [*overrides, *cfg.pretrain]))
    return [f"backbone.weights={trained['weights']}"], False


def _draw(clips: Path, model: list[str], output: Path) -> dict[str, str]:
    """Follow the first of the clips, and lay what was found over it: GIF and MP4."""
    from vfmadapt.frames.labelled import label_map, labelled_clips
    from vfmadapt.track import show, tracking_model, windows
    from vfmadapt.track_evaluation import truth_prompts
    from vfmadapt.tracking.overlay import write_gif, write_mp4
    from vfmadapt.tracking.tracked import collect
    from vfmadapt.tracking.tracker import track

    clip, masks = labelled_clips(clips)[0].open()
    settings = compose("track", model)
    with clip, masks:
        show(clip, *windows(settings))
        prompts = truth_prompts(partial(label_map, masks), range(len(masks)), "first")
        steps = track(tracking_model(settings), clip, prompts, focus=settings.focus)
        tracked = collect(clip.info, prompts, steps)
        written = {"gif": write_gif(output / "overlay.gif", clip, tracked)}
        written["mp4"] = write_mp4(output / "overlay.mp4", clip, tracked)
    return {kind: str(path) for kind, path in written.items()}


def _tell(result: dict[str, Any]) -> None:
    """Log the table and the paths."""
    lines = [f"{'':<10}" + "".join(f"{score:>24}" for score in SCORES)]
    for row in ROWS:
        values = ["-" if (value := result[row][score]) is None else f"{value:.3f}" for score in SCORES]
        lines.append(f"{row:<10}" + "".join(f"{value:>24}" for value in values))
    log.info("\na domain that the frozen model never saw, from masks of the first frame:\n%s", "\n".join(lines))
    for key, what in (("gif", "overlay (GIF)"), ("mp4", "overlay (MP4)"), ("adapter_file", "adapter file")):
        log.info("%-16s%s", what, result[key])
    for path in result["pictures"]:
        log.info("%-16s%s", "picture (PNG)", path)
    log.info("%-16s%.0f s", "in all", result["seconds"])
