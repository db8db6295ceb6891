"""Label maps as NIfTI that lies exactly on its source."""

import gzip
from collections.abc import Iterator
from contextlib import ExitStack
from io import BufferedIOBase
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from vfmadapt.files import atomic_path
from vfmadapt.frames.clip import ClipInfo
from vfmadapt.frames.frame_file import LabelFrames
from vfmadapt.frames.reading import ending


def write_nifti(path: str | Path, labels: LabelFrames, info: ClipInfo) -> Path:
    """Write labels (T, H, W) with the spacing, the affine and the axes of the clip that they belong to, frame by frame.

    A volume becomes (column, row, slice), with empty slices where the source lacks some; a clip in time, or of a file
    of four axes, (column, row, 1, time). Without an affine in the source the file says the spacing alone. `path` ends
    in .nii, or in .nii.gz and is compressed.
    """
    frames = info.frames if info.slots is None else max(info.slots) + 1
    in_time = info.kind == "video"
    shape = (info.width, info.height, *((1,) if in_time or info.dims == 4 else ()), frames)
    image = nibabel.Nifti1Image(np.broadcast_to(np.uint8(0), shape), info.affine)  # takes no memory; for the header
    _, row, column = info.spacing
    zooms = (column or 1.0, row or 1.0, info.spacing[0] or 1.0)
    if info.affine is None:
        image.header.set_zooms((*zooms, 1.0)[: image.ndim])
    if in_time:
        image.header.set_zooms((*image.header.get_zooms()[:3], info.seconds_per_frame or 1.0))
    image.header.set_xyzt_units("mm" if info.pixel_area else "unknown", "sec" if info.seconds_per_frame else "unknown")
    with atomic_path(path) as temporary, ExitStack() as stack:
        file: BufferedIOBase = stack.enter_context(temporary.open("wb"))
        if ending(Path(path)) == ".nii.gz":  # without a time stamp: the same labels give the same bytes
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0, compresslevel=6))
        _write(file, image.header, labels, info)
    return Path(path)


def _write(file: BufferedIOBase, header: nibabel.Nifti1Header, labels: LabelFrames, info: ClipInfo) -> None:
    """The header, then the frames as they are: NIfTI's first axis is the fastest, as columns are in (T, H, W)."""
    header.set_slope_inter(1, 0)
    header.write_to(file)
    for frame in _on_grid(labels, info):
        file.write(np.ascontiguousarray(frame, np.uint8).tobytes())


def _on_grid(labels: LabelFrames, info: ClipInfo) -> Iterator[NDArray[np.uint8]]:
    """The frames with empty ones between them where slices are missing."""
    if info.slots is None:
        yield from labels
        return
    at = {slot: index for index, slot in enumerate(info.slots)}
    for slot in range(max(info.slots) + 1):
        yield labels[at[slot]] if slot in at else np.zeros(info.size, np.uint8)
