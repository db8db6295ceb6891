"""`unlabelled`: any folder of images without labels, for continued pre-training; windows are read in place."""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from vfmadapt.contracts import DataSpec, UserError
from vfmadapt.datasets._statistics import FILES, band_statistics
from vfmadapt.datasets._unlabelled_files import ImageFile, Square, describe, find_files, fits, read_frame, read_raster
from vfmadapt.frames import Clip
from vfmadapt.frames.reading import open_clip

log = logging.getLogger(__name__)

_OPEN = 4  # clips kept open: to open a compressed one again means to decompress it again
_PLACES = 8  # tried for a square of which half is valid; of a sparse mosaic most may be void
_STATISTICS_SIDE = 256  # pixels of a file from which mean and deviation are taken


class Unlabelled:
    """The GeoTIFFs, images, volumes (NIfTI, MetaImage, NPZ, DICOM) and videos in a folder and in folders within.

    Files that cannot be read, or are too small, are named, left out and counted. One that turns out to be damaged while
    windows are read is named once, and the next file is read in its place.

    Args:
        root: the folder.
        bands: names that are picked in each file; [grey] averages colours. None: those of the first file.
        scale: with `offset`, how to get sensor units from a raster's values (see `vfmadapt.raster.io.to_sensor_units`).
        offset: see `scale`.
        window: values of volumes and videos that become 0 and 1, for instance [-160, 240] Hounsfield units; None: those
            that each file tells.

    Raises:
        UserError: on `prepare`, `spec` and `window`: no folder, nothing readable in it, bands that differ.
    """

    def __init__(
        self,
        *,
        root: str,
        bands: Sequence[str] | None = None,
        scale: float | None = None,
        offset: float | None = None,
        window: Sequence[float] | None = None,
    ) -> None:
        if window is not None and (len(window) != 2 or window[0] == window[1]):
            raise UserError(f"data.window={[*window]}: give the values that become 0 and 1, for instance [-160,240]")
        self.root = Path(root).expanduser()
        self.skipped: dict[Path, str] = {}
        self._bands = None if bands is None else tuple(str(b) for b in bands)
        self._units = (scale, offset)
        self._window = None if window is None else (float(window[0]), float(window[1]))
        self._opened: OrderedDict[Path, tuple[Clip, tuple[float, float]]] = OrderedDict()

    def prepare(self) -> None:
        """Look at every file's header."""
        _ = self._files

    def require(self, side: int) -> None:
        """Leave out the files with a shorter side than that; raises UserError where none is left."""
        kept = []
        for file in self._files:
            if min(file.height, file.width) >= side:
                kept.append(file)
            else:
                self._skip(file.path, f"{file.path} has {file.height} x {file.width} pixels, a crop {side}")
        if not kept:
            largest = max(min(f.height, f.width) for f in self._files)
            raise UserError(
                f"data.root={self.root}: every image is smaller than a crop of {side} pixels, the largest has "
                f"{largest}; make the crops of the objective smaller"
            )
        if len(kept) < len(self._files):
            log.warning("%s: %d of %d files are too small", self.root, len(self._files) - len(kept), len(self._files))
        self._files = kept

    @cached_property
    def spec(self) -> DataSpec:
        """Bands, and mean and std over a square of each of some files."""
        files = self._files
        bands = self._bands or files[0].bands
        indices = range(0, len(files), -(-len(files) // FILES))
        mean, std = band_statistics(self._samples(indices), f"the files in {self.root}")
        return DataSpec(self.root.name, bands, (), mean, std)

    def __len__(self) -> int:
        return len(self._files)

    def window(self, index: int, side: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A random square of file `index`, or of the next one that is whole; of a clip in a random frame."""
        files, seed = self._files, int(draw.integers(2**63))
        for step in range(len(files)):
            file = files[(index + step) % len(files)]
            if file.path in self.skipped:
                continue
            try:
                image, valid = self._square(file, side, np.random.default_rng([seed, step]))
            except UserError as error:
                self._skip(file.path, str(error))
                continue
            return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(valid)
        raise UserError(
            f"{self.root}: none of its {len(files)} files can be read; the last: {[*self.skipped.values()][-1]}"
        )

    def split(self, name: str) -> NoReturn:
        """Refused: there are no labels."""
        raise UserError("data=unlabelled has no labels to train on; it is for tools/pretrain.py")

    @cached_property
    def _files(self) -> list[ImageFile]:
        if not self.root.is_dir():
            raise UserError(f"data.root={self.root}: no such folder; give one that holds images, volumes or videos")
        paths = find_files(self.root)
        if not paths:
            raise UserError(f"data.root={self.root}: no image, volume or video in it or below; give another folder")
        found = [file for path in paths if (file := self._described(path)) is not None]
        if not found:
            raise UserError(
                f"data.root={self.root}: none of its {len(paths)} files can be read: {self.skipped[paths[0]]}"
            )
        wanted = self._bands or found[0].bands
        if other := next((f for f in found if not (f.bands == wanted or (self._bands and fits(f, wanted)))), None):
            raise UserError(
                f"{other.path} has the bands {', '.join(other.bands)}, wanted are {', '.join(wanted)} (data.bands, or "
                f"those of {found[0].path.name}); name in data.bands what all files have, or [grey] to average colours"
            )
        if self.skipped:
            log.warning("%s: %d of %d files are left out", self.root, len(self.skipped), len(paths))
        return found

    def _described(self, path: Path) -> ImageFile | None:
        try:
            return describe(path)
        except UserError as error:
            self._skip(path, str(error))
            return None

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped[path] = reason
        log.warning("left out: %s", reason)

    def _samples(self, indices: range) -> Iterator[Square]:
        draw = np.random.default_rng(0)
        for index in indices:
            image, valid = self.window(index, _STATISTICS_SIDE, draw)
            yield image.numpy(), valid.numpy()

    def _square(self, file: ImageFile, side: int, draw: np.random.Generator) -> Square:
        bands = self._bands or self._files[0].bands
        side = min(side, file.height, file.width)
        for _ in range(_PLACES):
            frame = int(draw.integers(file.frames))
            at = int(draw.integers(file.height - side + 1)), int(draw.integers(file.width - side + 1))
            if file.clip:
                clip, window = self._clip(file.path)
                return read_frame(clip, frame, bands, at, side, window)
            image, valid = read_raster(file, bands, at, side, self._units)
            if valid.mean() >= 0.5:
                break
        return image, valid

    def _clip(self, path: Path) -> tuple[Clip, tuple[float, float]]:
        if path in self._opened:
            self._opened.move_to_end(path)
            return self._opened[path]
        clip = open_clip(path)
        self._opened[path] = clip, self._window or clip.window()
        if len(self._opened) > _OPEN:
            self._opened.popitem(last=False)[1][0].close()
        return self._opened[path]
