"""Clips in NPZ files: an array of frames, with spacing, direction and origin where they are known."""

import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.frames._spool import spool
from vfmadapt.frames.clip import Affine, Clip, ClipInfo
from vfmadapt.frames.frame_file import FrameFile, in_order
from vfmadapt.frames.space import lps_to_ras

IMAGE_KEYS = ("imgs", "image", "images", "frames", "video", "volume")
MASK_KEYS = ("gts", "mask", "masks", "labels", "label")

_COLOURS = (1, 3, 4)  # sizes that a last axis of channels has


class NpzClip(Clip):
    """An array (T, H, W), (T, H, W, C) or (T, C, H, W) under one key.

    Keys beside it, as MedSAM2's volumes have them: `spacing` (column, row, slice) in mm, `direction` (9 cosines) and
    `origin` (3, mm) in LPS+ axes as ITK writes them, `seconds_per_frame`. The array is decompressed once into a
    temporary file, in which frames are read in place.

    Args:
        path: the .npz file.
        key: the array's key; None takes the first of imgs, image, images, frames, video and volume, else the only
            array of three or four axes.
        kind: "volume" or "video"; None: a video where `seconds_per_frame` is given.
    """

    def __init__(self, path: Path, *, key: str | None = None, kind: Literal["volume", "video"] | None = None) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                chosen = _key(path, [Path(n).stem for n in archive.namelist()], key)
                facts = {n: _small(archive, n) for n in ("spacing", "direction", "origin", "seconds_per_frame")}
                with archive.open(f"{chosen}.npy") as member:
                    self._shape, self._turned, self._dtype = _header(member)
                    self.info = self._info(path, chosen, facts, kind)
                    self._frames = self._stored(member)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is not a readable .npz file ({error})") from error

    def _info(self, path: Path, key: str, facts: dict[str, Any], kind: Literal["volume", "video"] | None) -> ClipInfo:
        shape = self._shape
        if len(shape) not in (3, 4) or 0 in shape or self._dtype.kind not in "buif":
            raise UserError(
                f"{path}: {key} is {self._dtype} of shape {shape}; wanted are numbers of shape (T, H, W), "
                "(T, H, W, C) or (T, C, H, W), none of them 0"
            )
        self._last = len(shape) == 4 and shape[-1] in _COLOURS
        frames, *rest = shape[:1] + (1,) * (len(shape) == 3) + shape[1:]
        height, width, channels = rest if self._last else (rest[1], rest[2], rest[0])
        seconds = facts["seconds_per_frame"]
        kind = kind or ("volume" if seconds is None else "video")
        column, row, step = (None, None, None) if facts["spacing"] is None else map(float, facts["spacing"].ravel())
        return ClipInfo(
            path=str(path),
            kind=kind,
            frames=frames,
            height=height,
            width=width,
            channels=channels,
            spacing=(step if kind == "volume" else None, row, column),
            seconds_per_frame=None if seconds is None else float(seconds),
            window=(0.0, 255.0) if self._dtype == np.uint8 else None,
            affine=_affine(facts),
        )

    def _stored(self, member: IO[bytes]) -> FrameFile:
        """The frames on disk; with the axes of each reversed where numpy stored the array in Fortran's order."""
        if self._turned:
            return in_order(member, (self._shape[0], *self._shape[:0:-1]), self._dtype)
        return FrameFile(spool(member), self._shape, self._dtype)

    def close(self) -> None:
        """Release the temporary file."""
        self._frames.close()

    def _read(self, index: int) -> NDArray[np.generic]:
        values = self._frames[index].T if self._turned else self._frames[index]
        return values.transpose(2, 0, 1) if self._last else values.reshape(-1, *values.shape[-2:])


def _key(path: Path, names: list[str], key: str | None) -> str:
    if key is None:
        key = next((k for k in IMAGE_KEYS if k in names), names[0] if len(names) == 1 else None)
    if key not in names:
        raise UserError(
            f"{path} has the keys {', '.join(names)}; "
            f"frames are looked for under {key or ', '.join(IMAGE_KEYS)}; name one of the keys with key="
        )
    return key


def _small(archive: zipfile.ZipFile, name: str) -> NDArray[Any] | None:
    if f"{name}.npy" not in archive.namelist():
        return None
    with archive.open(f"{name}.npy") as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type of an .npy file, which stands at its values then."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers")
    return shape, fortran, dtype


def _affine(facts: dict[str, Any]) -> Affine | None:
    if facts["spacing"] is None or facts["direction"] is None:
        return None
    matrix = np.eye(4)
    matrix[:3, :3] = np.asarray(facts["direction"], dtype=float).reshape(3, 3) * facts["spacing"]
    matrix[:3, 3] = 0 if facts["origin"] is None else facts["origin"]
    return lps_to_ras(matrix)
