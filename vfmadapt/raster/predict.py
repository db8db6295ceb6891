"""A raster in, a map of classes out: planned in blocks, resumable, one cloud-optimised GeoTIFF at the end."""

import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vfmadapt.contracts import DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.bands import select_bands as select_bands
from vfmadapt.raster.fingerprint import model_fingerprint, source_fingerprint
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.io import RasterInfo, open_raster
from vfmadapt.raster.job import Job, Work, file_of, merge
from vfmadapt.raster.merge import Collected
from vfmadapt.raster.plan import Area, Plan
from vfmadapt.raster.scoring import device_of
from vfmadapt.raster.write import NODATA

logger = logging.getLogger(__name__)

_ROW_BYTES = 256 << 20  # of one row of tiles of a block, as floats; the default block is made small enough for that


class Segmenter(Protocol):
    """What `predict_raster` needs of a model (an nn.Module): its spec and its forward."""

    spec: DataSpec

    def __call__(self, image: Tensor, valid: Tensor) -> Tensor:
        """Image float32 (B, C, H, W) in sensor units, valid bool (B, H, W) -> logits (B, K, H, W)."""
        ...


@dataclass(frozen=True)
class PredictResult:
    """A finished map.

    `size` is (height, width); `pixels` and `area_km2` go by class name, the latter is None unless the CRS is projected
    (it is the area on that projection); `void` counts pixels without data; `scores` is the file of probabilities,
    entropy and disagreement, if asked for.
    """

    path: Path
    size: tuple[int, int]
    pixels: dict[str, int]
    void: int
    area_km2: dict[str, float] | None
    seconds: float
    scores: Path | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Share of each class among the pixels with data, 0..1."""
        total = max(sum(self.pixels.values()), 1)
        return {name: count / total for name, count in self.pixels.items()}


def predict_raster(
    model: Any,
    source: str | Path,
    output: str | Path,
    *,
    tile: int = 256,
    overlap: int = 64,
    batch: int = 4,
    block: int | None = None,
    window: Sequence[int] | None = None,
    bands: Sequence[int] | None = None,
    scale: float | None = None,
    offset: float | None = None,
    layers: Sequence[str] = (),
    tta: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    restart: bool = False,
    progress: bool = False,
) -> PredictResult:
    """Map a raster of any size with a model.

    Memory does not grow with the raster. Tiles without a valid pixel are skipped; void pixels become nodata. Finished
    blocks lie in `output`.blocks until the map is there: a run that was interrupted goes on where it stopped, and the
    map has the same bytes as that of an unbroken run.

    Args:
        model: an nn.Module that is a `Segmenter`; it is put into evaluation mode for the time.
        source: any raster that GDAL reads; without a georeference a warning is logged and the map has none.
        output: the map, a cloud-optimised GeoTIFF of uint8 labels on the raster's pixels; nodata 255, colour table,
            class names and areas inside.
        tile: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share.
        batch: tiles per forward pass.
        block: side of a block in pixels, a multiple of 512; by default 4096, less for rasters of very many bands.
        window: [row, column, height, width], the part to map; by default all.
        bands: 1-based bands for the model (see `select_bands`).
        scale: with `offset`, how to get sensor units from stored values (see `to_sensor_units`).
        offset: see `scale`.
        layers: of "probabilities", "entropy" and "disagreement" (of overlapping tiles): written as bands of a second
            GeoTIFF, `NAME_scores.tif`, as uint8 with scale 1/254.
        tta: "d4" averages over the eight flips and quarter turns of each tile, at eight times the cost.
        dtype: what the model computes in, "float32" or "bfloat16".
        device: where to run; by default where the model is.
        restart: drop the blocks of an interrupted run with other inputs or settings.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        UserError: unreadable raster, bands that do not fit, bad sizes, an output that cannot be written or that another
            run is writing, a full disk, blocks that fail.
    """
    start, output = time.perf_counter(), Path(output)
    _check(Path(source), output)
    place = device_of(model) if device is None else torch.device(device)
    compute = {"device": place.type, "dtype": dtype, "tta": tta or "none"}
    plan, info = _plan(
        model, str(source), compute, (tile, overlap, batch, block), window, bands, (scale, offset), tuple(layers)
    )
    if not info.georeferenced:
        logger.warning("%s has no CRS: the map will lie on its pixels, but nowhere on Earth", source)
    folder = BlockFolder(output)
    with folder.locked():
        folder.open(plan, restart=restart)
        try:
            with _bar(plan, progress) as on_pixels:
                work = Job(plan, folder, model, place).run(plan.blocks, on_pixels)
            collected = merge(folder, plan, lambda c: _tags(_result(output, info, plan, c, 0.0)))
        except BaseException:
            folder.remove_if_empty()
            raise
    result = _result(output, info, plan, collected, time.perf_counter() - start)
    if not sum(result.pixels.values()):
        logger.warning("%s has no valid pixel: the map is all nodata", source)
    logger.info(_summary(result, plan, work, collected, info))
    return result


def _plan(
    model: Any,
    source: str,
    compute: dict[str, str],
    sizes: tuple[int, int, int, int | None],
    window: Sequence[int] | None,
    bands: Sequence[int] | None,
    units: tuple[float | None, float | None],
    layers: tuple[str, ...],
) -> tuple[Plan, RasterInfo]:
    """The plan, and what the raster says about itself."""
    spec: DataSpec = model.spec
    if len(spec.classes) > NODATA:
        raise UserError(f"the model has {len(spec.classes)} classes; a map holds at most {NODATA}")
    tile, overlap, batch, block = sizes
    with open_raster(source) as raster:
        info, files = raster.info, raster.files
    if window is not None and len(window) != 4:
        raise UserError(f"window={list(window)}: wanted are four numbers, [row,column,height,width]")
    plan = Plan(
        source=source,
        source_hash=source_fingerprint(files, info),
        model_hash=model_fingerprint(model),
        height=info.height,
        width=info.width,
        window=Area(0, 0, info.height, info.width) if window is None else Area(*window),
        tile=tile,
        overlap=overlap,
        block=_default_block(len(spec.bands), tile) if block is None else block,
        batch=batch,
        bands=select_bands(info, spec.bands, bands),
        scale=units[0],
        offset=units[1],
        classes=tuple((c.name, c.colour) for c in spec.classes),
        layers=layers,
        compute=compute | {"kernels": os.environ.get("VFMADAPT_KERNELS", "auto"), "torch": version("torch")},
    )
    _ = plan.grid  # complains of impossible tiles
    return plan, info


def _default_block(bands: int, tile: int) -> int:
    block = 4096
    while block > 512 and bands * tile * (block + tile) * 4 > _ROW_BYTES:
        block //= 2
    return block


def _check(source: Path, output: Path) -> None:
    if output.suffix.lower() not in (".tif", ".tiff"):
        raise UserError(f"output={output}: maps are GeoTIFFs; give it a name that ends in .tif")
    if output.is_dir():
        raise UserError(f"output={output} is a folder; give the name of a file in it")
    if source.exists() and output.exists() and output.samefile(source):
        raise UserError(f"output={output} is the input itself; choose another output")


@contextmanager
def _bar(plan: Plan, progress: bool) -> Iterator[Callable[[int], None]]:
    """A bar in megapixels with rate and time left; gives what to call with pixels as they are done."""
    from tqdm import tqdm

    total = plan.window.height * plan.window.width / 1e6
    form = "{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} Mpx [{elapsed}<{remaining}, {rate_fmt}]"
    with tqdm(total=total, unit="Mpx", disable=None if progress else True, bar_format=form) as bar:
        yield lambda pixels: bar.update(pixels / 1e6)


def _result(output: Path, info: RasterInfo, plan: Plan, collected: Collected, seconds: float) -> PredictResult:
    counts = collected.counts
    pixels = {name: int(counts[i]) for i, (name, _) in enumerate(plan.classes)}
    area, one = None, _pixel_km2(info)
    if one is not None:
        area = {name: count * one for name, count in pixels.items()}
    scores = file_of(output, "scores") if plan.bands_of("scores") else None
    size = (plan.window.height, plan.window.width)
    return PredictResult(output, size, pixels, int(counts[NODATA]), area, seconds, scores)


def _pixel_km2(info: RasterInfo) -> float | None:
    """Square kilometres of a pixel; None without a projected CRS."""
    if info.crs is None or not info.crs.is_projected:
        return None
    metres: float = info.crs.linear_units_factor[1]
    return float(abs(info.transform.determinant)) * metres**2 / 1e6


def _tags(result: PredictResult) -> dict[str, str]:
    tags = {
        "CLASS_PIXELS": json.dumps(result.pixels),
        "CLASS_SHARES": json.dumps({name: round(share, 6) for name, share in result.shares.items()}),
    }
    if result.area_km2 is not None:
        tags["CLASS_AREA_KM2"] = json.dumps({name: round(area, 6) for name, area in result.area_km2.items()})
    return tags


def _summary(result: PredictResult, plan: Plan, work: Work, collected: Collected, info: RasterInfo) -> str:
    """The last line: size, speed, memory, share of the time in the model, tiles forwarded over tiles planned."""
    seconds, one = max(result.seconds, 1e-9), _pixel_km2(info)
    rate = work.pixels / seconds
    area = "" if one is None else f", {rate * one:.3g} km²/s"
    window = plan.window
    tiles = len(plan.grid.rows_over(window.row, window.bottom)) * len(
        plan.grid.columns_over(window.column, window.right)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # Linux gives KiB
    return (
        f"{window.height} x {window.width} pixels in {seconds:.1f} s: {rate / 1e6:.2f} Mpx/s{area}, peak memory "
        f"{peak:.2f} GB, {work.model_seconds / seconds:.0%} of the time in the model, tiles forwarded / planned "
        f"{collected.forwarded / tiles:.2f}"
    )
