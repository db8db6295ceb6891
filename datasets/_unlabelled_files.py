"""Files of images without labels, each as something of which squares are read: rasters, pictures, volumes, videos."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets._pairs import SUFFIXES
from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip
from vfmadapt.frames.reading import is_clip, open_clip
from vfmadapt.raster.bands import select_bands
from vfmadapt.raster.io import open_raster

Square = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Values (C, s, s) in sensor units, valid (s, s)."""

GREY: tuple[str, ...] = ("grey",)
RGB: tuple[str, ...] = ("red", "green", "blue")


@dataclass(frozen=True)
class ImageFile:
    """A file of one or many images of one size: with `clip` frames (0 black, 1 white), else a raster."""

    path: Path
    bands: tuple[str, ...]
    height: int
    width: int
    frames: int
    clip: bool


def find_files(root: Path) -> list[Path]:
    """The files in a folder and below that can hold images, sorted; hidden ones are left aside."""
    files = (
        f for f in root.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(root).parts)
    )
    return sorted(f for f in files if f.suffix.lower() in SUFFIXES or is_clip(f))


def describe(path: Path) -> ImageFile:
    """What a file's header says; raises UserError where it cannot be read."""
    if is_clip(path):
        with open_clip(path) as clip:
            info = clip.info
        bands = GREY if info.channels == 1 else RGB
        return ImageFile(path, bands, info.height, info.width, info.frames, clip=True)
    with open_raster(path) as raster:
        if raster.info.palette is not None:
            raise UserError(f"{path} holds numbers of a palette, not values; convert it to red, green and blue")
        names, count = raster.info.names, len(raster.info.data_bands)
        if None in names or len(set(names)) < count:
            names = GREY if count == 1 else tuple(f"band{i}" for i in range(1, count + 1))
        bands = tuple(str(name) for name in names)
        return ImageFile(path, bands, raster.info.height, raster.info.width, 1, clip=False)


def read_raster(
    file: ImageFile, bands: Sequence[str], at: tuple[int, int], side: int, units: tuple[float | None, float | None]
) -> Square:
    """The square of a raster whose first row and column are `at`; `units`: scale and offset, see `to_sensor_units`."""
    with open_raster(file.path) as raster:
        mean = tuple(bands) == GREY != file.bands
        chosen = raster.info.data_bands if mean else select_bands(raster.info, bands, advice="set data.bands")
        image, valid = raster.read(
            chosen, row=at[0], column=at[1], height=side, width=side, scale=units[0], offset=units[1]
        )
    return (image.mean(0, keepdims=True) if mean else image), valid


def read_frame(
    clip: Clip, frame: int, bands: Sequence[str], at: tuple[int, int], side: int, window: tuple[float, float]
) -> Square:
    """The square of a frame whose first row and column are `at`, `window` its values of black and white."""
    black, white = window
    image = clip.frame(frame)[:, at[0] : at[0] + side, at[1] : at[1] + side]
    shown = np.clip((image - black) / (white - black), 0, 1).astype(np.float32)
    if len(shown) != len(bands):  # colours as grey, as the labelled clips have them
        shown = shown.mean(0, keepdims=True)
    return shown, np.ones(shown.shape[1:], dtype=bool)


def fits(file: ImageFile, bands: Sequence[str]) -> bool:
    """Whether a file can give these bands: all by name, or the grey of several."""
    return tuple(bands) in (file.bands, GREY) or (not file.clip and set(bands) <= set(file.bands))
