"""A raster in, a map of classes or values out: planned in blocks, resumable, one cloud-optimised GeoTIFF at the end."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vfmadapt.contracts import DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.bands import shown_bands as shown_bands
from vfmadapt.raster.fingerprint import source_fingerprint
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.io import RasterInfo, open_raster
from vfmadapt.raster.job import Job, merge, polygons_of
from vfmadapt.raster.many import Segmenters, job_of_many
from vfmadapt.raster.many import output_of as output_of
from vfmadapt.raster.merge import Collected
from vfmadapt.raster.mosaic import one_raster as one_raster
from vfmadapt.raster.plan import Plan
from vfmadapt.raster.planning import Settings as Settings
from vfmadapt.raster.planning import make_plan
from vfmadapt.raster.polygons import check_polygons
from vfmadapt.raster.ray_engine import RayCluster as RayCluster
from vfmadapt.raster.report import PredictResult as PredictResult
from vfmadapt.raster.report import map_result, statistics_tags, summary
from vfmadapt.raster.scoring import device_of

logger = logging.getLogger(__name__)


class Segmenter(Protocol):
    """What `predict_raster` needs of a model (an nn.Module): its spec and its forward."""

    spec: DataSpec

    def __call__(self, image: Tensor, valid: Tensor) -> Tensor:
        """Image float32 (B, C, H, W) in sensor units, valid bool (B, H, W) -> logits, or values (B, K, H, W)."""
        ...


def predict_raster(
    model: Any,
    source: str | Path,
    output: str | Path,
    *,
    tile: int = 256,
    overlap: int = 64,
    batch: int | str = 4,
    block: int | None = None,
    window: Sequence[int] | None = None,
    bands: Sequence[int] | str | None = None,
    scale: float | None = None,
    offset: float | None = None,
    layers: Sequence[str] = (),
    tta: str | None = None,
    dtype: str = "float32",
    compile: bool = False,
    channels_last: bool = False,
    polygons: str | None = None,
    device: str | torch.device | None = None,
    cluster: RayCluster | None = None,
    restart: bool = False,
    progress: bool = False,
) -> PredictResult:
    """Map a raster of any size with a model.

    Memory does not grow with the raster. Tiles without a valid pixel are skipped; void pixels become nodata. Finished
    blocks lie in `output`.blocks until the map is there: a run that was interrupted goes on where it stopped, and the
    map has the same bytes as that of an unbroken run.

    Args:
        model: an nn.Module that is a `Segmenter`; it is put into evaluation mode for the time.
        source: any raster or URL that GDAL reads; or many files as one: a folder, a glob, a STAC item or collection
            (see `vfmadapt.raster.mosaic`). Without a georeference a warning is logged and the map has none.
        output: the map, a cloud-optimised GeoTIFF on the raster's pixels: uint8 labels, nodata 255, colour table, class
            names and areas inside; of a model of values float32, nodata NaN, a band for each, units and statistics.
        tile: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share.
        batch: tiles per forward pass; "auto": as many as fit into a GPU's memory, 4 on a CPU.
        block: side of a block in pixels, a multiple of 512; by default 4096, less for rasters of very many bands.
        window: [row, column, height, width], the part to map; by default all.
        bands: 1-based bands for the model (see `select_bands`); or, of a raster of many bands, "mean" of neighbours,
            "pca" or "wavelength" (see `vfmadapt.raster.reduction`).
        scale: with `offset`, how to get sensor units from stored values (see `to_sensor_units`).
        offset: see `scale`.
        layers: of "probabilities", "entropy" and "disagreement" (of overlapping tiles): written as bands of a second
            GeoTIFF, `NAME_scores.tif`, as uint8 with scale 1/254.
        tta: "d4" averages over the eight flips and quarter turns of each tile, at eight times the cost.
        dtype: what the model computes in, "float32" or "bfloat16".
        compile: `torch.compile` the model: minutes at first, then a faster forward pass.
        channels_last: give the model its tiles in that memory layout, which suits convolutions on a GPU.
        polygons: "gpkg" or "parquet": also write the regions of each class as polygons, beside the map.
        device: where to run; by default where the model is.
        cluster: compute on the nodes of a Ray cluster, on GPUs if it has any and `device` does not say otherwise; the
            model is sent to them.
        restart: drop the blocks of an interrupted run with other inputs or settings.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        UserError: unreadable raster, bands that do not fit, bad sizes, an output that cannot be written or that another
            run is writing, a full disk, blocks that fail.
    """
    settings = Settings(
        tile=tile,
        overlap=overlap,
        batch=batch,
        block=block,
        window=window,
        bands=bands,
        scale=scale,
        offset=offset,
        layers=layers,
        tta=tta,
        dtype=dtype,
        compile=compile,
        channels_last=channels_last,
        polygons=polygons,
    )
    run: dict[str, Any] = {"device": device, "cluster": cluster, "restart": restart, "progress": progress}
    return _mapped(model, source, output, settings, **run)[0]


def predict_many(
    models: Segmenters,
    source: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    device: str | torch.device | None = None,
    cluster: RayCluster | None = None,
    restart: bool = False,
    progress: bool = False,
) -> dict[str, PredictResult]:
    """Map a raster with several models at once: it is read once, and what the models have in common is computed once.

    The map of model NAME is `output` with _NAME after its stem; it has the bytes that the model alone would give.

    Args:
        models: from `vfmadapt.load_many`.
        source: as for `predict_raster`, like all that follows.
        output: see above.
        settings: how to map.
        device: where to run.
        cluster: a Ray cluster.
        restart: drop the blocks of an interrupted run with other inputs or settings.
        progress: show a bar.

    Raises:
        UserError: as `predict_raster`; models that want other bands of the raster.
    """
    run: dict[str, Any] = {"device": device, "cluster": cluster, "restart": restart, "progress": progress}
    return dict(zip(models.names(), _mapped(models, source, output, settings, **run), strict=True))


def predict_part(
    model: Any,
    source: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    index: int,
    of: int,
    device: str | torch.device | None = None,
    restart: bool = False,
    progress: bool = False,
) -> int:
    """Compute every `of`-th block of a map, from block `index` (counted from 0) on; `merge_parts` makes the map.

    `model` may be several (see `predict_many`); each of the maps is then merged by itself.

    For array jobs (Slurm, Kubernetes) on machines that share a file system: any number of parts at once, in any order,
    each as often as need be. What all parts together give has the bytes of one `predict_raster`.

    Returns:
        Number of blocks that were computed now; finished ones are not redone.

    Raises:
        UserError: as `predict_raster`; another process works on the same part; bad `index` or `of`.
    """
    if not 0 <= index < of:
        raise UserError(f"index={index} of={of}: allowed are 0 <= index < of, for instance index=0 of=4")
    job, _ = _job(model, source, Path(output), device, settings)
    own = islice(job.plan.blocks, index, None, of)
    with (
        job.opened(auto_batch=settings.batch == "auto", restart=restart, part=index),
        _bar(job.plan, len(range(index, len(job.plan.blocks), of)), progress) as on_pixels,
    ):
        return job.run(own, on_pixels).blocks


def merge_parts(output: str | Path, *, polygons: str | None = None) -> PredictResult:
    """Make the map, and `polygons`, of the blocks that parts have left; the plan says all else, no model is needed.

    Raises:
        UserError: no parts, missing blocks, the raster has changed since, a part is still running.
    """
    start, folder = time.perf_counter(), BlockFolder(Path(output))
    plan = folder.plan()
    if plan is None:
        raise UserError(f"{folder.path} holds no plan; compute the parts first (engine=array index=0 of=4)")
    with open_raster(plan.source) as raster:
        info = raster.info
        if source_fingerprint(raster.files, info) != plan.source_hash:
            raise UserError(f"{plan.source} has changed since its blocks were computed; compute them with restart=true")
    check_polygons(polygons, info, plan.values)
    with folder.locked():
        result, _ = _merged(folder, plan, info, polygons)
        folder.remove()
    return replace(result, seconds=time.perf_counter() - start)


def _mapped(
    model: Any,
    source: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    device: str | torch.device | None,
    cluster: RayCluster | None,
    restart: bool,
    progress: bool,
) -> list[PredictResult]:
    start = time.perf_counter()
    with ExitStack() as stack:
        if cluster is not None:
            stack.enter_context(cluster.connected())
            device = cluster.device(device)
        job, info = _job(model, source, Path(output), device, settings)
        if cluster is not None:
            job = cluster.job(job)
        stack.enter_context(job.opened(auto_batch=settings.batch == "auto", restart=restart))
        with _bar(job.plan, len(job.plan.blocks), progress) as on_pixels:
            work = job.run(job.plan.blocks, on_pixels)
        made = [_merged(folder, plan, info, settings.polygons) for plan, folder in job.maps]
        for _, folder in job.maps:  # not before all maps are there
            folder.remove()
    seconds = time.perf_counter() - start
    results = [replace(result, seconds=seconds, model_seconds=work.model_seconds) for result, _ in made]
    logger.info(summary(results[0], job.plan, work, made[0][1], info))
    return results


def _job(
    model: Any, source: str | Path, output: Path, device: str | torch.device | None, settings: Settings
) -> tuple[Job, RasterInfo]:
    several = isinstance(model, Segmenters)
    for path in [output_of(output, name) for name in model.names()] if several else [output]:
        _check(Path(source), path)
    place = device_of(model) if device is None else torch.device(device)
    raster = one_raster(str(source), output)
    if several:
        job, info = job_of_many(model, raster, output, place, settings)
    else:
        plan, info = make_plan(model, raster, place, settings)
        job = Job(plan, BlockFolder(output), model, place)
    for plan, _ in job.maps:
        check_polygons(settings.polygons, info, plan.values)
    if not info.georeferenced:
        logger.warning("%s has no CRS: the map will lie on its pixels, but nowhere on Earth", source)
    return job, info


def _merged(folder: BlockFolder, plan: Plan, info: RasterInfo, polygons: str | None) -> tuple[PredictResult, Collected]:
    def tags_of(collected: Collected) -> dict[str, str]:
        return statistics_tags(map_result(folder.output, info, plan, collected, 0.0))

    collected = merge(folder, plan, tags_of, polygons)
    result = map_result(folder.output, info, plan, collected, 0.0)
    result = replace(result, polygons=None if polygons is None else polygons_of(folder.output, polygons))
    if not collected.known:
        logger.warning("%s has no valid pixel: the map is all nodata", plan.source)
    return result, collected


def _check(source: Path, output: Path) -> None:
    if output.suffix.lower() not in (".tif", ".tiff"):
        raise UserError(f"output={output}: maps are GeoTIFFs; give it a name that ends in .tif")
    if output.is_dir():
        raise UserError(f"output={output} is a folder; give the name of a file in it")
    if source.exists() and output.exists() and output.samefile(source):
        raise UserError(f"output={output} is the input itself; choose another output")


@contextmanager
def _bar(plan: Plan, blocks: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """A bar in megapixels with rate and time left; gives what to call with pixels as they are done."""
    from tqdm import tqdm

    total = plan.window.height * plan.window.width / 1e6 * blocks / len(plan.blocks)
    form = "{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} Mpx [{elapsed}<{remaining}, {rate_fmt}]"
    with tqdm(total=total, unit="Mpx", disable=None if progress else True, bar_format=form) as bar:
        yield lambda pixels: bar.update(pixels / 1e6)
