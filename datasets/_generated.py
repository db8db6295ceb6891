"""What generated data sets share: tiles that are rendered where they are missing, and their pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._tiles import SPLITS, Job, write_missing
from vfmadapt.errors import UserError

if TYPE_CHECKING:  # processes that render do without torch
    from vfmadapt.contracts import DataSpec


class GeneratedTiles:
    """What data sources of drawn tiles share; `prepare` renders those that are not there yet.

    Args:
        job: the tiles.
        spec: bands, what a tile holds, and statistics.
        write: renders and writes the tile (job, split, index); a function at the top of a module.
        workers: processes that render; 0 takes one per core, at most 8.
    """

    def __init__(self, job: Job, spec: "DataSpec", *, write: Callable[[Any, str, int], None], workers: int) -> None:
        self._job, self._spec, self._write, self._workers = job, spec, write, workers

    @property
    def spec(self) -> "DataSpec":
        """Bands, what a tile holds, and statistics."""
        return self._spec

    @property
    def folder(self) -> Path:
        """Where the tiles are, each split in a folder of its own."""
        return self._job.folder

    def prepare(self) -> None:
        """Render the tiles that are missing; does nothing where all are there."""
        write_missing(self._job, self._write, self._workers)

    def check_split(self, name: str) -> None:
        """Raise UserError unless a split has this name."""
        if name not in SPLITS:
            source = self._spec.name.partition("@")[0]
            raise UserError(f"{source} has no split {name!r}: choose one of {', '.join(SPLITS)}")


def read_picture(path: Path) -> NDArray[np.float32]:
    """A tile's image (3, H, W) in 0..1; raises UserError where it was not rendered."""
    from PIL import Image

    if not path.exists():
        raise UserError(f"{path} is not there: call prepare() of the data source first")
    return np.ascontiguousarray((np.asarray(Image.open(path), dtype=np.float32) / np.float32(255)).transpose(2, 0, 1))
