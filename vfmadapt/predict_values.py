"""Values of images, videos and rasters beside the GeoTIFF: other formats, and the frames of a video."""

import logging
import math
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.build import plain
from vfmadapt.errors import UserError
from vfmadapt.files import atomic_path
from vfmadapt.value_files import FORMATS, write_npy, write_ply, write_png16

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from PIL.Image import Image

    from vfmadapt.contracts import DataSpec
    from vfmadapt.frames import Clip
    from vfmadapt.frames.frame_file import FrameFile
    from vfmadapt.model import AdaptedModel
    from vfmadapt.raster.colours import Span

log = logging.getLogger(__name__)

_RASTER_KEYS = ("window", "polygons", "tta", "bands", "index", "of")  # of conf/predict.yaml; null by default
_MEASURED = 8  # frames from which the span of the colours is taken


def check_formats(cfg: "DictConfig", spec: "DataSpec | None") -> list[str]:
    """`cfg.formats`; raises UserError where one is unknown, or the model or another key does not go with it."""
    wanted = list(plain(cfg)["formats"])
    if unknown := [name for name in wanted if name not in FORMATS]:
        raise UserError(f"formats={wanted}: no format {unknown[0]!r}; there are {', '.join(FORMATS)}, and the GeoTIFF")
    if wanted and (spec is None or not spec.values):
        raise UserError(f"formats={wanted} are for one model that gives depth or other values; leave it out")
    if "ply" in wanted and cfg.focal is None:
        raise UserError("formats=[ply] needs focal=, the camera's focal length in pixels of this image")
    if "ply" in wanted and spec is not None and spec.relative:
        raise UserError("formats=[ply] needs depth in units; the model gives relative inverse depth")
    return wanted


def write_formats(cfg: "DictConfig", source: str, map_path: Path, spec: "DataSpec") -> dict[str, str]:
    """Write the first value of a map as the files that `cfg.formats` asks for, beside it; gives their paths."""
    wanted = check_formats(cfg, spec)
    if not wanted:
        return {}
    from vfmadapt.raster.io import open_raster

    with open_raster(map_path) as raster:
        values, valid = raster.read([1])
    found = np.where(valid, values[0], np.float32(np.nan))
    made = {}
    for name in wanted:
        path = map_path.with_suffix(f".{name}")
        if name == "npy":
            write_npy(path, found)
        elif name == "png":
            write_png16(path, found, scale=cfg.png_scale)
        else:
            write_ply(path, found, _colours(cfg, source, spec), focal=cfg.focal)
        made[name] = str(path)
        log.info("%s: %s", name, path)
    return made


def _colours(cfg: "DictConfig", source: str, spec: "DataSpec") -> NDArray[np.uint8]:
    from vfmadapt.raster.io import open_raster, raster_info
    from vfmadapt.raster.predict import shown_bands
    from vfmadapt.raster.preview import quicklook

    bands, window = shown_bands(raster_info(source), spec.bands, plain(cfg)["bands"]), plain(cfg)["window"]
    place = {} if window is None else dict(zip(("row", "column", "height", "width"), window, strict=True))
    with open_raster(source) as raster:
        image, valid = raster.read(bands, **place)
    return quicklook(image, valid, spec.bands)


def predict_value_clip(cfg: "DictConfig", spec: "DataSpec") -> dict[str, Any]:
    """Values of the frames of `cfg.input`, a video, with the model in `cfg.adapter_file`; keys: conf/predict.yaml.

    Writes float32 (T, H, W) of the first value as NPY, frame by frame, and as preview an MP4 of the frames beside their
    values in colours with a scale bar.

    Returns:
        "map" and "preview" (paths; None if not asked for), "frames", "size" [height, width] and "seconds".

    Raises:
        UserError: a key that is for rasters, a model of other bands than a video has, a clip that cannot be read.
    """
    from vfmadapt.checkpoint import load
    from vfmadapt.device import choose_device
    from vfmadapt.frames.frame_file import FrameFile
    from vfmadapt.predict_clip import open_input

    if given := [key for key in _RASTER_KEYS if cfg[key] is not None]:
        raise UserError(f"{given[0]}= is for rasters; leave it out for a video such as {cfg.input}")
    if set(check_formats(cfg, spec)) - {"npy"}:
        raise UserError(f"formats={list(cfg.formats)}: the values of a video are written as one NPY; leave it out")
    if len(spec.bands) not in (1, 3):
        raise UserError(f"{cfg.adapter_file} wants {', '.join(spec.bands)}; videos hold red, green and blue, or grey")
    source = Path(cfg.input).expanduser()
    output = Path(cfg.output or Path("runs") / "predict" / f"{source.stem}_{spec.values[0].name.replace(' ', '_')}.npy")
    if output.suffix != ".npy":
        raise UserError(f"output={output}: the values of a video are written as .npy")
    start = time.perf_counter()
    with open_input(cfg) as clip:
        model = load(cfg.adapter_file).to(choose_device(cfg.device)).eval()
        shape = (len(clip), *clip.info.size)
        with atomic_path(output) as temporary, temporary.open("wb+") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + 4 * math.prod(shape))
            values = FrameFile(file, shape, "<f4", file.tell())
            side = cfg.tile if spec.relative else max(cfg.tile, *clip.info.size)
            for index, found in _frames(model, clip, side=side):
                values[index] = found
            preview = _video(clip, values, spec, output) if cfg.preview else None
        info = clip.info
    log.info("values: %s", output)
    return {
        "map": str(output),
        "preview": None if preview is None else str(preview),
        "frames": info.frames,
        "size": list(info.size),
        "seconds": time.perf_counter() - start,
    }


def _frames(model: "AdaptedModel", clip: "Clip", *, side: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    import torch
    from tqdm import tqdm

    from vfmadapt.tasks.windows import whole_image

    device, (black, white) = next(model.parameters()).device, clip.window()
    for index, frame in tqdm(clip.iterate(), total=len(clip), unit="frame", desc="predict", leave=False):
        image = torch.from_numpy(_banded(frame, black, white, len(model.spec.bands)))[None].to(device)
        valid = torch.ones(1, *image.shape[2:], dtype=torch.bool, device=device)
        with torch.inference_mode():
            yield index, whole_image(model, image, valid, side=side)[0, 0].float().cpu().numpy()


def _banded(frame: NDArray[np.float32], black: float, white: float, bands: int) -> NDArray[np.float32]:
    """Frame (C, H, W) -> (bands, H, W), 0 black to 1 white."""
    shown = np.clip((frame - black) / (white - black), 0, 1)
    shown = shown.mean(0, keepdims=True) if bands == 1 else np.repeat(shown, 3 // len(shown), 0)
    return np.ascontiguousarray(shown, dtype=np.float32)


def _video(clip: "Clip", values: "FrameFile", spec: "DataSpec", output: Path) -> Path:
    """An H.264 video of the frames beside their values, in one scale of colours."""
    import av

    from vfmadapt.raster.colours import span_of

    path = output.with_name(f"{output.stem}_preview.mp4")
    span = span_of(np.stack([values[i] for i in range(0, len(values), max(1, len(values) // _MEASURED))]))
    rate = Fraction(1 / (clip.info.seconds_per_frame or 0.1)).limit_denominator(1000)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream: Any = None
        for index, frame in clip.iterate():
            picture = np.asarray(_sheet(clip, frame, values[index], spec, span))
            picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]  # as 4:2:0 needs
            if stream is None:
                stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _sheet(
    clip: "Clip", frame: NDArray[np.float32], values: NDArray[np.float32], spec: "DataSpec", span: "Span"
) -> "Image":
    from vfmadapt.raster.colours import coloured, with_bar
    from vfmadapt.raster.preview import VOID_COLOUR, panel

    shown = np.rint(_banded(frame, *clip.window(), 3) * 255).astype(np.uint8).transpose(1, 2, 0)
    drawn = coloured(values, np.isfinite(values), span, void=VOID_COLOUR)
    return with_bar(panel([("frame", shown), (spec.values[0].name, drawn)], []), span, spec.values[0])
