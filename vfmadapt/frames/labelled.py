"""Clips with masks: which files belong together, and their label maps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip
from vfmadapt.frames.images import IMAGES
from vfmadapt.frames.npz import IMAGE_KEYS, MASK_KEYS
from vfmadapt.frames.reading import ending, open_clip

# what the names of masks, and of the images that they belong to, end in: CAMUS, TrackRAD2025, nnU-Net, BraTS and others
_MASK_ENDS = ("_mask", "_masks", "_seg", "_segmentation", "_gt", "_label", "_labels", "_annotations")
_IMAGE_ENDS = ("_frames", "_image", "_img", "_0000")
_MASK_FOLDERS = ("masks", "labels", "labelstr", "labelsts", "targets")
_ENDINGS = (".nii", ".nii.gz", ".mha", ".mhd", ".mp4", ".avi", ".mov", ".mkv", ".gif", ".tif", ".tiff")
_MOST = 255  # structures that a label map of 8 bits tells apart


@dataclass(frozen=True)
class LabelledClip:
    """A clip and its masks, not yet opened; for NPZ both are in one file."""

    id: str
    image: Path
    masks: Path

    def open(self, **options: Any) -> tuple[Clip, Clip]:
        """Clip, read with options of its reader, and masks; UserError where either is unreadable or they do not fit."""
        clip, masks = open_clip(self.image, **options), open_masks(self.masks)
        ours, theirs = clip.info, masks.info
        if (ours.frames, *ours.size) != (theirs.frames, *theirs.size):
            raise UserError(
                f"{self.masks}: {theirs.frames} masks of {theirs.height} x {theirs.width} pixels for "
                f"{ours.frames} frames of {ours.height} x {ours.width}; give a mask for each frame"
            )
        return clip, masks


def labelled_clips(folder: str | Path) -> list[LabelledClip]:
    """The clips in a folder, and in folders within, that have masks; sorted by id, the path without its ending.

    That is: NPZ files with masks (`gts`, `mask`, ...) beside the frames; and `NAME.nii.gz`, or any other clip or folder
    of images, with masks named `NAME_mask`, `NAME_gt`, `NAME_seg`, ..., in the same folder or in one called masks,
    labels, labelsTr or targets beside it, where the bare `NAME` will do.

    Raises:
        UserError: no such folder, or no clip with masks in it.
    """
    top = Path(folder).expanduser()
    if not top.is_dir():
        raise UserError(f"evaluate={folder}: no such folder; give one that holds clips and their masks")
    entries = [e for e in sorted(top.rglob("*")) if not e.name.startswith(".")]
    found = {e: e for e in entries if ending(e) == ".npz" and _has_both(e)}
    clips = [e for e in entries if _is_clip(e)]
    masks = {key: e for e in clips if (key := _mask_key(e))}
    images = [e for e in clips if e not in masks.values()]
    found |= {e: masks[key] for e in images for key in _image_keys(e) if key in masks}
    if not found:
        raise UserError(
            f"evaluate={folder}: no clip with masks in it; allowed are NPZ with one of {', '.join(IMAGE_KEYS)} and one "
            f"of {', '.join(MASK_KEYS)}, or files NAME.nii.gz and NAME_mask.nii.gz"
        )
    return [LabelledClip(str((e.parent / _stem(e)).relative_to(top)), e, found[e]) for e in sorted(found)]


def open_masks(path: str | Path) -> Clip:
    """Masks as a clip of one channel: numbers of labels, also of palette images; raises UserError as `open_clip`."""
    where = Path(path).expanduser()
    if ending(where) == ".npz":
        return open_clip(where, key=next((k for k in MASK_KEYS if k in _keys(where)), None))
    if where.is_dir() or ending(where) in (*IMAGES, ".gif"):
        return open_clip(where, labels=True)
    return open_clip(where)


def label_map(masks: Clip, index: int) -> NDArray[np.uint8]:
    """Labels (H, W) of frame `index`, 0 where there is nothing; raises UserError unless they are 0..255."""
    values = masks.frame(index)[0]
    with np.errstate(invalid="ignore"):  # what does not fit is told below
        labels = values.astype(np.uint8)
    if not np.array_equal(labels, values):
        odd = values[labels != values][0]
        raise UserError(f"{masks.info.path}: frame {index} holds {odd:g}; labels are whole numbers from 0 to {_MOST}")
    return labels


def _has_both(path: Path) -> bool:
    keys = _keys(path)
    return not keys.isdisjoint(IMAGE_KEYS) and not keys.isdisjoint(MASK_KEYS)


def _keys(path: Path) -> set[str]:
    if not is_zipfile(path):
        return set()
    with ZipFile(path) as archive:
        return {Path(name).stem for name in archive.namelist()}


def _is_clip(path: Path) -> bool:
    if path.is_dir():
        return any(f.suffix.lower() in IMAGES for f in path.iterdir())
    return ending(path) in _ENDINGS


def _mask_key(path: Path) -> tuple[Path, str] | None:
    """The folder and the name that the image of a mask is known by; None where the path is not that of a mask."""
    stem, apart = _stem(path), path.parent.name.lower() in _MASK_FOLDERS
    name = next((stem.removesuffix(end) for end in _MASK_ENDS if stem.endswith(end)), stem if apart else None)
    return None if name is None else (path.parent.parent if apart else path.parent, name)


def _image_keys(path: Path) -> list[tuple[Path, str]]:
    """What a clip may be known by: its name, with or without an ending such as nnU-Net's, in its folder."""
    stem = _stem(path)
    names = [stem, *(stem.removesuffix(end) for end in _IMAGE_ENDS if stem.endswith(end))]
    apart = path.parent.name.lower().startswith("images")
    return [(path.parent.parent if apart else path.parent, name) for name in names] + [(path.parent, stem)]


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.name[: len(path.name) - len(ending(path))]
