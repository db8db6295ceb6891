"""A raster in, a map of classes out: tiles through a model, blended, row by row."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vfmadapt.contracts import DataSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.bands import select_bands as select_bands
from vfmadapt.raster.io import Raster, RasterInfo, open_raster
from vfmadapt.raster.tiling import RowBlender, TileGrid, pad_to_tile
from vfmadapt.raster.write import NODATA, label_writer

logger = logging.getLogger(__name__)

_FAR = 20.0  # standard deviations from the training mean that no median of an image in the right units reaches


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
    (it is the area on that projection); `void` counts pixels without data.
    """

    path: Path
    size: tuple[int, int]
    pixels: dict[str, int]
    void: int
    area_km2: dict[str, float] | None
    seconds: float

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
    bands: Sequence[int] | None = None,
    scale: float | None = None,
    offset: float | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> PredictResult:
    """Map a raster of any size with a model.

    Memory grows with width x tile, not with the raster's height. Tiles without a valid pixel are skipped; void pixels
    become nodata.

    Args:
        model: an nn.Module that is a `Segmenter`; it is put into evaluation mode for the time.
        source: any raster that GDAL reads; without a georeference a warning is logged and the map has none.
        output: the map, a GeoTIFF of uint8 labels on the raster's pixels; nodata 255, colour table, class names inside.
        tile: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share.
        batch: tiles per forward pass; does not change the map.
        bands: 1-based bands for the model (see `select_bands`).
        scale: with `offset`, how to get sensor units from stored values (see `to_sensor_units`).
        offset: see `scale`.
        device: where to run; by default where the model is.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        UserError: unreadable raster, bands that do not fit, bad sizes, an output that cannot be written.
    """
    start = time.perf_counter()
    spec: DataSpec = model.spec
    _check(Path(source), Path(output), batch)
    with open_raster(source) as raster:
        info = raster.info
        grid = TileGrid(info.height, info.width, tile, overlap)
        chosen = select_bands(info, spec.bands, bands)
        if not info.georeferenced:
            logger.warning("%s has no CRS: the map will lie on its pixels, but nowhere on Earth", source)
        counts = np.zeros(NODATA + 1, dtype=np.int64)
        engine = _Engine(model, raster, grid, chosen, batch, (scale, offset), device)
        with label_writer(output, info, spec.classes) as writer:
            for labels in engine.run(progress):
                writer.append(labels)
                counts += np.bincount(labels.ravel(), minlength=NODATA + 1)
            result = _result(output, info, spec, counts, time.perf_counter() - start)
            writer.finish(_tags(result))
    if not sum(result.pixels.values()):
        logger.warning("%s has no valid pixel: the map is all nodata", source)
    return result


@dataclass(frozen=True)
class _Engine:
    """One run of a model over a raster."""

    model: Any
    raster: Raster
    grid: TileGrid
    bands: tuple[int, ...]
    batch: int
    units: tuple[float | None, float | None]
    device: str | torch.device | None

    def run(self, progress: bool) -> Iterator[NDArray[np.uint8]]:
        """Labels of the raster in row bands (h, W), top to bottom; `NODATA` where void."""
        from tqdm import tqdm

        grid, height = self.grid, self.raster.info.height
        blender = RowBlender(grid, len(self.model.spec.classes))
        tiles, checked = len(grid.rows) * len(grid.columns), False
        with _evaluation(self.model), tqdm(total=tiles, unit="tile", disable=None if progress else True) as bar:
            for first in grid.rows:
                scale, offset = self.units
                image, valid = self.raster.read(
                    self.bands, row=first, height=min(grid.tile, height - first), scale=scale, offset=offset
                )
                if not checked and valid.any():
                    checked = True
                    _warn_of_units(self.raster.info.path, self.model.spec, image, valid)
                filled = [c for c in grid.columns if valid[:, c : c + grid.tile].any()]
                for at in range(0, len(filled), self.batch):
                    columns = filled[at : at + self.batch]
                    for column, logits in zip(columns, self._logits(image, valid, columns), strict=True):
                        blender.add(column, logits)
                bar.update(len(grid.columns))
                blended = blender.finish_row(first)
                labels = blended.argmax(axis=0).astype(np.uint8)
                labels[~valid[: len(labels)]] = NODATA
                yield labels

    def _logits(
        self, image: NDArray[np.float32], valid: NDArray[np.bool_], columns: Sequence[int]
    ) -> NDArray[np.float32]:
        side = self.grid.tile
        images = np.stack([pad_to_tile(image[:, :, c : c + side], side) for c in columns])
        masks = np.stack([pad_to_tile(valid[:, c : c + side], side) for c in columns])
        device = self.device or _device(self.model)
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(images).to(device), torch.from_numpy(masks).to(device))
        expected = (len(columns), len(self.model.spec.classes), side, side)
        if tuple(logits.shape) != expected:
            raise RuntimeError(f"the model gave logits {tuple(logits.shape)}, not {expected}")
        if not torch.isfinite(logits).all():
            low, high = float(images.min()), float(images.max())
            raise UserError(
                f"the model gives NaN or infinite scores on {self.raster.info.path}, whose values there are {low:g} to "
                f"{high:g} in sensor units; reflectance is about 0 to 1: check scale= and offset="
            )
        out: NDArray[np.float32] = logits.float().cpu().numpy()
        return out


class _evaluation:  # noqa: N801 - used like a function
    """The module in evaluation mode, and back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._modes = [(m, m.training) for m in self._model.modules()]
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode


def _device(model: nn.Module) -> torch.device:
    tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _warn_of_units(path: str, spec: DataSpec, image: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
    """Say so where the values cannot be in the model's units, such as 10000 where it knows reflectance 0..1."""
    medians = np.median(image[:, valid], axis=1)
    far = np.abs(medians - np.asarray(spec.mean)) > _FAR * np.maximum(np.asarray(spec.std), 1e-6)
    if far.any():
        band = int(far.argmax())
        logger.warning(
            "%s: the median of band %s is %g, the model was trained on values around %g; check scale= and offset=",
            path,
            spec.bands[band],
            medians[band],
            spec.mean[band],
        )


def _check(source: Path, output: Path, batch: int) -> None:
    if batch < 1:
        raise UserError(f"batch={batch} is no number of tiles; allowed: 1 and more")
    if output.suffix.lower() not in (".tif", ".tiff"):
        raise UserError(f"output={output}: maps are GeoTIFFs; give it a name that ends in .tif")
    if output.is_dir():
        raise UserError(f"output={output} is a folder; give the name of a file in it")
    if source.exists() and output.exists() and output.samefile(source):
        raise UserError(f"output={output} is the input itself; choose another output")


def _result(
    output: str | Path, info: RasterInfo, spec: DataSpec, counts: NDArray[np.int64], seconds: float
) -> PredictResult:
    pixels = {c.name: int(counts[i]) for i, c in enumerate(spec.classes)}
    area = None
    if info.crs is not None and info.crs.is_projected:
        metres = info.crs.linear_units_factor[1]
        square_km = abs(info.transform.determinant) * metres**2 / 1e6
        area = {name: count * square_km for name, count in pixels.items()}
    return PredictResult(Path(output), (info.height, info.width), pixels, int(counts[NODATA]), area, seconds)


def _tags(result: PredictResult) -> dict[str, str]:
    tags = {
        "CLASS_PIXELS": json.dumps(result.pixels),
        "CLASS_SHARES": json.dumps({name: round(share, 6) for name, share in result.shares.items()}),
    }
    if result.area_km2 is not None:
        tags["CLASS_AREA_KM2"] = json.dumps({name: round(area, 6) for name, area in result.area_km2.items()})
    return tags
