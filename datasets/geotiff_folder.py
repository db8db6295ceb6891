"""A user's own folder of images and label masks: GeoTIFF, PNG or JPEG images of any bands, GeoTIFF or PNG masks."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.contracts import IGNORE_INDEX, DataSpec, Sample, Samples
from vfmadapt.datasets._labels import Labels, class_specs
from vfmadapt.datasets._pairs import SUFFIXES, Pair, match, split_of
from vfmadapt.datasets._statistics import FILES, band_statistics
from vfmadapt.errors import UserError
from vfmadapt.raster.bands import select_bands
from vfmadapt.raster.io import RasterInfo, open_raster, raster_info

SPLITS = ("train", "val", "test")


class GeotiffFolder:
    """Images and masks of the same name in two folders, one file = one sample.

    Layouts: `root/images` and `root/masks`, split by a hash of the file's name (a file stays in its split when others
    come); or folders named train, val and test, as `root/train/images` or as `root/images/train`.

    Args:
        root: the folder.
        classes: names, or mappings with `name`, `colour` (three numbers 0..255) and `line` (true for roads and the
            like, which are then also judged by their course), in the order of the labels.
        images: name of the folder of images.
        masks: name of the folder of masks; it may be the same if `mask_suffix` tells the masks.
        image_suffix: what an image's stem ends with besides the common name ("scene1_image": "_image").
        mask_suffix: the same for masks.
        bands: band names; where the files name their bands these are picked, else all are read in order. By default the
            names or colours in the files, or band1, band2, ...
        scale: with `offset`, how to get sensor units from stored values (see `vfmadapt.raster.io.to_sensor_units`).
        offset: see `scale`.
        label_map: {value in the masks: class (index or name), or None for ignore}; every value must then be listed.
        ignore_index: value in the masks that means ignore, as a mask's own nodata does; `label_map` goes first.
        val_fraction: share of the images that validate, where no folders split them.
        test_fraction: share that tests; 1 makes every image a test image.

    Raises:
        UserError: on `prepare`, `spec` and `split`: no folder, no pairs, images without mask, sizes or bands that do
            not fit, labels out of range.
    """

    def __init__(
        self,
        *,
        root: str,
        classes: Sequence[str | Mapping[str, Any]] | None = None,
        images: str = "images",
        masks: str = "masks",
        image_suffix: str = "",
        mask_suffix: str = "",
        bands: Sequence[str] | None = None,
        scale: float | None = None,
        offset: float | None = None,
        label_map: Mapping[Any, Any] | None = None,
        ignore_index: int | None = IGNORE_INDEX,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
    ) -> None:
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction > 1:
            raise UserError(
                f"data.val_fraction={val_fraction}, data.test_fraction={test_fraction}: "
                "allowed are shares >= 0 that sum to at most 1"
            )
        self.root = Path(root).expanduser()
        self.classes = class_specs(classes)
        self._folders = (images, masks)
        self._suffixes = (image_suffix, mask_suffix)
        self._bands = None if bands is None else tuple(str(b) for b in bands)
        self._units = (scale, offset)
        self._labels = Labels(self.classes, label_map, ignore_index)
        self._fractions = (val_fraction, test_fraction)

    def prepare(self) -> None:
        """Check every pair: sizes, bands, labels."""
        _ = self._checked

    @cached_property
    def spec(self) -> DataSpec:
        """Bands, classes, and mean and std over valid pixels of the training images (of all, if none is for that)."""
        bands = self._checked
        pairs = self._pairs["train"] or [p for name in SPLITS for p in self._pairs[name]]
        images = (_read_image(p.image, bands, self._units)[:2] for p in pairs[:: -(-len(pairs) // FILES)])
        mean, std = band_statistics(images, f"{pairs[0].image} and the other training images")
        return DataSpec(name=self.root.name, bands=bands, classes=self.classes, mean=mean, std=std)

    def split(self, name: str) -> Samples:
        """The pairs of "train", "val" or "test", in the order of their names."""
        if name not in SPLITS:
            raise UserError(f"no split {name!r}; allowed: {', '.join(SPLITS)}")
        bands = self._checked
        if not self._pairs[name]:
            total = sum(len(p) for p in self._pairs.values())
            raise UserError(
                f"{self.root}: none of its {total} images is for {name}; "
                "raise data.val_fraction or data.test_fraction, or make folders train, val and test"
            )
        return _FolderSamples(tuple(self._pairs[name]), bands, self._units, self._labels)

    @cached_property
    def _pairs(self) -> dict[str, list[Pair]]:
        """Pairs of each split."""
        if not self.root.is_dir():
            raise UserError(
                f"data.root={self.root}: no such folder; it must hold {self._folders[0]}/ and {self._folders[1]}/"
            )
        images, masks = self._folders
        for layout in ((f"{{}}/{images}", f"{{}}/{masks}"), (f"{images}/{{}}", f"{masks}/{{}}")):
            if (self.root / layout[0].format("train")).is_dir() or (self.root / layout[0].format("test")).is_dir():
                places = {s: [self.root / part.format(s) for part in layout] for s in SPLITS}
                found = {s: match(p[0], p[1], *self._suffixes) if p[0].is_dir() else [] for s, p in places.items()}
                break
        else:
            found = {s: [] for s in SPLITS}
            for pair in match(self.root / images, self.root / masks, *self._suffixes):
                found[split_of(pair.id, *self._fractions)].append(pair)
        if not any(found.values()):
            raise UserError(
                f"{self.root}: no image in {images}/; it may hold files that end in {', '.join(sorted(SUFFIXES))}"
            )
        return found

    @cached_property
    def _checked(self) -> tuple[str, ...]:
        """The band names, after a look at every file."""
        pairs = [p for name in SPLITS for p in self._pairs[name]]
        first = raster_info(pairs[0].image)
        names = first.names
        if None in names or len(set(names)) < len(names):
            names = tuple(f"band{i}" for i in range(1, len(names) + 1))
        bands = self._bands or tuple(str(n) for n in names)
        found: set[int] = set()
        for pair in pairs:
            info = raster_info(pair.image)
            if self._bands is None and len(info.data_bands) != len(bands):
                raise UserError(
                    f"{pair.image} has {len(info.data_bands)} bands, {pairs[0].image} has {len(bands)}; "
                    "all images need the same ones"
                )
            _pick(info, bands)
            found |= self._labels.check(pair.mask, (info.height, info.width))
        self._labels.judge(found, self.root)
        return bands


class _FolderSamples:
    """The samples of one split; holds paths only, so that it can go to worker processes."""

    def __init__(
        self, pairs: Sequence[Pair], bands: tuple[str, ...], units: tuple[float | None, float | None], labels: Labels
    ) -> None:
        self._pairs, self._bands, self._units, self._labels = pairs, bands, units, labels

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self._pairs[index]
        image, valid, info = _read_image(pair.image, self._bands, self._units)
        labels = self._labels.read(pair.mask)
        labels[~valid] = IGNORE_INDEX
        return Sample(
            image=torch.from_numpy(image),
            mask=torch.from_numpy(labels),
            valid=torch.from_numpy(valid),
            id=pair.id,
            bands=self._bands,
            crs=None if info.crs is None else info.crs.to_wkt(),
            transform=None if info.transform.is_identity else tuple(info.transform)[:6],
        )


def _pick(info: RasterInfo, bands: tuple[str, ...]) -> tuple[int, ...]:
    """The 1-based bands of a file that are `bands`; a band marked alpha is data where only so the number fits."""
    if len(info.data_bands) != len(bands) == len(info.dtypes):
        return tuple(range(1, len(bands) + 1))
    return select_bands(info, bands, advice="name in data.bands what the files hold")


def _read_image(
    path: Path, bands: tuple[str, ...], units: tuple[float | None, float | None]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], RasterInfo]:
    scale, offset = units
    with open_raster(path) as raster:
        image, valid = raster.read(_pick(raster.info, bands), scale=scale, offset=offset)
        return image, valid, raster.info
