"""Rasters in: georeference, chosen bands in sensor units, and the mask of valid pixels.

Sensor units are what models are trained on: reflectance-like floats, about 0..1 for optical data (`to_sensor_units`).
Which pixels hold data is decided in one place (`valid_pixels` and `Raster.read`). rasterio data sets are not
thread-safe: a `Raster` belongs to the thread that opened it.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.raster.tiling import Area
from vfmadapt.raster.values import holds, tagged
from vfmadapt.raster.values import to_sensor_units as to_sensor_units
from vfmadapt.raster.values import valid_pixels as valid_pixels

_CACHE = 128 << 20  # bytes of decoded blocks that GDAL keeps; its own default is a share of the machine's memory


@dataclass(frozen=True)
class RasterInfo:
    """What a raster says about itself.

    Per band, in the file's order: `band_names` (None where the file has none), `colours` (red, green, blue or None),
    `dtypes`, `nodata` (None where unset), `scales`, `offsets`. `crs`, `transform` (affine.Affine), `gcps`, `gcps_crs`
    and `rpcs` are rasterio's objects; `alpha` is the 1-based alpha band; `masked` tells whether a mask band covers the
    data set; `palette` is band 1's colour map.
    """

    path: str
    height: int
    width: int
    crs: Any
    transform: Any
    gcps: tuple[Any, ...]
    gcps_crs: Any
    rpcs: Any
    band_names: tuple[str | None, ...]
    colours: tuple[str | None, ...]
    dtypes: tuple[str, ...]
    nodata: tuple[float | None, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    alpha: int | None
    masked: bool
    palette: dict[int, tuple[int, ...]] | None
    area_or_point: str | None

    @property
    def data_bands(self) -> tuple[int, ...]:
        """1-based bands in order, without the alpha band."""
        return tuple(b for b in range(1, len(self.dtypes) + 1) if b != self.alpha)

    @property
    def names(self) -> tuple[str | None, ...]:
        """Names of the data bands; a band without one goes by its colour."""
        return tuple(self.band_names[b - 1] or self.colours[b - 1] for b in self.data_bands)

    @property
    def georeferenced(self) -> bool:
        """Whether the raster knows where on a map it lies (a CRS, control points or RPCs)."""
        return self.crs is not None or bool(self.gcps) or self.rpcs is not None

    @property
    def pixel_m2(self) -> float | None:
        """Square metres of a pixel on the projection; None without a projected CRS."""
        if self.crs is None or not self.crs.is_projected:
            return None
        return float(abs(self.transform.determinant) * self.crs.linear_units_factor[1] ** 2)


class Raster:
    """An open raster; made by `open_raster`."""

    def __init__(self, dataset: Any, info: RasterInfo) -> None:
        self._dataset = dataset
        self.info = info

    def read(
        self,
        bands: Sequence[int],
        *,
        row: int = 0,
        column: int = 0,
        height: int | None = None,
        width: int | None = None,
        scale: float | None = None,
        offset: float | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Read a window inside the raster.

        Args:
            bands: 1-based bands in the order wanted.
            row: first row of the window.
            column: first column.
            height: rows, to the last one if None.
            width: columns, to the last one if None.
            scale: see `to_sensor_units`.
            offset: see `to_sensor_units`.

        Returns:
            image float32 (C, h, w) in sensor units, 0 where void; valid bool (h, w).
        """
        from rasterio.windows import Window

        rows = self.info.height - row if height is None else height
        columns = self.info.width - column if width is None else width
        return self._read(bands, scale, offset, window=Window(column, row, columns, rows))

    def stored(self, bands: Sequence[int], area: Area) -> bool:
        """Whether the file holds any of an area; no only where it is a sparse GeoTIFF that leaves all of it out.

        What a sparse file leaves out is no data, whatever GDAL puts in its place.
        """
        if self._dataset.driver != "GTiff":
            return True
        together = str(self._dataset.interleaving).upper().endswith("PIXEL")
        for band in bands[:1] if together else bands:
            high, wide = self._dataset.block_shapes[band - 1]
            for y in range(area.row // high, -(-area.bottom // high)):
                for x in range(area.column // wide, -(-area.right // wide)):
                    if self._dataset.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", bidx=band):
                        return True
        return False

    def tags(self, band: int = 0, domain: str | None = None) -> dict[str, str]:
        """GDAL's metadata of a band, or of the file (0)."""
        found: dict[str, str] = self._dataset.tags(band, ns=domain)
        return found

    @property
    def block(self) -> tuple[int, int]:
        """Height and width of the blocks that the file is stored in."""
        height, width = self._dataset.block_shapes[0]
        return int(height), int(width)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it consists of."""
        return tuple(self._dataset.files)

    def thumbnail(
        self, bands: Sequence[int], max_side: int, area: Area | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """An area, or all, averaged down to at most `max_side` pixels per side; like `read`, but not scaled."""
        from rasterio.enums import Resampling
        from rasterio.windows import Window

        area = area or Area(0, 0, self.info.height, self.info.width)
        shape = (len(bands), *_reduced(area.height, area.width, max_side))
        resampling = Resampling.nearest if self.info.palette else Resampling.average
        window = Window(area.column, area.row, area.width, area.height)
        return self._read(bands, 1.0, 0.0, window=window, out_shape=shape, resampling=resampling)

    def read_labels(
        self, max_side: int | None = None, area: Area | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Band 1 of an area, or all, as stored, and where it is not void; nearest pixels for `max_side` if given."""
        from rasterio.windows import Window

        info, area = self.info, area or Area(0, 0, self.info.height, self.info.width)
        kwargs: dict[str, Any] = {"window": Window(area.column, area.row, area.width, area.height)}
        if max_side is not None:
            kwargs["out_shape"] = _reduced(area.height, area.width, max_side)
        with _reading(info.path):
            labels = self._dataset.read(1, **kwargs)
            known = ~holds(labels, info.nodata[0])
            if info.masked:
                known &= self._dataset.read_masks(1, **kwargs) > 0
            if info.alpha is not None:
                known &= self._dataset.read(info.alpha, **kwargs) > 0
        return labels, known

    def _read(
        self, bands: Sequence[int], scale: float | None, offset: float | None, **kwargs: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        info, indexes = self.info, list(bands)
        at = [b - 1 for b in indexes]
        flat = {key: value[1:] if key == "out_shape" else value for key, value in kwargs.items()}
        with _reading(info.path):
            values = self._dataset.read(indexes, **kwargs)
            valid = valid_pixels(values, [info.nodata[i] for i in at])
            if info.masked:
                valid &= self._dataset.read_masks(indexes[0], **flat) > 0
            if info.alpha is not None and info.alpha not in indexes:
                valid &= self._dataset.read(info.alpha, **flat) > 0
        has_tags = tagged(info.scales, info.offsets)  # of the whole file: (1, 0) beside a scaled band means 1 and 0
        gains, shifts = ([info.scales[i] for i in at], [info.offsets[i] for i in at]) if has_tags else (None, None)
        image = to_sensor_units(values, scale=scale, offset=offset, tag_scales=gains, tag_offsets=shifts)
        if not valid.all():
            np.copyto(image, np.float32(0), where=~valid)
        return image, valid


def _reduced(height: int, width: int, max_side: int) -> tuple[int, int]:
    factor = -(-max(height, width) // max_side)
    return -(-height // factor), -(-width // factor)


@contextmanager
def open_raster(path: str | Path) -> Iterator[Raster]:
    """Open a raster of any format that GDAL reads (GeoTIFF, PNG, JPEG, ...); without a georeference it opens silently.

    Raises UserError, one line, where the file is missing, no raster, corrupt, empty of bands or complex-valued.
    """
    import rasterio

    name = str(path)
    # A truncated JPEG is only a warning to GDAL, and its missing half is then grey.
    with rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING="TRUE", GDAL_CACHEMAX=_CACHE):
        dataset = _open(rasterio, name)
        try:
            yield Raster(dataset, _describe(dataset, name))
        finally:
            dataset.close()


def raster_info(path: str | Path) -> RasterInfo:
    """What a raster says about itself; errors as in `open_raster`."""
    with open_raster(path) as raster:
        return raster.info


def _open(rasterio: Any, name: str) -> Any:
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder, not a raster; give one file")
    try:
        with _reading(name):
            return rasterio.open(name)
    except UserError as error:
        if "://" not in name and not name.startswith("/vsi") and not Path(name).exists():
            raise UserError(f"no such file: {name}") from error
        raise


def _describe(dataset: Any, name: str) -> RasterInfo:
    from rasterio.enums import ColorInterp, MaskFlags

    if not dataset.count:
        parts = ", ".join(dataset.subdatasets[:3]) or "none"
        raise UserError(f"{name} holds no bands of its own; give one of its sub-datasets (first: {parts})")
    if (
        any(np.dtype(d).kind == "c" for d in dataset.dtypes if not d.startswith("complex_int"))
        or "complex_int16" in dataset.dtypes
    ):
        raise UserError(f"{name} holds complex values; convert it to real bands (amplitude, decibel) first")
    alpha = [b for b, kind in enumerate(dataset.colorinterp, start=1) if kind == ColorInterp.alpha and b > 1]
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    flags = dataset.mask_flag_enums[0]
    gcps, gcps_crs = dataset.gcps
    return RasterInfo(
        path=name,
        height=dataset.height,
        width=dataset.width,
        crs=dataset.crs,
        transform=dataset.transform,
        gcps=tuple(gcps),
        gcps_crs=gcps_crs,
        rpcs=dataset.rpcs,
        band_names=tuple(d or None for d in dataset.descriptions),
        colours=tuple(c.name if c in colours else None for c in dataset.colorinterp),
        dtypes=tuple(dataset.dtypes),
        nodata=tuple(dataset.nodatavals),
        scales=tuple(dataset.scales),
        offsets=tuple(dataset.offsets),
        alpha=alpha[-1] if alpha else None,
        masked=MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags,
        palette=dataset.colormap(1) if dataset.colorinterp[0] == ColorInterp.palette else None,
        area_or_point=dataset.tags().get("AREA_OR_POINT"),
    )


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """GDAL's failures -> one UserError, without the log lines and warnings that GDAL gives beside them."""
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    log = logging.getLogger("rasterio")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except (RasterioError, OSError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200]
        raise UserError(f"{name} cannot be read as a raster (corrupt, truncated or not an image?): {reason}") from error
    finally:
        log.setLevel(level)
