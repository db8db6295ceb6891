"""Any clips with masks: NIfTI pairs, NPZ volumes, videos, folders of images, as their files lie."""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import UserError
from vfmadapt.datasets._clips import ClipData, ClipItem, Labels
from vfmadapt.datasets._pairs import split_of
from vfmadapt.datasets._tiles import SPLITS
from vfmadapt.frames import Clip
from vfmadapt.frames.images import IMAGES
from vfmadapt.frames.labelled import LabelledClip, label_map, labelled_clips
from vfmadapt.frames.reading import ending

_WHITE = 255


class ClipFolder(ClipData):
    """The clips in a folder, and in folders within, that have masks, as `labelled_clips` finds them.

    Pictures are clips of one frame. The label 255 is ignored, but in pictures of 0 and 255 alone it is the structure.
    Folders train, val and test at the top are the splits. Else a hash of the id decides, or `test` does.

    Args:
        root: the folder.
        classes: names in the order of the labels, the background first.
        window: the values that are shown black and white, for instance [-160, 240] Hounsfield units; None: those that
            each clip tells.
        test: ids of the clips that are for testing, all others are not; an id is a file's path without its ending.
        val_fraction: share of the other clips that validates.
        test_fraction: share that tests where `test` is None.
        bands: "grey", or "rgb" for the colours of photographs and endoscopy; None: grey.

    Raises:
        UserError: no such folder or id, or no clip for a split.
    """

    def __init__(
        self,
        root: str,
        *,
        classes: Sequence[str] = ("background", "structure"),
        window: Sequence[float] | None = None,
        test: Sequence[str] | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        bands: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(Path(root).name, classes, window, bands=bands)
        self.root, self._test = Path(root).expanduser(), test
        self._white: dict[LabelledClip, bool] = {}  # whether the masks are black and white
        self._fractions = (val_fraction, 0.0 if test is not None else test_fraction)

    def _items(self, split: str) -> Sequence[ClipItem]:
        return [ClipItem(c.id, partial(self._open, c)) for c in self._found if self._split(c.id) == split]

    def _open(self, pair: LabelledClip) -> tuple[Clip, Labels]:
        """A clip and its labels; of two classes, 255 is the second in pictures of 0 and 255 alone, else ignored."""
        clip, labels = open_pair(pair)
        if len(self._classes) > 2 or not (pair.masks.is_dir() or ending(pair.masks) in (*IMAGES, ".gif")):
            return clip, labels
        if pair not in self._white:
            values = {int(value) for index in range(len(clip)) for value in np.unique(labels(index))}
            self._white[pair] = _WHITE in values <= {0, _WHITE}
        return clip, partial(_drawn, labels) if self._white[pair] else labels

    @cached_property
    def _found(self) -> list[LabelledClip]:
        found = labelled_clips(self.root)
        known = {clip.id for clip in found}
        if missing := [i for i in self._test or () if i not in known]:
            raise UserError(f"data.test: {self.root} has no clip {missing[0]}; it has: {', '.join(sorted(known)[:8])}")
        return found

    def _split(self, clip: str) -> str:
        if (top := clip.split("/")[0]) in SPLITS:
            return top
        return "test" if clip in (self._test or ()) else split_of(clip, *self._fractions)


def _drawn(labels: Labels, frame: int) -> NDArray[np.integer]:
    return (labels(frame) > 0).astype(np.uint8)


def open_pair(pair: LabelledClip) -> tuple[Clip, Labels]:
    """A clip and its labels by frame."""
    clip, masks = pair.open()
    return clip, partial(label_map, masks)
