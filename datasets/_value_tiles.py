"""Generated tiles as files: 8-bit RGB images and a map of one value."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._tiles import SPLITS, Job, atomic, write_missing
from vfmadapt.errors import UserError

if TYPE_CHECKING:  # processes that render do without torch
    from vfmadapt.contracts import DataSpec, DepthSample, ValueSample, ValueSpec


@dataclass(frozen=True)
class ValueJob(Job):
    """Tiles as `<split>/images/<index>.png` and `<split>/values/<index>.npy` (float16)."""

    def image(self, split: str, index: int) -> Path:
        """Path of an image tile."""
        return self.folder / split / "images" / f"{index:05d}.png"

    def label(self, split: str, index: int) -> Path:
        """Path of a tile's values."""
        return self.folder / split / "values" / f"{index:05d}.npy"

    def write(self, split: str, index: int, image: NDArray[np.uint8], values: NDArray[np.float32]) -> None:
        """Write a tile: RGB (H, W, 3) and values (H, W)."""
        from PIL import Image

        with atomic(self.image(split, index)) as temporary:
            Image.fromarray(image).save(temporary)
        with atomic(self.label(split, index)) as temporary:
            np.save(temporary, values.astype(np.float16))


@dataclass(frozen=True)
class ValueTiles:
    """One split: index -> ValueSample or DepthSample, its image in 0..1."""

    job: ValueJob
    name: str
    kind: Literal["values", "depth"]

    def __len__(self) -> int:
        return self.job.counts[self.name]

    def __getitem__(self, index: int) -> "ValueSample | DepthSample":
        import torch
        from PIL import Image

        if not 0 <= index < len(self):
            raise IndexError(index)
        path = self.job.image(self.name, index)
        if not path.exists():
            raise UserError(f"{path} is not there: call prepare() of the data source first")
        pixels = np.asarray(Image.open(path), dtype=np.float32) / np.float32(255)
        truth = torch.from_numpy(np.load(self.job.label(self.name, index)).astype(np.float32))
        common: Any = {
            "image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
            "valid": torch.ones(truth.shape, dtype=torch.bool),
            "id": f"{self.name}/{index:05d}",
            "bands": ("red", "green", "blue"),
        }
        made: Any = common | ({"depth": truth} if self.kind == "depth" else {"values": truth[None]})
        return made


class GeneratedValues:
    """Data source of tiles that are drawn; `prepare` renders those that are not there yet.

    Args:
        job: the tiles.
        spec: bands, the one value and statistics.
        write: renders and writes the tile (job, split, index); a function at the top of a module.
        workers: processes that render; 0 takes one per core, at most 8.
        kind: whether the value is a depth.
    """

    def __init__(
        self,
        job: ValueJob,
        spec: "DataSpec",
        *,
        write: Callable[[Any, str, int], None],
        workers: int,
        kind: Literal["values", "depth"] = "values",
    ) -> None:
        self._job, self._spec, self._write, self._workers, self._kind = job, spec, write, workers, kind

    @property
    def spec(self) -> "DataSpec":
        """Bands, the value and statistics."""
        return self._spec

    @property
    def values(self) -> "tuple[ValueSpec, ...]":
        """The value."""
        return self._spec.values

    @property
    def folder(self) -> Path:
        """Where the tiles are: `<split>/images/<index>.png` and `<split>/values/<index>.npy`."""
        return self._job.folder

    def prepare(self) -> None:
        """Render the tiles that are missing; does nothing where all are there."""
        write_missing(self._job, self._write, self._workers)

    def split(self, name: str) -> ValueTiles:
        """The tiles of "train", "val" or "test".

        Raises:
            UserError: another name.
        """
        if name not in SPLITS:
            source = self._spec.name.partition("@")[0]
            raise UserError(f"{source} has no split {name!r}: choose one of {', '.join(SPLITS)}")
        return ValueTiles(self._job, name, self._kind)
