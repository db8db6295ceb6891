"""DICOM: the frames of one file, or the files of a series."""

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from pydicom.pixels import pixel_array

from vfmadapt.errors import UserError
from vfmadapt.frames._planes import Arrangement, Plane, arrange, planes
from vfmadapt.frames.clip import Clip, ClipInfo
from vfmadapt.frames.space import lps_to_ras

log = logging.getLogger(__name__)


class DicomClip(Clip):
    """Slices in the order of their position, or frames in that of time; rescaled, so in Hounsfield units for CT.

    Args:
        path: a file, or a folder with the files of a series.
        series: which of several series: its number, or its SeriesInstanceUID.
        slice: where several slices were taken at several moments, the one that is followed through time.
        time: in such a series, the moment whose slices are the frames.
    """

    def __init__(
        self, path: Path, *, series: int | str | None = None, slice: int | None = None, time: int | None = None
    ) -> None:
        headers = _series(path, series)
        found = [plane for file, header in headers for plane in planes(header, file)]
        if not found:
            raise UserError(f"{path} holds no frame")
        other = next((p for p in found if p.size != found[0].size), None)
        if other is not None:
            raise UserError(
                f"{path}: {other.file.name} has {_size(other)} pixels, {found[0].file.name} {_size(found[0])}; all "
                "frames of a clip must be of one size"
            )
        self._arranged = arrange(found, path, at=slice, time=time)
        self.info = _info(path, headers[0][1], self._arranged)

    def _read(self, index: int) -> NDArray[np.generic]:
        plane = self._arranged.planes[index]
        try:
            values = np.asarray(pixel_array(plane.file, index=plane.index))
        except (RuntimeError, NotImplementedError, ValueError, AttributeError, OSError) as error:
            raise UserError(f"{plane.file}: frame {plane.index} cannot be decoded ({_line(error)})") from error
        if values.ndim == 3:
            return values.transpose(2, 0, 1)
        return (values.astype(np.float32) * np.float32(plane.slope) + np.float32(plane.intercept))[None]


def _series(path: Path, wanted: int | str | None) -> list[tuple[Path, Any]]:
    """Files and headers of the series that is meant, in the order of their names."""
    groups: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    for file in [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file()):
        header = _header(file, alone=path.is_file())
        if header is not None:
            groups[str(header.get("SeriesInstanceUID", ""))].append((file, header))
    if not groups:
        raise UserError(f"{path}: no DICOM file in it holds an image")
    numbers = {str(files[0][1].get("SeriesNumber", "")): uid for uid, files in groups.items()}
    if wanted is not None:
        uid = numbers.get(str(wanted), str(wanted))
        if uid in groups:
            return groups[uid]
    if wanted is None and len(groups) == 1:
        return next(iter(groups.values()))
    told = ", ".join(f"{n or uid} ({len(groups[uid])} files)" for n, uid in numbers.items())
    first = next(iter(numbers)) or next(iter(groups))
    raise UserError(f"{path} holds the series {told}; choose one with series=; tools take reader={{series: {first}}}")


def _header(file: Path, *, alone: bool) -> Any:
    """A file's header without pixels; None for what is no image, which is an error where it stands alone."""
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
    except (InvalidDicomError, OSError, EOFError) as error:
        if alone:
            raise UserError(f"{file} is not a readable DICOM file ({_line(error)})") from error
        return None
    if "Rows" in header and "Columns" in header:
        return header
    if alone:
        raise UserError(f"{file} holds no image ({header.get('Modality', 'no modality')})")
    return None


def _info(path: Path, header: Any, arranged: Arrangement) -> ClipInfo:
    first = arranged.planes[0]
    matrix = arranged.matrix
    row, column = first.spacing or (None, None)
    files = tuple(dict.fromkeys(str(p.file) for p in arranged.planes))
    return ClipInfo(
        path=str(path),
        kind="video" if arranged.in_time else "volume",
        frames=len(arranged.planes),
        height=first.size[0],
        width=first.size[1],
        channels=int(header.get("SamplesPerPixel") or 1),
        spacing=(arranged.step, row, column),
        seconds_per_frame=arranged.seconds_per_frame,
        window=_window(header, first),
        affine=None if matrix is None else lps_to_ras(matrix),
        slots=arranged.slots,
        sources=files,
        source_frames=tuple(p.index for p in arranged.planes) if len(files) < len(arranged.planes) else None,
    )


def _window(header: Any, plane: Plane) -> tuple[float, float] | None:
    """Black and white by the header's first window, else by the bits of 8-bit images; MONOCHROME1 is shown inverted."""
    centre, width = (_one(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is not None and width:
        low, high = centre - width / 2, centre + width / 2
    elif header.get("BitsStored") == 8 or header.get("PhotometricInterpretation") == "MONOCHROME1":
        top = 2.0 ** int(header.BitsStored) - 1
        low, high = plane.intercept, top * plane.slope + plane.intercept
    else:
        return None
    return (high, low) if header.get("PhotometricInterpretation") == "MONOCHROME1" else (low, high)


def _one(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value if isinstance(value, str | float | int) else value[0])


def _size(plane: Plane) -> str:
    return f"{plane.size[0]} x {plane.size[1]}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
