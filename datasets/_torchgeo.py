"""Published aerial data sets: TorchGeo knows their folders and splits; pixels are read here, part by part.

TorchGeo itself would load a mosaic of 6000 x 6000 pixels for every window that is trained on, take colours outside the
code for background, and drop where the images lie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.contracts import IGNORE_INDEX, ClassSpec, DataSpec, Sample, Samples
from vfmadapt.datasets._pairs import split_of
from vfmadapt.datasets._statistics import FILES, band_statistics
from vfmadapt.errors import UserError
from vfmadapt.raster.io import open_raster, raster_info
from vfmadapt.raster.tiling import Area

SPLITS = ("train", "val", "test")
_MIDDLE = 127  # of a channel; the colours of the code are corners of the RGB cube

Files = Sequence[tuple[Path, Path]]


class LabelReader(Protocol):
    """Reads part of a mask file as labels 0..K-1 and IGNORE_INDEX."""

    def __call__(self, path: Path, area: Area) -> NDArray[np.int64]:
        """Labels (h, w) of an area."""


@dataclass(frozen=True)
class Numbers:
    """Masks of one band; `labels`: of the values 0, 1, ..."""

    labels: tuple[int, ...]

    def __call__(self, path: Path, area: Area) -> NDArray[np.int64]:
        """Labels (h, w) of an area."""
        with open_raster(path) as raster:
            values, _ = raster.read_labels(area=area)
        if values.max() >= len(self.labels):
            raise UserError(f"{path} holds the value {values.max()}; allowed are 0 to {len(self.labels) - 1}")
        return np.asarray(self.labels, dtype=np.int64)[values]


@dataclass(frozen=True)
class Colours:
    """Masks of three bands in the colours of the classes; black, as eroded borders are, is ignored.

    A channel counts as on above the middle: some of the published masks are a few grey levels off.
    """

    classes: tuple[ClassSpec, ...]

    def __call__(self, path: Path, area: Area) -> NDArray[np.int64]:
        """Labels (h, w) of an area."""
        with open_raster(path) as raster:
            pixels, _ = raster.read(
                (1, 2, 3), row=area.row, column=area.column, height=area.height, width=area.width, scale=1.0
            )
        table = np.full(8, -1, dtype=np.int64)
        table[0] = IGNORE_INDEX
        for label, entry in enumerate(self.classes):
            table[_corner(np.asarray(entry.colour))] = label
        labels = np.asarray(table[_corner(pixels)])
        if (labels < 0).any():
            y, x = np.argwhere(labels < 0)[0]
            raise UserError(
                f"{path} holds the colour {pixels[:, y, x].astype(int).tolist()}; "
                f"allowed are {', '.join(f'{c.name} {list(c.colour)}' for c in self.classes)} and black"
            )
        return labels


def _corner(pixels: NDArray[Any]) -> NDArray[np.int64]:
    """Colours (3, ...) -> the number of the nearest corner of the RGB cube."""
    red, green, blue = (pixels > _MIDDLE).astype(np.int64)
    return np.asarray(4 * red + 2 * green + blue)


@dataclass(frozen=True)
class _Part:
    id: str
    image: Path
    mask: Path
    area: Area


class TorchGeoSource:
    """Data source over the files of a published data set, each cut evenly into parts of at most `tile` pixels.

    The published test images are the test split; a share of the training images, chosen by a hash of the name,
    validates.

    Args:
        name: of the data set.
        stored: names of the bands in the files.
        bands: those wanted, in order.
        classes: of the labels.
        labels: reads masks.
        tile: side of a part in pixels.
        val_fraction: share of the training images that validate.

    Raises:
        UserError: an unknown band or a setting out of its range; on `prepare`, `spec` and `split`: folders or files
            that are missing, sizes that do not fit.
    """

    def __init__(
        self,
        *,
        name: str,
        stored: Sequence[str],
        bands: Sequence[str],
        classes: tuple[ClassSpec, ...],
        labels: LabelReader,
        tile: int,
        val_fraction: float,
    ) -> None:
        if not bands or set(bands) - set(stored):
            raise UserError(f"data.bands={list(bands)}: {name} has {', '.join(stored)}")
        if tile < 32 or not 0 <= val_fraction < 1:
            raise UserError(f"data.tile={tile} must be >= 32, data.val_fraction={val_fraction} at least 0 and below 1")
        self.name, self.classes, self._labels, self._tile = name, classes, labels, tile
        self._stored, self.bands, self._val_fraction = tuple(stored), tuple(bands), val_fraction

    def files(self, split: str) -> Files:
        """Images and masks of the published "train" or "test" split."""
        raise NotImplementedError  # abstract

    def prepare(self) -> None:
        """Check that the files are there and fit."""
        _ = self._parts

    @cached_property
    def spec(self) -> DataSpec:
        """Bands, classes, and mean and std over the training split."""
        parts = self._parts["train"]
        images = (self._read(part)[:2] for part in parts[:: -(-len(parts) // FILES)])
        mean, std = band_statistics(images, f"the training images of {self.name}")
        return DataSpec(name=self.name, bands=self.bands, classes=self.classes, mean=mean, std=std)

    def split(self, name: str) -> Samples:
        """The parts of "train", "val" or "test"."""
        if name not in SPLITS:
            raise UserError(f"{self.name} has no split {name!r}: choose one of {', '.join(SPLITS)}")
        return _Samples(self, self._parts[name])

    @cached_property
    def _parts(self) -> Mapping[str, Sequence[_Part]]:
        found: dict[str, list[_Part]] = {name: [] for name in SPLITS}
        for image, mask in self.files("train"):
            found[split_of(image.stem, self._val_fraction, 0.0)] += self._cut(image, mask)
        for image, mask in self.files("test"):
            found["test"] += self._cut(image, mask)
        return found

    def _cut(self, image: Path, mask: Path) -> list[_Part]:
        info, other = raster_info(image), raster_info(mask)
        if (info.height, info.width) != (other.height, other.width):
            raise UserError(
                f"{mask} is {other.height} x {other.width} pixels, its image {info.height} x {info.width}; "
                "they must be equal"
            )
        if len(info.dtypes) != len(self._stored):
            raise UserError(f"{image} has {len(info.dtypes)} bands, {self.name} has {', '.join(self._stored)}")
        rows, columns = (
            [round(i * length / count) for i in range(count + 1)]
            for length, count in ((n, -(-n // self._tile)) for n in (info.height, info.width))
        )
        return [
            _Part(f"{image.stem}/{top}_{left}", image, mask, Area(top, left, bottom - top, right - left))
            for top, bottom in pairwise(rows)
            for left, right in pairwise(columns)
        ]

    def _read(self, part: _Part) -> tuple[NDArray[np.float32], NDArray[np.bool_], Any]:
        """Image, validity and georeference of a part."""
        area = part.area
        with open_raster(part.image) as raster:
            every = range(1, len(self._stored) + 1)  # a fourth band may look like alpha, which it is not
            image, valid = raster.read(every, row=area.row, column=area.column, height=area.height, width=area.width)
            info = raster.info
        return image[[self._stored.index(band) for band in self.bands]], valid, info

    def sample(self, part: _Part) -> Sample:
        """Read a part."""
        from rasterio.transform import Affine

        image, valid, info = self._read(part)
        labels = self._labels(part.mask, part.area)
        labels[~valid] = IGNORE_INDEX
        moved = info.transform * Affine.translation(part.area.column, part.area.row)
        return Sample(
            image=torch.from_numpy(image),
            mask=torch.from_numpy(labels),
            valid=torch.from_numpy(valid),
            id=part.id,
            bands=self.bands,
            crs=None if info.crs is None else info.crs.to_wkt(),
            transform=None if info.transform.is_identity else tuple(moved)[:6],
        )


@dataclass(frozen=True)
class _Samples:
    source: TorchGeoSource
    parts: Sequence[_Part]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Sample:
        return self.source.sample(self.parts[index])


def listed(dataset: str, root: Path, folder: str, split: str, **settings: Any) -> Files:
    """Images and masks of a split, as TorchGeo's class `dataset` lists them.

    Args:
        dataset: name of the class.
        root: the folder that it looks into.
        folder: of the images, below `root`; without it TorchGeo would unpack archives.
        split: its name there.
        settings: passed on.

    Raises:
        UserError: TorchGeo is not installed, a folder is missing, or no image has a mask.
    """
    if not (root / folder).is_dir():
        raise UserError(f"data.root={root}: no folder {folder} in it; unpack the published archives there")
    try:
        from torchgeo import datasets
    except ImportError as error:
        raise UserError(f"{dataset} is read with TorchGeo ({error}); type: pip install 'vfmadapt[geo]'") from error
    try:
        files = getattr(datasets, dataset)(str(root), split=split, **settings).files
    except datasets.DatasetNotFoundError as error:
        raise UserError(f"data.root={root} lacks folders of {dataset}; unpack the published archives there") from error
    found = [(Path(pair["image"]), Path(pair["mask"])) for pair in files]
    if not found:
        raise UserError(
            f"data.root={root}: no image of the {split} split has its mask; see docs/urban.md for the places"
        )
    return found
