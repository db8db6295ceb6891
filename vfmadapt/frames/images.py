"""Images as frames: the files of a folder, or the pages of one file."""

import re
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip, ClipInfo

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # modes of more than 8 bits
_GREY = ("1", "L", "LA", "La", *_DEEP)


class FolderClip(Clip):
    """The images of a folder in the order of their names, numbers in them by value.

    Args:
        path: the folder; other files in it are left aside.
        kind: whether they follow one another in time or are the slices of a volume.
        spacing: millimetres of a pixel's side, which images do not tell.
        step: millimetres from slice to slice of a volume.
        labels: they are label maps: the numbers of a palette, not its colours.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: Literal["video", "volume"] = "video",
        spacing: float | None = None,
        step: float | None = None,
        labels: bool = False,
    ) -> None:
        self._files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGES), key=_by_number)
        self._labels = labels
        sizes = {f: _opened(f).size for f in self._files}
        first = self._files[0]
        other = next((f for f in self._files if sizes[f] != sizes[first]), None)
        if other is not None:
            (width, height), (first_width, first_height) = sizes[other], sizes[first]
            raise UserError(
                f"{path}: {other.name} has {height} x {width} pixels, {first.name} {first_height} x {first_width}; all "
                "frames of a clip must be of one size"
            )
        self.info = _info(path, _opened(first), len(self._files), kind, spacing, step, labels=labels)

    def _read(self, index: int) -> NDArray[np.generic]:
        with _opened(self._files[index]) as image:
            return _pixels(image, self._files[index], labels=self._labels)


class PagesClip(Clip):
    """The pages of an image file, such as a GIF or TIFF; one frame where it has one.

    Args:
        path: the file.
        kind: whether pages follow one another in time or are the slices of a volume.
        spacing: millimetres of a pixel's side, which images do not tell.
        step: millimetres from slice to slice of a volume.
        labels: they are label maps: the numbers of a palette, not its colours.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: Literal["video", "volume"] = "video",
        spacing: float | None = None,
        step: float | None = None,
        labels: bool = False,
    ) -> None:
        self._image, self._path, self._labels = _opened(path), path, labels
        pages = int(getattr(self._image, "n_frames", 1))
        self.info = _info(path, self._image, pages, kind, spacing, step, labels=labels)

    def close(self) -> None:
        """Close the file."""
        self._image.close()

    def _read(self, index: int) -> NDArray[np.generic]:
        try:
            self._image.seek(index)
        except (EOFError, OSError, SyntaxError) as error:
            raise UserError(f"{self._path}: page {index} cannot be read ({error}); make a whole copy") from error
        return _pixels(self._image, self._path, labels=self._labels)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """A key by which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} is not a readable image; make a whole copy, or take it out") from error


def _info(
    path: Path,
    first: Image.Image,
    frames: int,
    kind: Literal["video", "volume"],
    spacing: float | None,
    step: float | None,
    *,
    labels: bool,
) -> ClipInfo:
    if step is not None and kind == "video":
        raise UserError(f"{path}: step={step} is from slice to slice; give kind=volume, too, or leave it out")
    milliseconds = first.info.get("duration")
    return ClipInfo(
        path=str(path),
        kind=kind,
        frames=frames,
        height=first.height,
        width=first.width,
        channels=1 if labels or first.mode in _GREY else 3,
        spacing=(step, spacing, spacing),
        seconds_per_frame=milliseconds / 1000 if milliseconds else None,
        window=None if first.mode in _DEEP else (0.0, 255.0),
    )


def _pixels(image: Image.Image, path: Path, *, labels: bool) -> NDArray[np.generic]:
    """(C, H, W): one channel of grey or labels, else RGB."""
    try:
        if image.mode in _DEEP or (labels and image.mode in ("P", "1")):
            return np.asarray(image)[None]
        values = np.asarray(image.convert("L" if labels or image.mode in _GREY else "RGB"))
    except (OSError, SyntaxError, EOFError) as error:
        raise UserError(f"{path} is a damaged image ({error}); make a whole copy, or take it out") from error
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
