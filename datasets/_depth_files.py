"""Images with depth as files of any kind, and what the readers of such data sets share."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.contracts import DataSpec, DepthSample, UserError, ValueSpec
from vfmadapt.datasets._statistics import band_statistics
from vfmadapt.datasets._tiles import SPLITS

BANDS = ("red", "green", "blue")

DEPTH_SUFFIXES = (".png", ".npy", ".npz", ".exr", ".tif", ".tiff")

_MEASURED = 64  # training images from which statistics are taken


@dataclass(frozen=True)
class DepthItem:
    """An image and its depth; `band`: 1-based, of a depth file with several."""

    id: str
    image: Path
    depth: Path
    band: int = 1


def read_image(path: Path) -> NDArray[np.float32]:
    """An image as RGB, float32 (3, H, W) in 0..1; raises UserError where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB"), dtype=np.float32)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{path} is not a readable image ({error}); make a whole copy, or take it out") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) / np.float32(255)


def read_depth(path: Path, *, scale: float, band: int = 1) -> NDArray[np.float32]:
    """A depth map, float32 (H, W): stored value x `scale`, NaN where it is 0 or less, infinite or not a number.

    PNG of 8 or 16 bits, NPY, NPZ with one array, EXR, TIFF.

    Raises:
        UserError: no such file, another kind of file, more than one map in it, no OpenEXR in OpenCV.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such depth file")
    suffix = path.suffix.lower()
    if suffix not in DEPTH_SUFFIXES:
        raise UserError(f"{path}: depth is read from files that end in {', '.join(DEPTH_SUFFIXES)}")
    try:
        stored = _stored(path, suffix, band)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise UserError(f"{path} is not a readable depth map ({error}); make a whole copy, or take it out") from error
    if stored.ndim == 3 and 1 in (stored.shape[0], stored.shape[-1]):
        stored = stored.reshape([n for n in stored.shape if n > 1])
    if stored.ndim != 2 or stored.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {stored.dtype.name} of shape {stored.shape}; a depth map is (H, W), of numbers")
    with np.errstate(invalid="ignore"):
        depth = stored.astype(np.float32) * np.float32(scale)
        return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))


def _stored(path: Path, suffix: str, band: int) -> NDArray[np.generic]:
    if suffix == ".npy":
        return np.asarray(np.load(path, allow_pickle=False))
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            if len(file.files) != 1:
                raise UserError(f"{path} holds the arrays {', '.join(file.files)}; a depth file holds one")
            return np.asarray(file[file.files[0]])
    if suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            if image.mode not in ("L", "I", "I;16", "I;16B"):
                raise UserError(f"{path} is a PNG of mode {image.mode}; depth is stored as one grey band of 16 bits")
            return np.asarray(image)
    if suffix == ".exr":
        return _read_exr(path)
    import rasterio

    with rasterio.open(path) as file:
        stored = file.read(band, masked=True)
    return np.asarray(np.ma.filled(stored, 0))


def _read_exr(path: Path) -> NDArray[np.generic]:
    os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")  # OpenCV reads it where it is built with it, and asked to
    import cv2

    try:
        found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        found = None
    if found is None:
        raise UserError(f"{path}: this OpenCV reads no OpenEXR, or the file is damaged; convert it to NPY or TIFF")
    return np.asarray(found if found.ndim == 2 else found[..., -1])  # BGR: red holds the depth


class DepthSamples:
    """The samples of one split; holds paths only, so that it can go to worker processes.

    Args:
        items: images and depths.
        scale: see `read_depth`.
        crop: (top, bottom, left, right) as shares of the height and width, outside which depth counts as unknown.
    """

    def __init__(
        self, items: Sequence[DepthItem], *, scale: float, crop: tuple[float, float, float, float] | None = None
    ) -> None:
        self._items, self._scale, self._crop = tuple(items), scale, crop

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> DepthSample:
        item = self._items[index]
        image, depth = read_image(item.image), read_depth(item.depth, scale=self._scale, band=item.band)
        if image.shape[1:] != depth.shape:
            (height, width), (rows, columns) = image.shape[1:], depth.shape
            raise UserError(
                f"{item.image} has {height} x {width} pixels, its depth {item.depth} {rows} x {columns}; they must be "
                "of one size: resample the depth by nearest neighbour, or crop both alike"
            )
        if self._crop is not None:
            depth = _cropped(depth, self._crop)
        return DepthSample(
            image=torch.from_numpy(image),
            depth=torch.from_numpy(depth),
            valid=torch.ones(depth.shape, dtype=torch.bool),
            id=item.id,
            bands=BANDS,
        )


def _cropped(depth: NDArray[np.float32], crop: tuple[float, float, float, float]) -> NDArray[np.float32]:
    (height, width), (top, bottom, left, right) = depth.shape, crop
    inside = (slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width)))
    out = np.full_like(depth, np.nan)
    out[inside] = depth[inside]
    return out


class DepthData:
    """A source of images with depth; subclasses say which there are.

    Args:
        name: of the data set.
        value: what the depth is; its mean and deviation are measured on training images.
        scale: stored value x scale = depth in the unit.
        crop: as in `DepthSamples`.
    """

    def __init__(
        self,
        name: str,
        value: ValueSpec,
        *,
        scale: float,
        crop: tuple[float, float, float, float] | None = None,
    ) -> None:
        if not scale > 0:
            raise UserError(f"data.scale={scale}: stored value x scale = depth, so it is above 0")
        self._name, self._value, self._scale, self._crop = name, value, scale, crop

    @property
    def values(self) -> tuple[ValueSpec, ...]:
        """The depth, or disparity."""
        return (self._value,)

    @cached_property
    def spec(self) -> DataSpec:
        """Bands, the depth, and mean and std of both over training images (of all, if none is for that)."""
        items = self._all["train"] or [i for name in SPLITS for i in self._all[name]]
        samples = DepthSamples(items[:: -(-len(items) // _MEASURED)], scale=self._scale, crop=self._crop)
        images, depths = [], []
        for index in range(len(samples)):
            sample = samples[index]
            images.append((sample["image"].numpy(), sample["valid"].numpy()))
            depths.append(sample["depth"][torch.isfinite(sample["depth"])])
        mean, std = band_statistics(images, f"{items[0].image} and the other training images")
        known = torch.cat(depths).double()
        if not len(known):
            raise UserError(f"{self._name}: no training image has a known depth; look at {items[0].depth}")
        logs = known.log() if self._value.log else known
        value = ValueSpec(
            self._value.name,
            self._value.unit,
            float(logs.mean()),
            max(float(logs.std(correction=0)), 1e-3),
            self._value.log,
            self._value.inverse,
        )
        return DataSpec(self._name, BANDS, (), mean, std, values=(value,))

    def prepare(self) -> None:
        """Look for the files, and read one of each split; raises UserError where something is wrong."""
        for name in SPLITS:
            if self._all[name]:
                _ = self.split(name)[0]

    def split(self, name: str) -> DepthSamples:
        """The images of "train", "val" or "test"; UserError where there are none."""
        if name not in SPLITS:
            raise UserError(f"{self._name} has no split {name!r}: choose one of {', '.join(SPLITS)}")
        if not self._all[name]:
            raise UserError(f"{self._name}: no image is for {name}; look at the folder and data.*")
        return DepthSamples(self._all[name], scale=self._scale, crop=self._crop)

    @cached_property
    def _all(self) -> dict[str, list[DepthItem]]:
        found = self._items()
        if not any(found.values()):
            raise UserError(f"{self._name}: there is no image with depth; look at the folder and data.*")
        return {name: found.get(name, []) for name in SPLITS}

    def _items(self) -> dict[str, list[DepthItem]]:
        raise NotImplementedError  # abstract


def listed(root: Path, depth_root: Path, file: Path) -> list[DepthItem]:
    """Items of a list, a line each: image, depth, and what else there may be; "None" for a depth that is missing.

    The form of BTS and AdaBins (https://github.com/cleinc/bts, train_test_inputs): paths relative to two folders.

    Raises:
        UserError: no such list, a line of fewer than two words, an image that is not there.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such list of images; a line holds the paths of an image and of its depth")
    items = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2:
            raise UserError(f"{file}, line {number}: {line!r}; a line holds the paths of an image and of its depth")
        if words[1] == "None":
            continue
        image = root / words[0].lstrip("/")
        if not image.is_file():
            raise UserError(f"{file}, line {number}: {image} is not there; look at data.root")
        items.append(DepthItem(words[0].lstrip("/").rsplit(".", 1)[0], image, depth_root / words[1].lstrip("/")))
    return items


def folder(path: str, what: str) -> Path:
    """A folder that exists; UserError says what it must hold."""
    found = Path(path).expanduser()
    if not found.is_dir():
        raise UserError(f"{found}: no such folder; it must hold {what}")
    return found
