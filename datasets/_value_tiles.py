"""Generated tiles as files: 8-bit RGB images and a map of one value."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._generated import GeneratedTiles, read_picture
from vfmadapt.datasets._tiles import Job, atomic

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

        if not 0 <= index < len(self):
            raise IndexError(index)
        image = read_picture(self.job.image(self.name, index))
        truth = torch.from_numpy(np.load(self.job.label(self.name, index)).astype(np.float32))
        common: Any = {
            "image": torch.from_numpy(image),
            "valid": torch.ones(truth.shape, dtype=torch.bool),
            "id": f"{self.name}/{index:05d}",
            "bands": ("red", "green", "blue"),
        }
        made: Any = common | ({"depth": truth} if self.kind == "depth" else {"values": truth[None]})
        return made


class GeneratedValues(GeneratedTiles):
    """Data source of drawn tiles with one value per pixel.

    Args:
        job: the tiles.
        spec: bands, the one value and statistics.
        write: see `GeneratedTiles`.
        workers: see `GeneratedTiles`.
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
        super().__init__(job, spec, write=write, workers=workers)
        self._tiles, self._kind = job, kind

    @property
    def values(self) -> "tuple[ValueSpec, ...]":
        """The value."""
        return self._spec.values

    def split(self, name: str) -> ValueTiles:
        """The tiles of "train", "val" or "test"; raises UserError for another name."""
        self.check_split(name)
        return ValueTiles(self._tiles, name, self._kind)
