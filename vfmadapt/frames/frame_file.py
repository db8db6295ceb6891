"""Frames in a file on disk, read and written where they lie, so that memory holds one of them at a time."""

import math
import os
import weakref
from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

_BLOCK = 32 << 20  # bytes of interleaved frames that are put in order at a time


class LabelFrames(Protocol):
    """Label maps uint8 (H, W) of T frames: an array (T, H, W), or a `FrameFile` of them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, H, W)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.uint8]: ...

    def __iter__(self) -> Iterator[NDArray[np.uint8]]: ...


class FrameFile:
    """T frames of one shape and type, one after the other in a file.

    A memory map would be shorter, but all pages that it has touched stay in memory, which then grows with the clip.
    Each access names its place, so that processes forked with the file open do not move one another's.

    Args:
        file: open for reading, and for writing where frames are set; it is closed with this object.
        shape: (T, ...).
        dtype: of the values.
        offset: bytes before the first frame.

    Raises:
        ValueError: the file holds fewer frames.
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: DTypeLike, offset: int = 0) -> None:
        self.shape, self.dtype, self._offset = shape, np.dtype(dtype), offset
        self._bytes = math.prod(shape[1:]) * self.dtype.itemsize
        self._file = file
        weakref.finalize(self, file.close)
        held = os.fstat(file.fileno()).st_size - offset
        if held < shape[0] * self._bytes:
            raise ValueError(f"it holds {max(held, 0) // self._bytes} whole frames of {shape[0]}")

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: DTypeLike) -> "FrameFile":
        """Frames of zeros in a temporary file that vanishes with the object."""
        file = TemporaryFile(buffering=0)  # noqa: SIM115 - it belongs to the object
        file.truncate(math.prod(shape) * np.dtype(dtype).itemsize)
        return cls(file, shape, dtype)

    def close(self) -> None:
        """Close the file, which removes a temporary one; closing twice is no error."""
        self._file.close()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray[Any]:
        values = np.empty(self.shape[1:], self.dtype)
        if os.preadv(self._file.fileno(), [values.data], self._place(index)) < self._bytes:
            raise OSError(f"frame {index} of {len(self)} is no longer there")
        return values

    def __setitem__(self, index: int, values: NDArray[np.generic]) -> None:
        self.put(index, np.broadcast_to(values, self.shape[1:]))

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))

    def put(self, index: int, values: NDArray[np.generic], start: int = 0) -> None:
        """Write some values of frame `index`, in the order of a flat frame from value `start` on."""
        place = self._place(index) + start * self.dtype.itemsize
        left = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8)
        while len(left):  # a disk that gets full takes a part, and says so the next time
            written = os.pwrite(self._file.fileno(), left.data, place)
            left, place = left[written:], place + written

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        return self._offset + int(index) * self._bytes


def in_order(stream: IO[bytes], shape: tuple[int, ...], dtype: DTypeLike) -> FrameFile:
    """Frames (T, ...) of a stream that interleaves them, so holds (..., T), one after the other in a temporary file.

    Raises:
        ValueError: the stream ends before.
    """
    frames, pixels, dtype = shape[0], math.prod(shape[1:]), np.dtype(dtype)
    made = FrameFile.zeros(shape, dtype)
    most = max(1, _BLOCK // (frames * dtype.itemsize))
    for start in range(0, pixels, most):
        count = min(most, pixels - start)
        held = stream.read(count * frames * dtype.itemsize)
        block = np.frombuffer(held, dtype).reshape(count, frames)  # ValueError where it is too short
        for index, values in enumerate(block.T):
            made.put(index, values, start)
    return made
