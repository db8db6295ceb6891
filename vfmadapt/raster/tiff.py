"""A cloud-optimised GeoTIFF out of tiles that are compressed already.

Header and directories first, then the tiles of the smallest overview, ..., of the full image last. What is not layout
(georeference, colours, names) is copied from a tiny file that GDAL writes. Always BigTIFF and band by band, so there
is one layout for every size; a tile that is void is left out (size 0), which readers see as nodata.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.raster.blocks import SIDE

Tag = tuple[int, int, bytes]
"""Type, count and value of a directory's entry."""

_BYTE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 12: 8, 16: 8}
_SHORT, _LONG, _LONG8 = 3, 4, 16
_COLOURS, _GDAL_NODATA = 320, 42113
# colours, scale and tie points, matrix, geo keys, GDAL's metadata and nodata, RPCs
_COPIED = (_COLOURS, 33550, 33922, 34264, 34735, 34736, 34737, 42112, _GDAL_NODATA, 50844)
_COPIED_TO_OVERVIEWS = (_COLOURS, _GDAL_NODATA)


@dataclass(frozen=True)
class Level:
    """The full image or an overview: size, bytes of each tile (bands, rows, columns), pixel type, how to read one."""

    height: int
    width: int
    sizes: NDArray[np.int64]
    dtype: np.dtype[Any]
    read: Callable[[int, int, int], bytes]


def read_tags(data: bytes) -> dict[int, Tag]:
    """The entries that are copied, from the first directory of a little-endian BigTIFF."""
    magic, version, _, _, at = struct.unpack_from("<2sHHHQ", data)
    if (magic, version) != (b"II", 43):
        raise ValueError("not a little-endian BigTIFF")
    found = {}
    for entry in range(struct.unpack_from("<Q", data, at)[0]):
        start = at + 8 + 20 * entry
        tag, kind, count = struct.unpack_from("<HHQ", data, start)
        if tag in _COPIED:
            size = _BYTE_SIZES[kind] * count
            where = start + 12 if size <= 8 else struct.unpack_from("<Q", data, start + 12)[0]
            found[tag] = (kind, count, data[where : where + size])
    return found


def write_tiff(path: Path, levels: list[Level], copied: Mapping[int, Tag]) -> None:
    """Write a file of one image and its overviews, `levels` from large to small, each half of the one before."""
    directories = [_tags(level, copied, overview=index > 0) for index, level in enumerate(levels)]
    starts = np.cumsum([16] + [_length(d, level) for d, level in zip(directories, levels, strict=True)])
    position = int(starts[-1])
    offsets: list[NDArray[np.int64]] = []
    for level in reversed(levels):
        sizes = level.sizes.ravel()
        ends = position + np.cumsum(sizes)
        offsets.insert(0, np.where(sizes > 0, ends - sizes, 0))
        position = int(ends[-1])
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16))
        for index, (directory, level) in enumerate(zip(directories, levels, strict=True)):
            following = int(starts[index + 1]) if index + 1 < len(levels) else 0
            file.write(_directory(directory | _places(level, offsets[index]), int(starts[index]), following))
        for level in reversed(levels):
            for band, row, column in np.argwhere(level.sizes > 0):
                file.write(level.read(int(band), int(row), int(column)))


def _tags(level: Level, copied: Mapping[int, Tag], *, overview: bool) -> dict[int, Tag]:
    """All entries but the places of the tiles."""
    bands = len(level.sizes)
    tags = {
        254: _longs(int(overview)),
        256: _longs(level.width),
        257: _longs(level.height),
        258: _shorts(*[8 * level.dtype.itemsize] * bands),
        259: _shorts(8),  # deflate
        262: _shorts(3 if _COLOURS in copied else 1),  # palette or grey
        277: _shorts(bands),
        284: _shorts(1 if bands == 1 else 2),  # band by band
        322: _longs(SIDE),
        323: _longs(SIDE),
    }
    if level.dtype.kind == "f":
        tags |= {317: _shorts(3), 339: _shorts(*[3] * bands)}  # predictor and sample format for floats
    elif level.dtype.itemsize > 1:
        tags[317] = _shorts(2)
    if bands > 1:
        tags[338] = _shorts(*[0] * (bands - 1))  # what the other bands are is not said
    return tags | {k: v for k, v in copied.items() if not overview or k in _COPIED_TO_OVERVIEWS}


def _places(level: Level, offsets: NDArray[np.int64]) -> dict[int, Tag]:
    return {
        324: (_LONG8, offsets.size, offsets.astype("<u8").tobytes()),
        325: (_LONG, offsets.size, level.sizes.ravel().astype("<u4").tobytes()),
    }


def _length(directory: Mapping[int, Tag], level: Level) -> int:
    values = [len(value) for _, _, value in directory.values()] + [8 * level.sizes.size, 4 * level.sizes.size]
    return 16 + 20 * len(values) + sum(_padded(n) for n in values if n > 8)


def _directory(tags: Mapping[int, Tag], start: int, following: int) -> bytes:
    entries, values = [], []
    at = start + 16 + 20 * len(tags)
    for tag in sorted(tags):
        kind, count, value = tags[tag]
        if len(value) > 8:
            entries.append(struct.pack("<HHQQ", tag, kind, count, at))
            values.append(value.ljust(_padded(len(value)), b"\0"))
            at += len(values[-1])
        else:
            entries.append(struct.pack("<HHQ8s", tag, kind, count, value))
    return struct.pack("<Q", len(tags)) + b"".join(entries) + struct.pack("<Q", following) + b"".join(values)


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _shorts(*values: int) -> Tag:
    return _SHORT, len(values), struct.pack(f"<{len(values)}H", *values)


def _longs(*values: int) -> Tag:
    return _LONG, len(values), struct.pack(f"<{len(values)}I", *values)
