"""The tool `predict`: an adapter file and a raster in, a georeferenced map and a preview picture out."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt.device import choose_device
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Map `cfg.input` with the model in `cfg.adapter_file`; see conf/predict.yaml for the keys.

    Returns:
        "map", "scores" and "preview" (paths, None if not asked for), "pixels_per_class", "shares" (of the pixels with
        data), "area_km2" (None without a projected CRS), "void" (pixels without data), "size" [height, width] and
        "seconds".

    Raises:
        UserError: as `predict_raster` and `vfmadapt.checkpoint.load` do.
    """
    from vfmadapt.raster.io import raster_info

    if not cfg.input or not cfg.adapter_file:
        missing = "input" if not cfg.input else "adapter_file"
        raise UserError(f"{missing}= is missing; write predict input=scene.tif adapter_file=adapter.safetensors")
    info = raster_info(cfg.input)  # before the seconds that a model takes to load

    from vfmadapt.checkpoint import load
    from vfmadapt.raster.bands import select_bands
    from vfmadapt.raster.predict import predict_raster
    from vfmadapt.raster.preview import write_preview

    model = load(cfg.adapter_file)
    output = Path(cfg.output or Path("runs") / "predict" / f"{Path(cfg.input).stem}_mask.tif")
    bands = None if cfg.bands is None else [int(b) for b in cfg.bands]
    result = predict_raster(
        model.to(choose_device(cfg.device)),
        cfg.input,
        output,
        tile=cfg.tile,
        overlap=cfg.overlap,
        batch=cfg.batch,
        block=cfg.block,
        window=cfg.window,
        layers=list(cfg.layers),
        tta=cfg.tta,
        dtype=cfg.dtype,
        restart=cfg.restart,
        bands=bands,
        scale=cfg.scale,
        offset=cfg.offset,
        progress=True,
    )
    preview = None
    if cfg.preview:
        preview = write_preview(
            cfg.input,
            output,
            output.with_name(f"{output.stem}_preview.png"),
            bands=select_bands(info, model.spec.bands, bands),
            names=model.spec.bands,
            classes=model.spec.classes,
            shares=result.shares,
        )
    for name, share in result.shares.items():
        log.info("  %-16s %6.2f %%", name, 100 * share)
    log.info("map: %s", output)
    if preview is not None:
        log.info("preview: %s", preview)
    return {
        "map": str(output),
        "scores": None if result.scores is None else str(result.scores),
        "preview": None if preview is None else str(preview),
        "pixels_per_class": result.pixels,
        "shares": result.shares,
        "area_km2": result.area_km2,
        "void": result.void,
        "size": list(result.size),
        "seconds": result.seconds,
    }
