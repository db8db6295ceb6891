"""Label maps of volumes and videos: frame by frame in, NIfTI with the source's spacing and orientation out."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.build import plain
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vfmadapt.frames import Clip, ClipInfo
    from vfmadapt.frames.frame_file import FrameFile, LabelFrames
    from vfmadapt.model import AdaptedModel

log = logging.getLogger(__name__)

Scale = tuple[float, float]

_RASTER_KEYS = ("window", "polygons", "tta", "bands", "index", "of")  # of conf/predict.yaml; null by default


def open_input(cfg: "DictConfig") -> "Clip":
    """`cfg.input`, a volume or video, read with `cfg.reader`; UserError where it cannot be."""
    from vfmadapt.frames import open_clip

    return open_clip(cfg.input, **(plain(cfg)["reader"] or {}))


def predict_clip(cfg: "DictConfig") -> dict[str, Any]:
    """Label `cfg.input`, a volume or video, with the model in `cfg.adapter_file`; see conf/predict.yaml for the keys.

    Frames are grey, or red, green, blue where the model was trained with `data.bands=rgb`. Values become what it was
    trained on, 0 black to 1 white, by `scale` and `offset` where given, else by the window of the training data, else
    by the clip's own. Only labels are kept of all frames, on disk.

    Returns:
        "map" and "preview" (paths; None if not asked for), "millilitres" by class (None in time, or without spacing),
        "shares" of the voxels, "frames", "size" [height, width] and "seconds".

    Raises:
        UserError: a key that is for rasters, a model of other bands, a clip that cannot be read.
    """
    from vfmadapt.checkpoint import load
    from vfmadapt.datasets._clips import RGB
    from vfmadapt.device import choose_device
    from vfmadapt.frames.frame_file import FrameFile
    from vfmadapt.frames.reading import ending
    from vfmadapt.frames.write_nifti import write_nifti

    if given := [key for key in _RASTER_KEYS if cfg[key] is not None]:
        raise UserError(f"{given[0]}= is for rasters; leave it out for a volume or video such as {cfg.input}")
    source = Path(cfg.input).expanduser()
    stem = source.name.removesuffix(ending(source)) if source.is_file() else source.name
    output = Path(cfg.output or Path("runs") / "predict" / f"{stem}_mask.nii.gz")
    if ending(output) not in (".nii", ".nii.gz"):
        raise UserError(f"output={output}: the labels of a volume or video are written as .nii or .nii.gz")
    start = time.perf_counter()
    with open_input(cfg) as clip:
        model = load(cfg.adapter_file).to(choose_device(cfg.device)).eval()
        if (len(model.spec.bands) != 1 and model.spec.bands != RGB) or not model.spec.classes:
            raise UserError(
                f"{cfg.adapter_file} wants {', '.join(model.spec.bands)}; volumes need a model of task=medseg"
            )
        if model.spec.bands == RGB and clip.info.channels not in (1, 3):
            raise UserError(f"{cfg.input} has {clip.info.channels} channels; {cfg.adapter_file} wants three, or grey")
        labels = FrameFile.zeros((len(clip), *clip.info.size), np.uint8)
        _label(model, clip, labels, scale=_scale(cfg, clip), side=cfg.tile)
        write_nifti(output, labels, clip.info)
        preview = _preview(model, clip, labels, output, _scale(cfg, clip)) if cfg.preview else None
        counts = _counts(labels, len(model.spec.classes))
        info = clip.info
    names = [c.name for c in model.spec.classes]
    return _told(
        {
            "map": str(output),
            "preview": None if preview is None else str(preview),
            "millilitres": _millilitres(names, counts, info),
            "shares": {name: float(n / counts.sum()) for name, n in zip(names, counts, strict=True)},
            "frames": info.frames,
            "size": list(info.size),
            "seconds": time.perf_counter() - start,
        }
    )


def _label(model: "AdaptedModel", clip: "Clip", labels: "FrameFile", *, scale: Scale, side: int) -> None:
    """Fill labels (T, H, W); of the scores only those of one frame are there at a time."""
    import torch
    from tqdm import tqdm

    from vfmadapt.tasks.windows import whole_image

    device = next(model.parameters()).device
    for index, frame in tqdm(clip.iterate(), total=len(clip), unit="frame", desc="predict", leave=False):
        image = torch.from_numpy(_shown(frame, scale, len(model.spec.bands)))[None].to(device)
        valid = torch.ones(image.shape[0], *image.shape[2:], dtype=torch.bool, device=device)
        with torch.inference_mode():
            labels[index] = whole_image(model, image, valid, side=side)[0].argmax(0).to(torch.uint8).cpu().numpy()


def _scale(cfg: "DictConfig", clip: "Clip") -> Scale:
    """Factor and summand that make grey values those of the training data."""
    from vfmadapt.checkpoint import read_header

    if cfg.scale is not None or cfg.offset is not None:
        return (1.0 if cfg.scale is None else cfg.scale), (cfg.offset or 0.0)
    trained = ((read_header(cfg.adapter_file)["training"] or {}).get("data") or {}).get("window")
    black, white = trained or clip.window()
    return 1 / (white - black), -black / (white - black)


def _shown(frame: NDArray[np.float32], scale: Scale, bands: int) -> NDArray[np.float32]:
    """Frame (1 or 3, H, W) -> one grey band or three colours (bands, H, W), 0 black to 1 white."""
    wanted = frame.mean(0, keepdims=True) if bands == 1 else np.broadcast_to(frame, (bands, *frame.shape[1:]))
    return np.asarray(np.clip(wanted * np.float32(scale[0]) + np.float32(scale[1]), 0, 1), dtype=np.float32)


def _preview(model: "AdaptedModel", clip: "Clip", labels: "LabelFrames", output: Path, scale: Scale) -> Path:
    """The frame that holds most of the structures, as radiologists look at it, with and without them."""
    from vfmadapt.files import atomic_path
    from vfmadapt.raster.preview import overlay, panel, quicklook

    index = int(np.argmax([np.count_nonzero(frame) for frame in labels]))
    turned = tuple(slice(None, None, -1 if flip else 1) for flip in clip.info.upright)
    image = _shown(clip.frame(index), scale, len(model.spec.bands))[(slice(None), *turned)].copy()
    classes = model.spec.classes
    picture = quicklook(image, np.ones(image.shape[1:], dtype=bool), model.spec.bands)
    sheet = panel(
        [(f"frame {index}", picture), ("structures", overlay(picture, labels[index][turned], classes))], classes
    )
    path = output.with_name(f"{output.name.split('.')[0]}_preview.png")
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="png")
    return path


def _counts(labels: "LabelFrames", classes: int) -> NDArray[np.int64]:
    """Voxels of each class, frame by frame."""
    return np.sum([np.bincount(frame.ravel(), minlength=classes) for frame in labels], axis=0)


def _millilitres(names: list[str], counts: NDArray[np.int64], info: "ClipInfo") -> dict[str, float] | None:
    if info.kind != "volume" or info.spacing[0] is None or info.pixel_area is None:
        return None
    voxel = info.spacing[0] * info.pixel_area / 1000
    return {name: float(n * voxel) for name, n in zip(names[1:], counts[1:], strict=True)}


def _told(result: dict[str, Any]) -> dict[str, Any]:
    """Log what was made."""
    volumes = result["millilitres"] or {}
    for name, share in result["shares"].items():
        log.info("  %-16s %6.2f %%%s", name, 100 * share, f"  {volumes[name]:8.1f} ml" if name in volumes else "")
    log.info("map: %s", result["map"])
    if result["preview"] is not None:
        log.info("preview: %s", result["preview"])
    return result
