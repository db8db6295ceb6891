"""MetaImage files, the format of ITK and of TrackRAD2025."""

from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Affine, Clip, ClipInfo
from vfmadapt.frames.space import lps_to_ras


class MetaImageClip(Clip):
    """A volume (column, row, slice), or a sequence (column, row, time), one frame at a time.

    ITK reads frames of uncompressed files in place. Compressed files, and those with time first, whose frames are
    interleaved, are read whole at the first frame and stay in memory from then on.

    Args:
        path: .mha or .mhd.
        kind: whether frames are slices or follow one another in time, which the file does not say.
        time_first: the file holds (time, column, row), as those of TrackRAD2025 do.
    """

    def __init__(self, path: Path, *, kind: Literal["volume", "video"] = "volume", time_first: bool = False) -> None:
        self._reader = SimpleITK.ImageFileReader()
        self._reader.SetFileName(str(path))
        try:
            self._reader.ReadImageInformation()
        except RuntimeError as error:
            raise UserError(f"{path} is not a readable MetaImage file; make a whole copy") from error
        size, spacing = self._reader.GetSize(), self._reader.GetSpacing()
        if len(size) not in (2, 3) or 0 in size:
            raise UserError(f"{path} has the shape {size}; wanted is (column, row) or (column, row, frame)")
        axes = (0, 1) if len(size) == 2 else (1, 2, 0) if time_first else (0, 1, 2)  # of columns, rows, frames
        size, spacing = (tuple(values[axis] for axis in axes) for values in (size, spacing))
        self._scattered = _compressed(path) or time_first or len(size) == 2
        self._axis = -1 if time_first else 0  # of the frames, in numpy's order
        self._whole: NDArray[np.generic] | None = None
        self.info = ClipInfo(
            path=str(path),
            kind=kind,
            frames=size[2] if len(size) == 3 else 1,
            height=size[1],
            width=size[0],
            channels=self._reader.GetNumberOfComponents(),
            spacing=(spacing[2] if kind == "volume" and len(size) == 3 else None, spacing[1], spacing[0]),
            window=(0.0, 255.0) if self._reader.GetPixelID() == SimpleITK.sitkUInt8 else None,
            affine=_affine(self._reader, axes) if len(size) == 3 else None,
        )

    def _read(self, index: int) -> NDArray[np.generic]:
        try:
            values = self._values(index)
        except RuntimeError as error:
            raise UserError(f"{self.info.path}: frame {index} cannot be read; make a whole copy") from error
        return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)

    def _values(self, index: int) -> NDArray[np.generic]:
        if self._scattered:
            if self._whole is None:
                whole = SimpleITK.GetArrayFromImage(self._reader.Execute())
                self._whole = whole if self._reader.GetDimension() == 3 else whole[None]
            return np.asarray(self._whole.take(index, axis=self._axis))
        self._reader.SetExtractIndex((0, 0, index))
        self._reader.SetExtractSize((self.info.width, self.info.height, 0))
        return np.asarray(SimpleITK.GetArrayFromImage(self._reader.Execute()))


def _compressed(path: Path) -> bool:
    with path.open("rb") as file:
        header = file.read(4096).lower()
    return any(line.replace(b" ", b"") == b"compresseddata=true" for line in header.splitlines())


def _affine(reader: SimpleITK.ImageFileReader, axes: tuple[int, ...]) -> Affine:
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    matrix[:3, 3] = reader.GetOrigin()
    return lps_to_ras(matrix[:, [*axes, 3]])
