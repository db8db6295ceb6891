"""Clips with masks: which files belong together, and their label maps."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

from vfmadapt.errors import UserError
from vfmadapt.frames.alignment import aligned
from vfmadapt.frames.alignment import label_map as label_map
from vfmadapt.frames.clip import Clip, ClipInfo
from vfmadapt.frames.images import IMAGES
from vfmadapt.frames.npz import IMAGE_KEYS, MASK_KEYS
from vfmadapt.frames.reading import ending, has_dicom, is_dicom, open_clip, options_of

# what the names of masks, and of the images that they belong to, end in: CAMUS, TrackRAD2025, nnU-Net, BraTS and others
_MASK_ENDS = ("_mask", "_masks", "_seg", "_segmentation", "_gt", "_label", "_labels", "_annotations")
_IMAGE_ENDS = ("_frames", "_image", "_img", "_0000")
_MASK_FOLDERS = ("masks", "labels", "labelstr", "labelsts", "targets")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp")  # of one frame
_PAGES = (".tif", ".tiff", ".gif")  # of one or many
_ENDINGS = (".nii", ".nii.gz", ".mha", ".mhd", ".dcm", ".mp4", ".avi", ".mov", ".mkv", *_PAGES, *_PICTURES)
_SHARED = ("kind", "time_first", "slice", "time", "spacing")  # options that say how frames lie in a file


@dataclass(frozen=True)
class LabelledClip:
    """A clip and its masks, not yet opened; for NPZ both are in one file."""

    id: str
    image: Path
    masks: Path

    def open(self, **options: Any) -> tuple[Clip, Clip]:
        """Clip and masks, read with options of the clip's reader; UserError where one is unreadable or they don't fit.

        Masks take those options that say how frames lie in a file, and are turned as `aligned` tells.
        """
        clip = open_clip(self.image, **options)
        masks = open_masks(self.masks, clip.info, options)
        if len(masks) != len(clip):
            raise UserError(f"{self.masks}: one mask for the {len(clip)} frames of {self.image}; give one for each")
        return clip, masks


def labelled_clips(folder: str | Path) -> list[LabelledClip]:
    """The clips in a folder, and in folders within, that have masks; sorted by id, the path without its ending.

    That is: NPZ files with masks (`gts`, `mask`, ...) beside the frames; and `NAME.nii.gz`, or any other clip, picture
    or folder of images or of a DICOM series, with masks named `NAME_mask`, `NAME_gt`, `NAME_seg`, ..., in the same
    folder or in one called masks, labels, labelsTr or targets beside it, where the bare `NAME` will do. Pictures are
    clips of one frame; those named like a volume or video are taken for previews of it.

    Raises:
        UserError: no such folder, or no clip with masks in it.
    """
    top = Path(folder).expanduser()
    if not top.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds clips and their masks")
    entries = [e for e in sorted(top.rglob("*")) if not e.name.startswith(".")]
    found = {e: e for e in entries if ending(e) == ".npz" and _has_both(e)}
    clips = [e for e in entries if _is_clip(e)]
    masks: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for entry in clips:
        if key := _mask_key(entry):
            masks[key].append(entry)
    for entry in (e for e in clips if _mask_key(e) is None):
        for key in _image_keys(entry):
            if mask := _mask_of(entry, masks.get(key, ())):
                found[entry] = mask
    names = {(e.parent, _stem(e)) for e in found if ending(e) not in _PICTURES}
    found = {e: m for e, m in found.items() if ending(e) not in _PICTURES or (e.parent, _stem(e)) not in names}
    if not found:
        raise UserError(
            f"{folder}: no clip with masks in it; allowed are NPZ with one of {', '.join(IMAGE_KEYS)} and one of "
            f"{', '.join(MASK_KEYS)}, or NAME.nii.gz (another clip, a picture, a folder) and NAME_mask.nii.gz"
        )
    return [LabelledClip(str((e.parent / _stem(e)).relative_to(top)), e, found[e]) for e in sorted(found)]


def open_masks(path: str | Path, info: ClipInfo | None = None, options: Mapping[str, Any] | None = None) -> Clip:
    """Masks as a clip of one channel: numbers of labels, also of palette images, of segments of a DICOM segmentation.

    Args:
        path: of the masks.
        info: of the clip that they belong to, in whose frames they come then; see `aligned`.
        options: of that clip's reader; masks are read with those that say how frames lie in a file.

    Raises:
        UserError: as `open_clip` and `aligned` do.
    """
    where = Path(path).expanduser()
    if segmentation := _segmentation(where):
        from vfmadapt.frames.read_dicom_seg import SegmentationClip

        return SegmentationClip(segmentation, info)
    shared = {} if options is None else {name: options[name] for name in _SHARED if name in options}
    if shared:
        known = options_of(where)
        shared = {name: value for name, value in shared.items() if name in known}
    if ending(where) == ".npz":
        shared["key"] = next((k for k in MASK_KEYS if k in _keys(where)), None)
    if where.is_dir() or ending(where) in (*IMAGES, ".gif"):
        shared["labels"] = True
    masks = _opened(where, shared)
    return masks if info is None else aligned(masks, info)


def _opened(path: Path, options: dict[str, Any]) -> Clip:
    """Masks of as many axes as their clip, or those of the one slice or moment that is taken from it."""
    chosen = {"slice", "time"} & options.keys()
    try:
        return open_clip(path, **options)
    except UserError:
        if not chosen:
            raise
        return open_clip(path, **{name: value for name, value in options.items() if name not in chosen})


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
        return any(f.suffix.lower() in IMAGES for f in path.iterdir()) or has_dicom(path)
    return ending(path) in _ENDINGS


def _mask_of(clip: Path, masks: Sequence[Path]) -> Path | None:
    """The last of the masks that can be those of a clip, rather one stored like it.

    A picture is the mask of a picture or of what may be one: beside volumes and videos lie previews.
    """
    pictures = (*_PICTURES, *_PAGES)
    fitting = [
        mask
        for mask in masks
        if (ending(mask) not in _PICTURES or ending(clip) in (*pictures, ".dcm"))
        and (ending(clip) not in _PICTURES or ending(mask) in pictures)
    ]
    return max(fitting, key=lambda mask: (ending(mask) == ending(clip), mask), default=None)


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


def _segmentation(path: Path) -> Path | None:
    """The file of a DICOM segmentation, which may be alone in its folder; None where the path is none."""
    files = [f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")] if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file() or not is_dicom(files[0]):
        return None
    from vfmadapt.frames.read_dicom_seg import is_segmentation

    return files[0] if is_segmentation(files[0]) else None
