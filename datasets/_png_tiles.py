"""Generated tiles as PNG files: 8-bit RGB images and their label masks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._generated import GeneratedTiles, read_picture
from vfmadapt.datasets._tiles import Job, atomic

if TYPE_CHECKING:  # processes that render do without torch
    from vfmadapt.contracts import DataSpec, Sample


@dataclass(frozen=True)
class PngJob(Job):
    """Tiles as PNG files, in folders as `data=geotiff_folder` reads them."""

    def image(self, split: str, index: int) -> Path:
        """Path of an image tile."""
        return self.folder / split / "images" / f"{index:05d}.png"

    def label(self, split: str, index: int) -> Path:
        """Path of a label tile."""
        return self.folder / split / "masks" / f"{index:05d}.png"

    def write(self, split: str, index: int, image: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
        """Write a tile: RGB (H, W, 3) and labels (H, W)."""
        from PIL import Image

        for path, pixels in ((self.image(split, index), image), (self.label(split, index), labels)):
            with atomic(path) as temporary:
                Image.fromarray(pixels).save(temporary)


@dataclass(frozen=True)
class PngTiles:
    """One split: index -> Sample, its image in 0..1.

    `labels`: stored label -> label given, where they differ.
    """

    job: PngJob
    name: str
    bands: tuple[str, ...]
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.job.counts[self.name]

    def __getitem__(self, index: int) -> "Sample":
        import torch
        from PIL import Image

        from vfmadapt.contracts import Sample

        if not 0 <= index < len(self):
            raise IndexError(index)
        image = read_picture(self.job.image(self.name, index))
        labels = np.asarray(Image.open(self.job.label(self.name, index)), dtype=np.int64)
        if self.labels is not None:
            labels = np.asarray(self.labels, dtype=np.int64)[labels]
        return Sample(
            image=torch.from_numpy(image),
            mask=torch.from_numpy(labels),
            valid=torch.ones(labels.shape, dtype=torch.bool),
            id=f"{self.name}/{index:05d}",
            bands=self.bands,
        )


class PngSource(GeneratedTiles):
    """Data source of drawn tiles with labels.

    Args:
        job: the tiles.
        spec: bands, classes and statistics.
        write: see `GeneratedTiles`.
        workers: see `GeneratedTiles`.
        labels: stored label -> label given, where they differ.
    """

    def __init__(
        self,
        job: PngJob,
        spec: "DataSpec",
        *,
        write: Callable[[Any, str, int], None],
        workers: int,
        labels: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(job, spec, write=write, workers=workers)
        self._tiles, self._labels = job, labels

    def split(self, name: str) -> PngTiles:
        """The tiles of "train", "val" or "test"; raises UserError for another name."""
        self.check_split(name)
        return PngTiles(self._tiles, name, self._spec.bands, self._labels)
