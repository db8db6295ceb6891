"""What a reader of frames gives: facts about the clip, and one frame at a time.

T frames, C channels, H W pixels. Frames of a volume are its slices, in the order in which they are stored.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError

log = logging.getLogger(__name__)

Frame = NDArray[np.float32]
Window = tuple[float, float]
"""The values that are shown black and white."""
Affine = tuple[tuple[float, float, float, float], ...]

_SHOWN = 8  # frames whose values tell the range of the whole clip where the file does not
_TAILS = (0.5, 99.5)  # per cent: a few bright voxels (implants, markers) must not darken the rest
_AIR = (-1100.0, -800.0)  # Hounsfield units of what a CT begins with; below lies only what scanners pad corners with
_SOFT_TISSUE = (-160.0, 240.0)  # Hounsfield units: level 40, width 400, as MedSAM2's CT data are shown


@dataclass(frozen=True)
class ClipInfo:
    """Facts about a clip, for those who show, measure or write what belongs to it.

    `kind`: the frames are slices of a "volume", or follow one another in time ("video"). `spacing`: millimetres from
    frame to frame (None in time), row to row and column to column; None where unknown. `window`: the values that are
    shown black and white, None where the file does not say. `affine`: rows of the 4 x 4 matrix from (column, row,
    frame, 1) to millimetres in NIfTI's RAS+ axes; in time its third column is of no meaning. `dims` is 4 where the file
    holds (column, row, slice, time). `assumed`: the affine is a convention, the file itself does not say where it lies.
    `slots`: places of the frames on an even grid along the volume's axis, where slices are missing between them.
    `sources`: the DICOM files in frame order; where one holds all frames, `source_frames` says which of its frames each
    is.
    """

    path: str
    kind: Literal["volume", "video"]
    frames: int
    height: int
    width: int
    channels: int
    spacing: tuple[float | None, float | None, float | None] = (None, None, None)
    seconds_per_frame: float | None = None
    window: Window | None = None
    affine: Affine | None = None
    dims: int = 3
    assumed: bool = False
    slots: tuple[int, ...] | None = None
    sources: tuple[str, ...] = ()
    source_frames: tuple[int, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    @property
    def upright(self) -> tuple[bool, bool]:
        """Whether rows, and columns, must be reversed to show the patient as radiologists do.

        That is: rows run to the back or the feet, columns to the patient's left or back, all of them negative in RAS+.
        """
        if self.affine is None:
            return False, False
        column, row = (max((line[axis] for line in self.affine[:3]), key=abs) for axis in (0, 1))
        return row > 0, column > 0

    @property
    def pixel_area(self) -> float | None:
        """Square millimetres of a pixel, None where unknown."""
        _, row, column = self.spacing
        return None if row is None or column is None else row * column


class Clip:
    """A source of frames that holds few of them at a time; also a context manager. Subclasses read a format.

    Raises:
        UserError: from the constructor, that the file cannot be read or holds no frame.
    """

    info: ClipInfo

    def __len__(self) -> int:
        return self.info.frames

    def __enter__(self) -> "Clip":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what is open; closing twice is no error."""

    def frame(self, index: int) -> Frame:
        """Frame `index`, (C, H, W) in the units of the source: Hounsfield units, 0..255 of 8-bit files and so on.

        What is not finite becomes the least finite value of the frame.

        Raises:
            UserError: there is no such frame, it is damaged, or its size is not that of the others.
        """
        if not 0 <= index < self.info.frames:
            raise UserError(
                f"{self.info.path}: there is no frame {index}; it has {self.info.frames}, counted from 0 to "
                f"{self.info.frames - 1}"
            )
        values = np.ascontiguousarray(self._read(index), dtype=np.float32)
        wanted = (self.info.channels, self.info.height, self.info.width)
        if values.shape != wanted:
            raise UserError(
                f"{self.info.path}: frame {index} has {_shape(values.shape)}, the first {_shape(wanted)}; all frames "
                "of a clip must be of one size"
            )
        return self._finite(values, index)

    def iterate(self, start: int = 0, stop: int | None = None, step: int = 1) -> Iterator[tuple[int, Frame]]:
        """(index, frame) for the indices of range(start, stop, step), one at a time; `stop` None: to the end.

        A negative step runs backwards, with `stop` None to frame 0.
        """
        end = (self.info.frames if step > 0 else -1) if stop is None else stop
        for index in range(start, end, step):
            yield index, self.frame(index)

    def window(self) -> Window:
        """The values to be shown black and white: those of `show` or of the file, else from some frames.

        Where the least are those of air in CT, soft tissue is shown, -160 to 240 Hounsfield units: from air to bone is
        so far that no organ would stand out. Else 0.5 % are left out at either end.
        """
        if self.info.window is not None:
            return self.info.window
        indices = np.unique(np.linspace(0, self.info.frames - 1, _SHOWN).astype(int))
        values = np.stack([self.frame(int(i)) for i in indices])
        if _is_ct(values):
            return _SOFT_TISSUE
        low, high = np.percentile(values, _TAILS)
        return float(low), float(max(high, low + 1e-6))

    def show(self, window: Window) -> None:
        """Make these the values that are shown black and white, whatever the file says."""
        self.info = replace(self.info, window=window)

    def _read(self, index: int) -> NDArray[np.generic]:
        """Frame `index` as stored, (C, H, W)."""
        raise NotImplementedError  # abstract

    def _finite(self, values: Frame, index: int) -> Frame:
        known = np.isfinite(values)
        if known.all():
            return values
        log.warning("%s: frame %d holds values that are not finite; taken as its least value", self.info.path, index)
        least = values[known].min() if known.any() else np.float32(0)
        return np.where(known, values, least)


def _is_ct(values: NDArray[np.float32]) -> bool:
    """Whether values are Hounsfield units, as their least tell: those of air, but for padding beyond the scanned."""
    least = values.min()
    inside = values[values > least] if least < _AIR[0] else values
    return inside.size > 0 and bool(_AIR[0] <= np.percentile(inside, _TAILS[0]) <= _AIR[1])


def _shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height} x {width} pixels and {channels} channels"
