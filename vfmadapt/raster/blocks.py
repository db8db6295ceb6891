"""The file of a finished block: compressed tiles of the final map, statistics and a checksum.

Layout: magic, length of the header (8 bytes), header (JSON), tiles, SHA-256 of all that. A tile is 512 x 512 pixels of
one band, compressed as in a TIFF, so that the map can be put together without compressing again. The header holds no
time and no machine: the same block has the same bytes wherever it was computed.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vfmadapt.files import atomic_path
from vfmadapt.raster.write import nodata_of

SIDE = 512
"""Side of the tiles of every map that we write."""

DTYPES: Mapping[str, DTypeLike] = {"class": np.uint8, "scores": np.uint8, "value": np.float32, "object": np.int64}
"""Type of the pixels of each file that we write; objects are numbered anew, as uint32, when all blocks are there."""

_MAGIC = b"vfmblk1\n"


@dataclass(frozen=True)
class Block:
    """A finished block.

    `counts`: pixels by label, `NODATA` included, in a map of values all with data at label 0; `moments`: of each value
    (see `moments.py`); `forwarded`: tiles that went through the model; `sizes` by file: the bytes of each tile, (bands,
    rows, columns), 0 where a tile is void and left out. In a map of objects: `objects`, the keys of those that have a
    pixel in the window, ascending; `links` (n, 2), pairs of keys that are one object (see `objects.py`); pixels in an
    object count at label 1.
    """

    plan: str
    index: int
    counts: tuple[int, ...]
    forwarded: int
    sizes: Mapping[str, NDArray[np.int64]]
    moments: NDArray[np.float64]
    objects: NDArray[np.int64]
    links: NDArray[np.int64]


class DamagedError(Exception):
    """A block's file is not what was written."""


def is_void(pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """Where pixels of a map hold no data."""
    return np.isnan(pixels) if pixels.dtype.kind == "f" else pixels == nodata_of(pixels.dtype)


def compress(tile: NDArray[Any]) -> bytes:
    """Deflate a tile (SIDE, SIDE), floats after TIFF's predictor 3, wide integers after 2; empty where all is void.

    Run lengths only: on maps of classes as small as the best level and several times faster, on predicted floats half
    the time for a twentieth more bytes.
    """
    if is_void(tile).all():
        return b""
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    if tile.dtype.kind == "f":
        stored = _predicted(tile)
    elif tile.dtype.itemsize > 1:
        stored = np.diff(tile.astype(tile.dtype.newbyteorder("<")), axis=1, prepend=tile.dtype.type(0))
    else:
        stored = np.ascontiguousarray(tile)
    return packer.compress(stored.data) + packer.flush()


def decompress(data: bytes, dtype: DTypeLike) -> NDArray[Any]:
    """The inverse of `compress`, for tiles of a type."""
    dtype = np.dtype(dtype)
    if not data:
        return np.full((SIDE, SIDE), nodata_of(dtype), dtype=dtype)
    stored = np.frombuffer(zlib.decompress(data), dtype=np.uint8)
    if dtype.kind != "f" and dtype.itemsize > 1:
        steps = stored.view(dtype.newbyteorder("<")).reshape(SIDE, SIDE)
        return np.cumsum(steps, axis=1, dtype=dtype)
    if dtype.kind != "f":
        return stored.reshape(SIDE, SIDE)
    planes = np.cumsum(stored.reshape(SIDE, -1), axis=1, dtype=np.uint8).reshape(SIDE, -1, SIDE)
    values = np.ascontiguousarray(planes[:, ::-1].transpose(0, 2, 1)).view(dtype.newbyteorder("<"))
    return values.reshape(SIDE, SIDE)


def _predicted(tile: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Predictor 3: of a row first the highest bytes of all floats, ..., last the lowest; each less the one before."""
    values = np.ascontiguousarray(tile, dtype=tile.dtype.newbyteorder("<"))
    planes = values.view(np.uint8).reshape(SIDE, SIDE, -1)[..., ::-1].transpose(0, 2, 1).reshape(SIDE, -1)
    return np.diff(planes, axis=1, prepend=np.uint8(0))


def write_block(path: Path, block: Block, tiles: Mapping[str, list[bytes]]) -> None:
    """Write a block; `tiles` by layer, in the order of `block.sizes`. The file appears complete or not at all."""
    header = json.dumps(
        {
            "plan": block.plan,
            "index": block.index,
            "counts": block.counts,
            "forwarded": block.forwarded,
            "sizes": {name: sizes.tolist() for name, sizes in block.sizes.items()},
            "moments": block.moments.tolist(),
            "objects": block.objects.tolist(),
            "links": block.links.tolist(),
        }
    ).encode()
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for part in (_MAGIC, len(header).to_bytes(8, "little"), header, *(t for band in tiles.values() for t in band)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())


def read_block(path: Path) -> tuple[Block, int]:
    """A block and the offset of its first tile in the file.

    Raises:
        DamagedError: the checksum is wrong.
        FileNotFoundError: there is no such block.
    """
    digest, start = hashlib.sha256(), len(_MAGIC) + 8
    with path.open("rb") as file:
        size = path.stat().st_size - digest.digest_size
        head = file.read(start)
        length = int.from_bytes(head[len(_MAGIC) :], "little")
        if not head.startswith(_MAGIC) or start + length > size:
            raise DamagedError(f"{path.name} is no block")
        header = file.read(length)
        digest.update(head + header)
        left = size - start - length
        while left:
            part = file.read(min(left, 1 << 20))
            digest.update(part)
            left -= len(part)
        if file.read() != digest.digest():
            raise DamagedError(f"{path.name} has a wrong checksum")
    fields = json.loads(header)
    sizes = {name: np.asarray(values, dtype=np.int64) for name, values in fields["sizes"].items()}
    moments = np.asarray(fields["moments"], dtype=np.float64).reshape(-1, 4)
    objects = np.asarray(fields["objects"], dtype=np.int64)
    links = np.asarray(fields["links"], dtype=np.int64).reshape(-1, 2)
    counts = tuple(fields["counts"])
    block = Block(fields["plan"], fields["index"], counts, fields["forwarded"], sizes, moments, objects, links)
    return block, start + length
