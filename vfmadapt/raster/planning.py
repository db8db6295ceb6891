"""From what the user asks for to a plan that can be carried out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from vfmadapt.contracts import DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.bands import select_bands
from vfmadapt.raster.fingerprint import model_fingerprint, source_fingerprint
from vfmadapt.raster.io import Raster, RasterInfo, open_raster
from vfmadapt.raster.plan import Area, Plan
from vfmadapt.raster.reduction import Mix, reduce_bands
from vfmadapt.raster.write import NODATA

_ROW_BYTES = 256 << 20  # of one row of tiles of a block, as floats; the default block is made small enough for that


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a raster is mapped; the fields are explained at `vfmadapt.predict_raster`."""

    tile: int = 256
    overlap: int = 64
    batch: int | str = 4
    block: int | None = None
    window: Sequence[int] | None = None
    bands: Sequence[int] | str | None = None
    scale: float | None = None
    offset: float | None = None
    layers: Sequence[str] = ()
    tta: str | None = None
    dtype: str = "float32"
    compile: bool = False
    channels_last: bool = False
    polygons: str | None = None


def make_plan(model: Any, source: str, device: torch.device, settings: Settings) -> tuple[Plan, RasterInfo]:
    """The plan of a map, and what the raster says about itself; batch="auto" is 1 until `BlockFolder.open` settles it.

    Raises:
        UserError: unreadable raster, bands that do not fit, bad sizes, a window outside the raster.
    """
    spec: DataSpec = model.spec
    if len(spec.classes) > NODATA:
        raise UserError(f"the model has {len(spec.classes)} classes; a map holds at most {NODATA}")
    with open_raster(source) as raster:
        info, files = raster.info, raster.files
        bands, mix = _bands(raster, spec, settings)
    window, block, batch = settings.window, settings.block, settings.batch
    if isinstance(batch, str) and batch != "auto":
        raise UserError(f"batch={batch}: wanted is a whole number, or auto")
    if window is not None and (len(window) != 4 or not all(isinstance(number, int) for number in window)):
        raise UserError(f"window={list(window)}: wanted are four whole numbers, [row,column,height,width]")
    compute = {"device": device.type, "dtype": settings.dtype, "tta": settings.tta or "none"}
    compute |= {"kernels": os.environ.get("VFMADAPT_KERNELS", "auto"), "torch": version("torch")}
    compute |= {"compile": str(settings.compile).lower(), "channels_last": str(settings.channels_last).lower()}
    plan = Plan(
        source=source,
        source_hash=source_fingerprint(files, info),
        model_hash=model_fingerprint(model),
        height=info.height,
        width=info.width,
        window=Area(0, 0, info.height, info.width) if window is None else Area(*window),
        tile=settings.tile,
        overlap=settings.overlap,
        block=_default_block(len(spec.bands), settings.tile) if block is None else block,
        batch=1 if isinstance(batch, str) else batch,
        bands=bands,
        mix=mix,
        scale=settings.scale,
        offset=settings.offset,
        classes=tuple((c.name, c.colour) for c in spec.classes),
        values=tuple((v.name, v.unit) for v in spec.values),
        objects=spec.objects,
        layers=tuple(settings.layers),
        compute=compute,
    )
    _ = plan.grid  # complains of impossible tiles
    return plan, info


def _bands(raster: Raster, spec: DataSpec, settings: Settings) -> tuple[tuple[int, ...], Mix | None]:
    """Which bands to read, and what is made of them if anything is."""
    if isinstance(settings.bands, str):
        return reduce_bands(raster, spec, settings.bands, scale=settings.scale, offset=settings.offset)
    return select_bands(raster.info, spec.bands, settings.bands), None


def _default_block(bands: int, tile: int) -> int:
    block = 4096
    while block > 512 and bands * tile * (block + tile) * 4 > _ROW_BYTES:
        block //= 2
    return block
