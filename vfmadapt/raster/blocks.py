"""The file of a finished block: compressed tiles of the final map, statistics and a checksum.

Layout: magic, length of the header (8 bytes), header (JSON), tiles, SHA-256 of all that. A tile is 512 x 512 bytes of
one band, deflated as in a TIFF, so that the map can be put together without compressing again. The header holds no
time and no machine: the same block has the same bytes wherever it was computed.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vfmadapt.raster.write import NODATA, atomic_path

SIDE = 512
"""Side of the tiles of every map that we write."""

_MAGIC = b"vfmblk1\n"


@dataclass(frozen=True)
class Block:
    """A finished block.

    `counts`: pixels by label, `NODATA` included; `forwarded`: tiles that went through the model; `sizes` by file: the
    bytes of each tile, (bands, rows, columns), 0 where a tile is void and left out.
    """

    plan: str
    index: int
    counts: tuple[int, ...]
    forwarded: int
    sizes: Mapping[str, NDArray[np.int64]]


class DamagedError(Exception):
    """A block's file is not what was written."""


def compress(tile: NDArray[np.uint8]) -> bytes:
    """Deflate a tile (SIDE, SIDE); empty where all of it is void.

    Run lengths only: on maps of classes as small as the best level and several times faster.
    """
    if (tile == NODATA).all():
        return b""
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return packer.compress(np.ascontiguousarray(tile).data) + packer.flush()


def decompress(data: bytes) -> NDArray[np.uint8]:
    """The inverse of `compress`."""
    if not data:
        return np.full((SIDE, SIDE), NODATA, dtype=np.uint8)
    return np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(SIDE, SIDE)


def write_block(path: Path, block: Block, tiles: Mapping[str, list[bytes]]) -> None:
    """Write a block; `tiles` by layer, in the order of `block.sizes`. The file appears complete or not at all."""
    header = json.dumps(
        {
            "plan": block.plan,
            "index": block.index,
            "counts": block.counts,
            "forwarded": block.forwarded,
            "sizes": {name: sizes.tolist() for name, sizes in block.sizes.items()},
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
    block = Block(fields["plan"], fields["index"], tuple(fields["counts"]), fields["forwarded"], sizes)
    return block, start + length
