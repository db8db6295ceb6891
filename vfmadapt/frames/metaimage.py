"""MetaImage files, the format of ITK and of TrackRAD2025."""

import json
import zlib
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Literal

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Affine, Clip, ClipInfo
from vfmadapt.frames.frame_file import FrameFile, in_order
from vfmadapt.frames.space import lps_to_ras

_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
_PIECE = 1 << 20  # bytes that are decompressed at a time


class MetaImageClip(Clip):
    """A volume (column, row, slice), or a sequence (column, row, time), one frame at a time.

    ITK reads frames of uncompressed files in place. Compressed files, and those with time first, whose frames are
    interleaved, are written to a temporary file at the first frame, one frame after the other, and read there.

    Args:
        path: .mha or .mhd.
        kind: whether frames are slices or follow one another in time, which the file does not say.
        time_first: the file holds (time, column, row), as those of TrackRAD2025 do.
        seconds_per_frame: of a video, which the file does not say; None: what TrackRAD2025's CASE/frame-rate.json says
            of CASE/images/FILE, where there is one.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: Literal["volume", "video"] = "volume",
        time_first: bool = False,
        seconds_per_frame: float | None = None,
    ) -> None:
        self._reader = SimpleITK.ImageFileReader()
        self._reader.SetFileName(str(path))
        try:
            self._reader.ReadImageInformation()
        except RuntimeError as error:
            raise UserError(f"{path} is not a readable MetaImage file; make a whole copy") from error
        size, spacing = self._reader.GetSize(), self._reader.GetSpacing()
        if len(size) not in (2, 3) or 0 in size:
            raise UserError(f"{path} has the shape {size}; wanted is (column, row) or (column, row, frame)")
        if time_first and self._reader.GetNumberOfComponents() > 1:
            raise UserError(f"{path} is in colour; time_first= is for grey images, leave it out")
        if seconds_per_frame is not None and kind == "volume":
            raise UserError(f"{path}: seconds_per_frame= is for kind=video; leave it out for the slices of a volume")
        axes = (0, 1) if len(size) == 2 else (1, 2, 0) if time_first else (0, 1, 2)  # of columns, rows, frames
        size, spacing = (tuple(values[axis] for axis in axes) for values in (size, spacing))
        self._flat, self._time_first = len(size) == 2, time_first
        self._header, self._offset = _header(path)
        self._compressed = self._header.get("compresseddata", "").lower() == "true"
        self._stored: FrameFile | None = None
        self.info = ClipInfo(
            path=str(path),
            kind=kind,
            frames=size[2] if len(size) == 3 else 1,
            height=size[1],
            width=size[0],
            channels=self._reader.GetNumberOfComponents(),
            spacing=(spacing[2] if kind == "volume" and len(size) == 3 else None, spacing[1], spacing[0]),
            seconds_per_frame=_told(path) if kind == "video" and seconds_per_frame is None else seconds_per_frame,
            window=(0.0, 255.0) if self._reader.GetPixelID() == SimpleITK.sitkUInt8 else None,
            affine=_affine(self._reader, axes) if len(size) == 3 else None,
        )

    def close(self) -> None:
        """Release the temporary file."""
        if self._stored is not None:
            self._stored.close()

    def _read(self, index: int) -> NDArray[np.generic]:
        try:
            values = self._values(index)
        except (RuntimeError, ValueError, OSError, zlib.error) as error:
            raise UserError(f"{self.info.path}: frame {index} cannot be read; make a whole copy") from error
        return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)

    def _values(self, index: int) -> NDArray[np.generic]:
        if self._flat:
            return np.asarray(SimpleITK.GetArrayFromImage(self._reader.Execute()))
        if self._compressed or self._time_first:
            if self._stored is None:
                self._stored = self._in_order()
            return self._stored[index]
        self._reader.SetExtractIndex((0, 0, index))
        self._reader.SetExtractSize((self.info.width, self.info.height, 0))
        return np.asarray(SimpleITK.GetArrayFromImage(self._reader.Execute()))

    def _in_order(self) -> FrameFile:
        """The frames one after the other in a temporary file."""
        path, info, header = Path(self.info.path), self.info, self._header
        name, kind = header["elementdatafile"], header["elementtype"].upper().removesuffix("_ARRAY")
        local = name.upper() == "LOCAL"
        source = path if local else path.parent / name
        as_text = header.get("binarydata", "true").lower() != "true"
        if as_text or kind not in _TYPES or not source.is_file() or header.get("headersize", "0") != "0":
            raise UserError(f"{path}: its values are not in one plain file; let ITK write it as .mha again")
        most_first = "true" in (header.get(f"{n}byteordermsb", "").lower() for n in ("element", "binarydata"))
        dtype = np.dtype(_TYPES[kind]).newbyteorder(">" if most_first else "<")
        shape = (info.frames, *info.size, *((info.channels,) if info.channels > 1 else ()))
        with source.open("rb") as file:
            file.seek(self._offset if local else 0)
            if not self._time_first:
                return FrameFile(_inflated(file), shape, dtype)
            with _inflated(file) if self._compressed else file as values:
                return in_order(values, shape, dtype)


def _told(path: Path) -> float | None:
    """Seconds per frame, of the scan that CASE_frames2.mha names, by a file with frames per second in the case."""
    file = path.absolute().parent.parent / f"frame-rate{path.stem.partition('_frames')[2]}.json"
    if not file.is_file():
        return None
    try:
        rate = float(json.loads(file.read_text()))
    except (ValueError, TypeError):
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise UserError(f"{file} holds no frames per second; write one number above 0, or give seconds_per_frame=")
    return 1 / rate


def _header(path: Path) -> tuple[dict[str, str], int]:
    """The fields of a MetaImage header by their names in lower case, and where it ends."""
    fields = {}
    with path.open("rb") as file:
        for line in file:
            name, _, value = line.decode("latin-1").partition("=")
            fields[name.strip().lower()] = value.strip()
            if name.strip() == "ElementDataFile":  # the last
                break
        return fields, file.tell()


def _inflated(file: IO[bytes]) -> IO[bytes]:
    """What a zlib or gzip stream holds, in a temporary file that vanishes when it is closed, at its beginning."""
    made, inflater = TemporaryFile(), zlib.decompressobj(32 + zlib.MAX_WBITS)  # noqa: SIM115 - it belongs to the caller
    while not inflater.eof and (piece := file.read(_PIECE)):
        while piece:
            made.write(inflater.decompress(piece, _PIECE))
            piece = inflater.unconsumed_tail
    made.write(inflater.flush())
    made.seek(0)
    return made


def _affine(reader: SimpleITK.ImageFileReader, axes: tuple[int, ...]) -> Affine:
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    matrix[:3, 3] = reader.GetOrigin()
    return lps_to_ras(matrix[:, [*axes, 3]])
