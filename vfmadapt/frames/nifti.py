"""NIfTI volumes and image sequences."""

import gzip
import zlib
from io import IOBase
from pathlib import Path
from typing import IO, Literal, cast

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.frames._spool import spool
from vfmadapt.frames.clip import Clip, ClipInfo
from vfmadapt.frames.space import as_affine


class NiftiClip(Clip):
    """A file (column, row, slice), or (column, row, slice, time) of which one slice, or one moment, is taken.

    Frames come in the file's order and orientation, its scaling applied. A compressed file is decompressed once into
    a temporary file, in which slices are read in place.

    Args:
        path: .nii or .nii.gz.
        kind: "volume" or "video" where the third axis is slices or time; None: a volume, of four axes what is taken.
        slice: of four axes, the slice that is followed through time.
        time: of four axes, the moment whose slices are the frames.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: Literal["volume", "video"] | None = None,
        slice: int | None = None,
        time: int | None = None,
    ) -> None:
        self._file: IO[bytes] | None = None
        try:
            image = self._open(path)
        except (ImageFileError, HeaderDataError, WrapStructError, OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{path} is not a readable NIfTI file ({str(error).splitlines()[0]})") from error
        self._data = image.dataobj
        self._at = _places(path, image.shape, slice, time)
        self.info = self._info(path, image, kind)

    def _open(self, path: Path) -> nibabel.Nifti1Image:
        kind = nibabel.Nifti1Image if nibabel.Nifti1Image.path_maybe_image(path)[0] else nibabel.Nifti2Image
        if path.suffix != ".gz":
            return kind.from_filename(path)
        with gzip.open(path) as stream:
            self._file = spool(cast(IO[bytes], stream))
        holder = FileHolder(fileobj=cast(IOBase, self._file))
        return kind.from_file_map({"image": holder, "header": holder})

    def _info(self, path: Path, image: nibabel.Nifti1Image, kind: Literal["volume", "video"] | None) -> ClipInfo:
        shape, dtype = image.shape, image.get_data_dtype()
        if dtype.kind not in "buif" or 0 in shape:
            raise UserError(f"{path} holds {dtype} of shape {shape}; wanted are numbers, none of the sizes 0")
        along = 2 + self._at.index(None) if None in self._at else None
        kind = kind or ("video" if along == 3 else "volume")
        zooms = [float(z) or None for z in image.header.get_zooms()]
        steps = None if along is None else zooms[along]
        affine = np.array(image.affine)
        if along == 3 and self._at[0]:  # the affine begins at the slice that is followed
            affine[:3, 3] += affine[:3, 2] * self._at[0]
        return ClipInfo(
            path=str(path),
            kind=kind,
            frames=1 if along is None else shape[along],
            height=shape[1],
            width=shape[0],
            channels=1,
            spacing=(steps if kind == "volume" else None, zooms[1], zooms[0]),
            seconds_per_frame=_seconds(image, steps) if kind == "video" else None,
            window=(0.0, 255.0) if dtype == np.uint8 else None,
            affine=as_affine(affine),
            dims=4 if along == 3 else 3,
            assumed=not (int(image.header["qform_code"]) or int(image.header["sform_code"])),
        )

    def close(self) -> None:
        """Release the temporary file."""
        if self._file is not None:
            self._file.close()

    def _read(self, index: int) -> NDArray[np.generic]:
        at = tuple(index if place is None else place for place in self._at)
        return np.asarray(self._data[(slice(None), slice(None), *at)]).T[None]


def _places(path: Path, shape: tuple[int, ...], fixed_slice: int | None, time: int | None) -> tuple[int | None, ...]:
    """The index on each axis after the first two, None on the one along which the frames run."""
    if len(shape) < 2 or any(n > 1 for n in shape[4:]):
        raise UserError(f"{path} has the shape {shape}; wanted is (column, row, slice) or (column, row, slice, time)")
    if len(shape) < 4 or shape[3] == 1:
        if fixed_slice is not None or time is not None:
            raise UserError(f"{path} has the shape {shape}, one volume; slice= and time= are for files with four axes")
        return (None, *(0 for _ in shape[3:]))[: len(shape) - 2]
    if shape[2] == 1 and fixed_slice is None and time is None:
        fixed_slice = 0
    if (fixed_slice is None) == (time is None):
        raise UserError(
            f"{path} has {shape[2]} slices at {shape[3]} moments; give slice=0..{shape[2] - 1} to follow a slice "
            f"through time, or time=0..{shape[3] - 1} for the volume of a moment; tools take reader={{slice: 0}}"
        )
    name, at, count = ("time", time, shape[3]) if fixed_slice is None else ("slice", fixed_slice, shape[2])
    if at is None or not 0 <= at < count:
        raise UserError(f"{path}: {name}={at} is not there; allowed are 0 to {count - 1}")
    rest = (0 for _ in shape[4:])
    return (None, time, *rest) if fixed_slice is None else (fixed_slice, None, *rest)


def _seconds(image: nibabel.Nifti1Image, step: float | None) -> float | None:
    """Seconds between frames, where the header gives the step of time and its unit."""
    unit = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}.get(image.header.get_xyzt_units()[1])
    return None if unit is None or step is None else step * unit
