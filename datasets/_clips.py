"""What the data sets of clips share: clips with labels read a few frames at a time, and their frames as images."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.contracts import IGNORE_INDEX, ClassSpec, ClipSample, DataSpec, Sample, UserError
from vfmadapt.datasets._tiles import SPLITS
from vfmadapt.frames import Clip

Window = tuple[float, float]
Labels = Callable[[int], NDArray[np.integer]]

GREY, RGB = ("grey",), ("red", "green", "blue")
"""The bands that frames may have."""

_OPEN = 4  # clips kept open: to open a compressed one again means to decompress it again
_MEASURED = 64  # training frames from which mean and deviation are taken
_PALETTE = (
    (0, 0, 0), (229, 57, 53), (66, 165, 245), (102, 187, 106), (255, 202, 40), (171, 71, 188), (38, 198, 218),
    (255, 112, 67), (141, 110, 99), (236, 64, 122), (156, 204, 101), (92, 107, 192), (120, 144, 156),
)  # fmt: skip


def class_specs(names: Sequence[str]) -> tuple[ClassSpec, ...]:
    """Classes with colours; the first, the background, is black."""
    return tuple(ClassSpec(n, _PALETTE[i % len(_PALETTE)]) for i, n in enumerate(names))


def band_names(bands: Sequence[str] | str | None) -> tuple[str, ...]:
    """What `data.bands` means: "grey" or None, "rgb", or the same as a list of bands; raises UserError for others."""
    named: dict[str | tuple[str, ...], tuple[str, ...]] = {"grey": GREY, "rgb": RGB, GREY: GREY, RGB: RGB}
    wanted = "grey" if bands is None else bands if isinstance(bands, str) else tuple(bands)
    if wanted not in named:
        raise UserError(f"data.bands={bands}: the frames of clips are grey or rgb; write data.bands=rgb for colour")
    return named[wanted]


@dataclass(frozen=True)
class ClipItem:
    """A clip that is not open yet.

    `open` gives the clip and its labels (H, W) by frame; `labelled`: the frames that have labels, None for all.
    """

    id: str
    open: Callable[[], tuple[Clip, Labels]]
    labelled: tuple[int, ...] | None = None


class LabelledClips:
    """The clips of one split.

    Args:
        items: the clips.
        classes: how many there are; other labels but IGNORE_INDEX are refused.
        window: the values that are black and white; None: each clip's own.
        bands: `GREY`, which of several channels is their mean, or `RGB`, which of one channel is three times the same.
    """

    def __init__(
        self, items: Sequence[ClipItem], classes: int, window: Window | None, bands: tuple[str, ...] = GREY
    ) -> None:
        self.items, self.classes, self.window, self.bands = tuple(items), classes, window, bands
        self._opened: OrderedDict[int, tuple[Clip, Labels, Window]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> ClipSample:
        return self.read(index, range(len(self._clip(index)[0])))

    def labelled(self, index: int) -> Sequence[int]:
        """The frames of a clip that have labels."""
        known = self.items[index].labelled
        return range(len(self._clip(index)[0])) if known is None else known

    def read(self, index: int, frames: Sequence[int]) -> ClipSample:
        """Some frames of a clip, in the order given; UserError for labels that are no class, or what is no colour."""
        clip, labels, (black, white) = self._clip(index)
        images = np.stack([self._coloured(clip, f) for f in frames])
        masks = np.stack([labels(f) for f in frames]).astype(np.int64)
        if strange := sorted(set(np.unique(masks).tolist()) - {*range(self.classes), IGNORE_INDEX}):
            raise UserError(
                f"{clip.info.path} has the labels {strange[:8]}; allowed are 0 to {self.classes - 1} and "
                f"{IGNORE_INDEX} (ignore); name more data.classes"
            )
        shown = np.clip((images - black) / (white - black), 0, 1).astype(np.float32)
        return ClipSample(
            image=torch.from_numpy(shown),
            mask=torch.from_numpy(masks),
            spacing=clip.info.spacing,
            id=self.items[index].id,
        )

    def _coloured(self, clip: Clip, index: int) -> NDArray[np.float32]:
        """A frame with the bands wanted, (C, H, W)."""
        frame = clip.frame(index)
        if self.bands == GREY:
            return frame.mean(0, keepdims=True)
        if len(frame) not in (1, len(RGB)):
            raise UserError(f"{clip.info.path} has {len(frame)} channels; colour has three: leave out data.bands=rgb")
        return np.broadcast_to(frame, (len(RGB), *frame.shape[1:]))

    def _clip(self, index: int) -> tuple[Clip, Labels, Window]:
        if index in self._opened:
            self._opened.move_to_end(index)
            return self._opened[index]
        clip, labels = self.items[index].open()
        self._opened[index] = (clip, labels, self.window or clip.window())
        if len(self._opened) > _OPEN:
            self._opened.popitem(last=False)
        return self._opened[index]


class _Frames:
    """The labelled frames of clips as samples, those of a clip one after the other."""

    def __init__(self, clips: LabelledClips) -> None:
        self.clips = clips
        self._places = [(i, frame) for i in range(len(clips)) for frame in clips.labelled(i)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        clip, frame = self._places[index]
        read = self.clips.read(clip, [frame])
        return Sample(
            image=read["image"][0],
            mask=read["mask"][0],
            valid=torch.ones(read["mask"].shape[1:], dtype=torch.bool),
            id=f"{read['id']}/{frame:04d}",
            bands=self.clips.bands,
            spacing=read["spacing"],
        )


class ClipData:
    """A source of clips, and of their frames; subclasses say which there are.

    Args:
        name: of the data set.
        classes: names in the order of the labels, the background first.
        window: the values that are shown black and white; None: those that each clip tells.
        statistics: mean and standard deviation of the frames, 0 black and 1 white; None: measured on training frames.
        bands: see `band_names`.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        window: Sequence[float] | None,
        statistics: tuple[float, float] | None = None,
        bands: Sequence[str] | str | None = None,
    ) -> None:
        if window is not None and (len(window) != 2 or window[0] == window[1]):
            raise UserError(
                f"data.window={[*window]}: give the values that are black and white, for instance [-160,240]"
            )
        self._name, self._classes, self._statistics = name, tuple(classes), statistics
        self._window = None if window is None else (float(window[0]), float(window[1]))
        self._bands = band_names(bands)

    @cached_property
    def spec(self) -> DataSpec:
        """A grey band, or three of colour, from 0 (black) to 1 (white), and the classes."""
        given = self._statistics
        mean, std = self._measured() if given is None else ((value,) * len(self._bands) for value in given)
        return DataSpec(self._name, self._bands, class_specs(self._classes), mean, std)

    def prepare(self) -> None:
        """Look for the clips; raises UserError where there are none."""
        self._checked("train")

    def clips(self, name: str) -> LabelledClips:
        """The clips of "train", "val" or "test"; UserError where there are none."""
        return LabelledClips(self._checked(name), len(self._classes), self._window, self._bands)

    def split(self, name: str) -> _Frames:
        """The labelled frames of "train", "val" or "test" one by one."""
        return _Frames(self.clips(name))

    def _items(self, split: str) -> Sequence[ClipItem]:
        raise NotImplementedError  # abstract

    def _checked(self, name: str) -> Sequence[ClipItem]:
        if name not in SPLITS:
            raise UserError(f"{self._name} has no split {name!r}: choose one of {', '.join(SPLITS)}")
        if items := self._items(name):
            return items
        raise UserError(f"{self._name}: no clip is for {name}; add clips, or change how data.* shares them out")

    def _measured(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each band."""
        frames = self.split("train")
        chosen = np.unique(np.linspace(0, len(frames) - 1, _MEASURED).astype(int))
        values = torch.cat([frames[int(i)]["image"].flatten(1) for i in chosen], 1)
        return tuple(values.mean(1).tolist()), tuple(values.std(1).clamp(min=1e-3).tolist())
