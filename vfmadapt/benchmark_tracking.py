"""How long does a tracked frame take, with one object and with many, beside the sam2 package? Does memory stay flat?"""

import json
import logging
import multiprocessing
import resource
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from vfmadapt.build import build_tracker, entry
from vfmadapt.device import choose_device
from vfmadapt.testing_tracking import SPEC, fill_by_rule, moving_frames
from vfmadapt.tracking.model import TrackingModel
from vfmadapt.tracking.prompts import Prompt
from vfmadapt.tracking.tracker import Tracker

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

_FULL = 17  # frames after which the memory has all that it will ever have
_WARM = 50  # frames, of the memory's measurement


def tracking(cfg: "DictConfig") -> dict[str, Any]:
    """Time frames of `cfg.video` at `cfg.video_size` pixels once the memory is full, with 1 and with 16 objects.

    Weights are random and the same for both. Where sam2 is installed its predictor takes every frame in turn with ours,
    so that whatever else the machine does meets both alike; see vfmadapt/interop/sam2.py.

    Returns:
        "objects": per number of objects "ms" (median of a frame, encoder included), "encoder_ms" (alone), "sam2_ms",
        "ratio" (theirs over ours), "max_difference" of the logits (the last three null without sam2); "encoder_ms" and
        "object_ms": the encoder's and one object's share of a frame, both of the run with one object; "linear_ratio":
        16 objects over encoder + 16 x object; "memory": peak in GB after 50
        and after `cfg.memory_frames` frames of sam2_mini, and their ratio.
    """
    torch.set_num_threads(int(cfg.threads))
    memory = _apart(int(cfg.memory_frames), int(cfg.threads))  # first, in a process that has nothing else yet
    model = _model(str(cfg.video), int(cfg.video_size)).to(choose_device(cfg.device))
    frames = moving_frames(_FULL + int(cfg.frames), (model.size, model.size))
    objects = {count: _timed(model, frames, count) for count in (1, 16)}
    encoder = objects[1]["encoder_ms"]
    share = objects[1]["ms"] - encoder
    result = {
        "video": str(cfg.video),
        "size": model.size,
        "device": str(model.mean.device),
        "threads": int(cfg.threads),
        "objects": {str(count): figures for count, figures in objects.items()},
        "encoder_ms": encoder,
        "object_ms": round(share, 2),
        "linear_ratio": round(objects[16]["ms"] / (encoder + 16 * share), 3),
        "memory": memory,
    }
    _report(result)
    if cfg.output:
        Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _model(name: str, size: int) -> TrackingModel:
    backbone = entry("backbone", name) | {"size": size, "pretrained": False}
    model = build_tracker({"backbone": backbone, "adapter": entry("adapter", "frozen")}, SPEC)
    fill_by_rule(model.net)  # objects are present, or their memories would be trivial
    return TrackingModel(model.backbone, spec=model.spec).eval()


def _timed(model: TrackingModel, frames: Tensor, count: int) -> dict[str, Any]:
    """Median milliseconds of a frame with `count` objects, ours, sam2's and our encoder alone in turn."""
    side = model.size
    prompts = [
        Prompt(0, i + 1, box=(side * (0.1 + 0.02 * i), side * 0.2, side * 0.6, side * 0.7)) for i in range(count)
    ]
    runs = [_ours(model, frames, prompts)]
    if find_spec("sam2"):
        runs.append(_theirs(model, frames, prompts))
    taken: list[list[float]] = [[] for _ in runs]
    encoding: list[float] = []
    largest = 0.0
    for index in range(len(frames)):
        found: list[Tensor] = []
        for turn in range(len(runs)) if index % 2 else reversed(range(len(runs))):
            start = _now()
            found.append(next(runs[turn]))
            if index >= _FULL:
                taken[turn].append(_now() - start)
        encoding.append(_encoding(model, frames[index : index + 1].to(model.mean.device)))
        if len(found) > 1:
            largest = max(largest, float((found[0] - found[1]).abs().max()))
    ours = median(taken[0])
    theirs = median(taken[1]) if len(taken) > 1 else None
    return {
        "ms": round(ours, 2),
        "encoder_ms": round(median(encoding[_FULL:]), 2),
        "sam2_ms": None if theirs is None else round(theirs, 2),
        "ratio": None if theirs is None else round(theirs / ours, 3),
        "max_difference": None if theirs is None else largest,
    }


@torch.no_grad()
def _encoding(model: TrackingModel, frame: Tensor) -> float:
    start = _now()
    model.encode(frame)
    return _now() - start


def _ours(model: TrackingModel, frames: Tensor, prompts: list[Prompt]) -> Iterator[Tensor]:
    objects = [prompt.object for prompt in prompts]
    tracker = Tracker(model, (model.size, model.size), objects, window=(0, 1), frames=len(frames))
    for prompt in prompts:
        tracker.add(prompt)
    for frame in frames:
        yield tracker.step(frame).logits


def _theirs(model: TrackingModel, frames: Tensor, prompts: list[Prompt]) -> Iterator[Tensor]:
    from vfmadapt.interop.sam2 import predictor, start

    made = predictor(model)
    normalised = (frames - model.mean.cpu()) / model.std.cpu()
    state = start(made, normalised.to(model.mean.device), (model.size, model.size))
    for prompt in prompts:
        made.add_new_points_or_box(state, prompt.frame, prompt.object, box=prompt.box)
    with patch("sam2.sam2_video_predictor.tqdm", lambda order, **_: order):  # its bar is not ours to draw
        for _, _, logits in made.propagate_in_video(state):
            yield logits[:, 0].cpu()


def _now() -> float:
    """Milliseconds, once what was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def _apart(frames: int, threads: int) -> dict[str, float]:
    """Measure memory in a new process, whose peak is its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:  # a new interpreter would run the tool's script again
        return pool.apply(_memory, (frames, threads))


def _memory(frames: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    model = _model("sam2_mini", 256)
    tracker, shown = Tracker(model, (256, 256), window=(0, 1)), moving_frames(8, (256, 256))
    tracker.add(Prompt(0, 1, box=(40, 40, 160, 170)))
    peaks = []
    for index in range(frames):
        tracker.step(shown[index % len(shown)])
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20))  # Linux gives KiB
    early, late = peaks[min(_WARM, frames) - 1], peaks[-1]
    return {"frames": frames, "early_gb": round(early, 3), "late_gb": round(late, 3), "ratio": round(late / early, 3)}


def _report(result: dict[str, Any]) -> None:
    log.info("%s at %d px on %s, %d threads", *(result[key] for key in ("video", "size", "device", "threads")))
    for count, figures in result["objects"].items():
        beside = "no sam2 in this Python" if figures["ratio"] is None else f"sam2 {figures['sam2_ms']} ms, "
        beside += "" if figures["ratio"] is None else f"{figures['ratio']} times as fast"
        log.info("%2s objects: %.1f ms a frame; %s", count, figures["ms"], beside)
    log.info(
        "encoder %.1f ms, object %.1f ms; 16 objects over encoder + 16 x object: %.2f",
        *(result[key] for key in ("encoder_ms", "object_ms", "linear_ratio")),
    )
    log.info("memory of sam2_mini: %(early_gb).2f GB early, %(late_gb).2f GB after %(frames)d frames", result["memory"])
