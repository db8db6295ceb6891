"""A stack of images and masks in one NPZ file: time series, volumes, exported patches."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vfmadapt.contracts import IGNORE_INDEX, ClassSpec, DataSpec, Sample, Samples
from vfmadapt.errors import UserError

COLOURS = ((34, 102, 51), (240, 240, 240), (66, 165, 245), (251, 140, 0), (142, 36, 170), (229, 57, 53))


class NpzStack:
    """Images (T, H, W) or (T, H, W, C) and labels (T, H, W) or (T, H, W, 1) under two keys of an NPZ file.

    Every `holdout`-th frame, the last of each group, is a test frame; the frame two before it in every second group
    validates; the others train. NaN in any band is not valid and not labelled.

    Args:
        path: the .npz file.
        image: key of the images, in sensor units.
        mask: key of the labels, 0..K-1.
        classes: names of the K classes in order.
        bands: band names; default band1, band2, ...
        holdout: size of a group of frames.

    Raises:
        UserError: no such file or key, shapes that do not fit, labels out of range.
    """

    def __init__(
        self,
        *,
        path: str,
        image: str = "image",
        mask: str = "mask",
        classes: Sequence[str] = ("background", "foreground"),
        bands: Sequence[str] | None = None,
        holdout: int = 4,
    ) -> None:
        if holdout < 3:
            raise UserError(f"data.holdout={holdout}: a group needs at least 3 frames (train, validation, test)")
        self.path, self.image_key, self.mask_key = Path(path).expanduser(), image, mask
        self.classes, self.bands, self.holdout = tuple(classes), bands, holdout

    def prepare(self) -> None:
        """Read and check the file."""
        _ = self._arrays

    @cached_property
    def _arrays(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if not self.path.is_file():
            raise UserError(
                f"data.path={self.path}: no such file; give an .npz with the keys {self.image_key} and {self.mask_key}"
            )
        try:
            with np.load(self.path) as file:
                keys = list(file)
                images, masks = (file[k] if k in keys else None for k in (self.image_key, self.mask_key))
        except (OSError, ValueError) as error:
            raise UserError(f"data.path={self.path} is not a readable .npz file ({type(error).__name__})") from error
        if images is None or masks is None:
            raise UserError(f"{self.path} has the keys {', '.join(keys)}; set data.image and data.mask to two of them")
        images = images[..., None] if images.ndim == 3 else images
        masks = masks[..., 0] if masks.ndim == 4 and masks.shape[-1] == 1 else masks
        if images.ndim != 4 or images.shape[:3] != masks.shape:
            raise UserError(
                f"{self.path}: images {images.shape} and masks {masks.shape} do not fit; "
                "wanted (T, H, W, C) and (T, H, W)"
            )
        labels = set(np.unique(masks).tolist()) - {IGNORE_INDEX}
        if labels - set(range(len(self.classes))):
            raise UserError(
                f"{self.path}: labels {sorted(labels)} but data.classes names {len(self.classes)}; "
                "allowed 0..K-1 and 255"
            )
        return images.astype(np.float32), masks.astype(np.int64)

    @cached_property
    def spec(self) -> DataSpec:
        """Bands, classes, and mean and std over the valid pixels of the training frames."""
        images, _ = self._arrays
        bands = tuple(self.bands or (f"band{i + 1}" for i in range(images.shape[-1])))
        if len(bands) != images.shape[-1]:
            raise UserError(f"data.bands names {len(bands)} bands, {self.path} has {images.shape[-1]}")
        train = images[self._frames("train")]
        return DataSpec(
            name=self.path.stem,
            bands=bands,
            classes=tuple(ClassSpec(n, COLOURS[i % len(COLOURS)]) for i, n in enumerate(self.classes)),
            mean=tuple(float(v) for v in np.nanmean(train, axis=(0, 1, 2))),
            std=tuple(float(v) for v in np.nanstd(train, axis=(0, 1, 2))),
        )

    def _frames(self, split: str) -> list[int]:
        def place(frame: int) -> str:
            group, within = divmod(frame, self.holdout)
            if within == self.holdout - 1:
                return "test"
            return "val" if within == self.holdout - 3 and group % 2 else "train"

        return [i for i in range(len(self._arrays[0])) if place(i) == split]

    def split(self, name: str) -> Samples:
        """The frames of "train", "val" or "test"."""
        frames = self._frames(name)
        if not frames:
            raise UserError(
                f"{self.path} has {len(self._arrays[0])} frames: none is left for {name}; lower data.holdout"
            )
        return _Frames(*self._arrays, frames, self.spec.bands)


class _Frames:
    def __init__(
        self, images: np.ndarray[Any, Any], masks: np.ndarray[Any, Any], frames: Sequence[int], bands: tuple[str, ...]
    ) -> None:
        self.images, self.masks, self.frames, self.bands = images, masks, frames, bands

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Sample:
        frame = self.frames[index]
        image = torch.from_numpy(self.images[frame]).permute(2, 0, 1)
        valid = torch.isfinite(image).all(0)
        return Sample(
            image=image.where(valid, 0.0).contiguous(),
            mask=torch.from_numpy(self.masks[frame]).where(valid, IGNORE_INDEX),
            valid=valid,
            id=f"frame{frame:05d}",
            bands=self.bands,
        )
