"""Label maps as NIfTI that lies exactly on its source."""

import gzip
from contextlib import ExitStack
from io import BufferedIOBase
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from vfmadapt.files import atomic_path
from vfmadapt.frames.clip import ClipInfo
from vfmadapt.frames.reading import ending


def write_nifti(path: str | Path, labels: NDArray[np.uint8], info: ClipInfo) -> Path:
    """Write labels (T, H, W) with the spacing, the affine and the axes of the clip that they belong to.

    A volume becomes (column, row, slice), with empty slices where the source lacks some; a clip in time, or of a file
    of four axes, (column, row, 1, time). Without an affine in the source the file says the spacing alone. `path` ends
    in .nii, or in .nii.gz and is compressed.
    """
    data = _on_grid(labels, info).transpose(2, 1, 0)
    in_time = info.kind == "video"
    image = nibabel.Nifti1Image(data[:, :, None] if in_time or info.dims == 4 else data, info.affine)
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
        image.to_stream(file)
    return Path(path)


def _on_grid(labels: NDArray[np.uint8], info: ClipInfo) -> NDArray[np.uint8]:
    if info.slots is None:
        return labels
    grid = np.zeros((max(info.slots) + 1, *labels.shape[1:]), dtype=np.uint8)
    grid[list(info.slots)] = labels
    return grid
