"""The tool `track`: a video or volume and a prompt in, the masks of all frames out; or a folder of them, measured."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt.build import build_tracker, entry, plain
from vfmadapt.device import choose_device
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vfmadapt.frames import Clip
    from vfmadapt.frames.clip import Window
    from vfmadapt.tracking.asking import Asked
    from vfmadapt.tracking.model import TrackingModel
    from vfmadapt.tracking.tracked import Tracked
    from vfmadapt.tracking.tracker import StepResult

log = logging.getLogger(__name__)

_BYTE = (0.0, 255.0)  # the window of files of 8 bits


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Follow what `cfg.prompt` says through `cfg.input`, or measure that in `cfg.evaluate`; keys: conf/track.yaml.

    Returns:
        "frames", "structures" (a dict each: "name", "label", "prompt_frame", "frames_present"), "outputs" (paths),
        "seconds", "frames_per_second" and "ejection_fraction" (None if not asked for); with `cfg.evaluate` what
        `vfmadapt.track_evaluation.evaluate` gives.

    Raises:
        UserError: no model, input or prompt, or one that does not fit; an output that the clip cannot have.
    """
    if cfg.evaluate:
        from vfmadapt.track_evaluation import evaluate

        return evaluate(cfg)
    if cfg.data is not None:
        raise UserError("data= says what is measured: write evaluate=test beside it, or input=FILE in its place")
    for key, example in (("input", "scan.nii.gz"), ("prompt", "'[{frame: 4, box: [10,20,60,80]}]'")):
        if not cfg[key]:
            raise UserError(f"{key}= is missing; write for instance {key}={example}, or evaluate=FOLDER")
    from vfmadapt.frames import open_clip

    with open_clip(cfg.input, **(plain(cfg)["reader"] or {})) as clip:
        outputs = _outputs(cfg, clip)
        from vfmadapt.tracking.asking import read_prompts  # seconds; what is wrong with the input is told before
        from vfmadapt.tracking.tracked import collect
        from vfmadapt.tracking.tracker import track

        show(clip, *windows(cfg))
        asked = read_prompts(plain(cfg)["prompt"], clip.info, plain(cfg)["reader"])
        _check(cfg, clip, asked, outputs)
        model = tracking_model(cfg)
        began = time.perf_counter()
        steps = progress(track(model, clip, asked.prompts, focus=cfg.focus), clip)
        tracked = collect(clip.info, asked.prompts, steps, asked.names)
        seconds = time.perf_counter() - began
        for path, write in outputs.items():
            write(path, clip, tracked)
    return {**_told(tracked, list(outputs), seconds), "ejection_fraction": _ejection_fraction(cfg, tracked)}


def _check(cfg: "DictConfig", clip: "Clip", asked: "Asked", outputs: Iterable[Path]) -> None:
    """Raise UserError for what could never be done, before the time that it takes to find out."""
    from vfmadapt.frames.write_dicom_seg import check_sources
    from vfmadapt.tracking.measures import check_ventricle
    from vfmadapt.tracking.regions import check_focus

    check_focus(cfg.focus)
    for prompt in asked.prompts:
        prompt.check(clip.info.size, clip.info.frames)
    for path in outputs:
        if path.suffix == ".dcm":
            check_sources(path, clip.info)
    if cfg.ejection_fraction is not None:
        check_ventricle(str(cfg.ejection_fraction), list(asked.names.values()), clip.info)


def tracking_model(cfg: "DictConfig") -> "TrackingModel":
    """The model of `cfg.adapter_file`, or the frozen one of `cfg.backbone`, on `cfg.device` and in evaluation mode."""
    from vfmadapt.checkpoint import load
    from vfmadapt.contracts import DataSpec
    from vfmadapt.tracking.model import TrackingModel

    if cfg.adapter_file:
        model = load(cfg.adapter_file)
        if not isinstance(model, TrackingModel):
            raise UserError(f"{cfg.adapter_file} follows no objects; give a file that task=tracking trained")
    else:
        spec = DataSpec(name="frozen", bands=(), classes=(), mean=(), std=())
        model = build_tracker({"backbone": cfg.backbone, "adapter": entry("adapter", "frozen")}, spec)
    return model.to(choose_device(cfg.device)).eval()


def windows(cfg: "DictConfig") -> "tuple[Window | None, Window | None]":
    """The values that `cfg.window` shows black and white, and those of the data that `cfg.adapter_file` learnt from.

    Raises:
        UserError: not two numbers that differ.
    """
    from vfmadapt.checkpoint import read_header

    given, header = plain(cfg)["window"], read_header(cfg.adapter_file) if cfg.adapter_file else {}
    if given is not None and (len(given) != 2 or given[0] == given[1]):
        raise UserError(f"window={given}: give the values that are black and white, for instance [-160,240]")
    trained = ((header.get("training") or {}).get("data") or {}).get("window")
    return given and (float(given[0]), float(given[1])), trained and (float(trained[0]), float(trained[1]))


def show(clip: "Clip", given: "Window | None", trained: "Window | None") -> None:
    """Show a clip by the window given, else by that of the training data, else by its own.

    That of the training data does not count for 8 bits which cannot hold it: there the values are of another unit.
    """
    if given is None and trained is not None and clip.info.window == _BYTE and not _within(trained, _BYTE):
        log.info("%s: 0 black and 255 white; it has no values from %g to %g", clip.info.path, *trained)
    elif window := given or trained:
        clip.show(window)


def _within(inner: "Window", outer: "Window") -> bool:
    return min(outer) <= min(inner) and max(inner) <= max(outer)


def progress(steps: "Iterable[tuple[int, StepResult]]", clip: "Clip") -> "Iterable[tuple[int, StepResult]]":
    """The steps, with a bar of frames and frames per second on standard error where that is a terminal."""
    from tqdm import tqdm

    return tqdm(steps, desc=Path(clip.info.path).name, total=len(clip), unit=" frames", disable=None)


def _outputs(cfg: "DictConfig", clip: "Clip") -> "dict[Path, Callable[[Path, Clip, Tracked], object]]":
    """The files to write and what writes them."""
    from vfmadapt.frames.reading import ending

    path = Path(cfg.output or Path("runs") / "track" / Path(cfg.input).name.split(".")[0])
    if path.suffix and not path.is_dir():
        write = _WRITERS.get(ending(path))
        if write is None:
            raise UserError(f"output={path}: allowed are a folder and files that end in {', '.join(_WRITERS)}")
        return {path: write}
    names = ["masks.nii.gz", "overlay.mp4", "frames.csv"]
    if clip.info.sources and clip.info.kind == "volume":
        names.append("masks.dcm")
    return {path / name: _WRITERS[ending(Path(name))] for name in names}


def _nifti(path: Path, clip: "Clip", tracked: "Tracked") -> None:
    from vfmadapt.frames.write_nifti import write_nifti

    write_nifti(path, tracked.labels, clip.info)


def _dicom_seg(path: Path, clip: "Clip", tracked: "Tracked") -> None:
    from vfmadapt.frames.write_dicom_seg import write_dicom_seg

    write_dicom_seg(path, tracked.labels, dict(zip(tracked.objects, tracked.names, strict=True)), clip.info)


def _mp4(path: Path, clip: "Clip", tracked: "Tracked") -> None:
    from vfmadapt.tracking.overlay import write_mp4

    write_mp4(path, clip, tracked)


def _gif(path: Path, clip: "Clip", tracked: "Tracked") -> None:
    from vfmadapt.tracking.overlay import write_gif

    write_gif(path, clip, tracked)


def _table(path: Path, clip: "Clip", tracked: "Tracked") -> None:
    from vfmadapt.tracking.measures import write_table

    write_table(path, tracked)


_WRITERS = {".nii.gz": _nifti, ".nii": _nifti, ".dcm": _dicom_seg, ".mp4": _mp4, ".gif": _gif, ".csv": _table}


def _ejection_fraction(cfg: "DictConfig", tracked: "Tracked") -> dict[str, Any] | None:
    if cfg.ejection_fraction is None:
        return None
    from vfmadapt.tracking.measures import ejection_fraction

    found = ejection_fraction(tracked, str(cfg.ejection_fraction))
    log.info(
        "ejection fraction: %.1f %% (largest in frame %d, smallest in %d)",
        100 * found.fraction,
        found.end_diastole,
        found.end_systole,
    )
    return asdict(found)


def _told(tracked: "Tracked", outputs: list[Path], seconds: float) -> dict[str, Any]:
    """Log what was found; the same for scripts."""
    frames = tracked.info.frames
    structures = [
        {"name": name, "label": label, "prompt_frame": prompt, "frames_present": int(tracked.present[:, k].sum())}
        for k, (name, label, prompt) in enumerate(zip(tracked.names, tracked.objects, tracked.prompts, strict=True))
    ]
    for structure in structures:
        log.info("  %-16s in %d of %d frames", structure["name"], structure["frames_present"], frames)
    log.info("%d frames in %.1f s, %.2f frames per second", frames, seconds, frames / seconds)
    for path in outputs:
        log.info("wrote: %s", path)
    return {
        "frames": frames,
        "structures": structures,
        "outputs": [str(path) for path in outputs],
        "seconds": seconds,
        "frames_per_second": frames / seconds,
    }
