"""Images and masks that belong together, and the split that a file belongs to."""

import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vfmadapt.errors import UserError

logger = logging.getLogger(__name__)

SUFFIXES = frozenset((".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".vrt"))


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    id: str
    image: Path
    mask: Path


def match(images: Path, masks: Path, image_suffix: str, mask_suffix: str) -> list[Pair]:
    """Pairs of equal stem in two folders (or one), sorted by id.

    Raises:
        UserError: a folder is missing, two files have the same id, or an image has no mask.
    """
    if images == masks and image_suffix == mask_suffix:
        raise UserError(f"{images} holds images and masks: tell them apart with data.mask_suffix, for instance _mask")
    found = _by_id(images, image_suffix, not_suffix=mask_suffix if images == masks else "")
    labels = _by_id(masks, mask_suffix, not_suffix=image_suffix if images == masks else "")
    alone = sorted(set(found) - set(labels))
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        names = ", ".join(found[i].name for i in alone[:3])
        raise UserError(
            f"{names}{more} in {images}: no mask of that name in {masks} (data.mask_suffix={mask_suffix!r}); add it"
        )
    if len(labels) > len(found):
        logger.warning("%s: %d masks have no image and are left out", masks, len(labels) - len(found))
    return [Pair(i, found[i], labels[i]) for i in sorted(found)]


def split_of(name: str, val_fraction: float, test_fraction: float) -> str:
    """Split of a file: a hash of its name decides, so it stays there when other files come or go."""
    place = int.from_bytes(sha256(name.encode()).digest()[:8]) / 2**64
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


def _by_id(folder: Path, suffix: str, *, not_suffix: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it, or name yours with data.root, data.images and data.masks")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        other = bool(not_suffix) and path.stem.endswith(not_suffix)
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.stem.endswith(suffix) or other:
            continue
        name = path.stem.removesuffix(suffix)
        if name in found:
            raise UserError(f"{path} and {found[name].name} have the same name {name}; keep one of them")
        found[name] = path
    return found
