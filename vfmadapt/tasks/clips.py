"""Loaders over labelled clips: short pieces of them for training, whole ones for measuring."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vfmadapt.contracts import IGNORE_INDEX, Clips, ClipSample, ClipSource
from vfmadapt.errors import UserError
from vfmadapt.tasks.data import Draw, EpochSampler, draw_generator, drawn
from vfmadapt.tracking.regions import around
from vfmadapt.tracking.tracker import pictures

_TRIES = 8  # pieces are drawn until one begins with a structure
_ASIDE = 0.1  # of a window's side, that its structure is off the middle, at most
_SLIVER = 0.001  # of a frame: a quarter of a cell of the memory where a frame is 128 px


class Pieces(Dataset[dict[str, Tensor]]):
    """Pieces of clips as a model sees them: `image` (T, 3, S, S) from 0 to 1, `mask` int64 (T, S, S).

    A piece runs over labelled frames, forwards or backwards; where a clip has fewer, it turns round at the ends.

    Args:
        clips: of the training split.
        chosen: those of them that are drawn from.
        length: T.
        side: S.
        flips: mirror half of the pieces, along each axis.
        radiometric: how far brightness, contrast and gamma are changed; 0 for not at all.
        focus: a piece shows a square around one of its structures, at least and at most so many times as wide as that
            is in the first frame; None for whole frames.
        gap: of frames that follow one another in a piece, at most; a draw per piece.
        leave: share of the pieces in which a structure of the first frame is missing later, where a clip has such.
        seed: of every draw.
    """

    def __init__(
        self,
        clips: Clips,
        chosen: list[int],
        *,
        length: int,
        side: int,
        flips: bool,
        radiometric: float,
        focus: tuple[float, float] | None,
        gap: int,
        leave: float,
        seed: int,
    ) -> None:
        self.clips, self.chosen, self.length, self.side = clips, chosen, length, side
        self.flips, self.radiometric, self.focus, self.gap, self.leave = flips, radiometric, focus, gap, leave
        self.seed = seed

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        index = self.chosen[draw.sample]
        rng = draw_generator(self.seed, draw.epoch, draw.turn, str(index))
        labelled = list(self.clips.labelled(index))
        leaves = rng.random() < self.leave
        for _ in range(_TRIES):
            sample = self.clips.read(index, _run(rng, labelled, self.length, self.gap))
            shown = sample["mask"][0]
            if leaves:
                shown = torch.where(torch.isin(shown, lost_labels(sample["mask"])), shown, 0)
            if has_structure(shown):
                break
        window = (slice(None), slice(None)) if self.focus is None else _window(rng, shown, self.focus)
        image = pictures(sample["image"][..., *window], (0.0, 1.0), self.side)
        mask = F.interpolate(sample["mask"][:, None, *window].float(), size=(self.side, self.side)).long()[:, 0]
        mask = _without_slivers(mask)
        for axis in (-1, -2):
            if self.flips and rng.random() < 0.5:
                image, mask = image.flip(axis), mask.flip(axis)
        return {"image": self._shaded(rng, image), "mask": mask}

    def _shaded(self, rng: np.random.Generator, image: Tensor) -> Tensor:
        """Another brightness, contrast and gamma, the same for all frames."""
        level, contrast, gamma = self.radiometric * rng.uniform(-1, 1, 3)
        changed = (image - 0.5) * float(np.exp(0.4 * contrast)) + 0.5 + 0.2 * float(level)
        return changed.clamp(1e-3, 1) ** float(np.exp(0.5 * gamma))


def _run(rng: np.random.Generator, labelled: list[int], length: int, gap: int) -> list[int]:
    """`length` of the labelled frames, at most `gap` apart, from a random one on, either way."""
    step = int(rng.integers(gap)) + 1
    labelled = labelled[int(rng.integers(step)) :: step] or labelled
    there_and_back = [*labelled, *labelled[-2:0:-1]] if len(labelled) < length else labelled
    order = there_and_back * -(-length // len(there_and_back))
    first = int(rng.integers(len(order) - length + 1))
    run = order[first : first + length]
    return run[::-1] if rng.random() < 0.5 else run


def _window(rng: np.random.Generator, mask: Tensor, focus: tuple[float, float]) -> tuple[slice, slice]:
    """Rows and columns of a square around one of the structures of a frame (H, W), `focus` times as wide as it."""
    height, width = mask.shape
    labels = [int(label) for label in mask.unique() if label not in (0, IGNORE_INDEX)]
    if not labels:
        return slice(0, height), slice(0, width)
    rows, columns = (mask == labels[rng.integers(len(labels))]).nonzero().T
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    wide, (x, y) = np.exp(rng.uniform(*np.log(focus))), rng.uniform(-_ASIDE, _ASIDE, 2)
    return around(box, (height, width), float(wide), (float(x), float(y))).window


def _without_slivers(mask: Tensor) -> Tensor:
    """A label map (T, S, S) without the structures of which the first frame shows too little to be asked for."""
    labels, counts = mask[0].unique(return_counts=True)
    few = labels[(counts < mask[0].numel() * _SLIVER) & (labels != IGNORE_INDEX)]
    return torch.where(torch.isin(mask, few), 0, mask)


def lost_labels(mask: Tensor) -> Tensor:
    """Labels in the first frame of a label map (T, H, W) that a later frame lacks."""
    kept = [frame.unique() for frame in mask[1:]]
    first = mask[0].unique()
    return first[[not all(label in frame for frame in kept) for label in first]]


def has_structure(mask: Tensor, ignored: int = IGNORE_INDEX) -> bool:
    """Whether a label map has a label that is neither background nor ignored."""
    return bool(((mask > 0) & (mask != ignored)).any())


class TrackingData(LightningDataModule):
    """Train, val and test loaders over a source of clips.

    Args:
        source: gives spec and clips; prepared by the caller.
        side: of the model's frames, in pixels.
        clip: frames of a training piece (DD-SAM2: 8).
        batch_size: pieces per step and process.
        steps_per_epoch: batches of an epoch; None: one piece of each clip.
        num_workers: processes that load.
        flips: mirror pieces.
        radiometric: how far brightness, contrast and gamma are changed, 0 to 1.
        focus: least and greatest width of the square that a piece shows, in widths of a structure; None: whole frames.
        gap: between the frames of a piece, at most: faster motion, and more structures that vanish.
        leave: share of the pieces that show a structure vanish, where a clip has one that does; 0: as they come.
        shots: train on this many clips alone, the first of an order that the seed draws.
        seed: of every draw.

    Raises:
        UserError: a source without clips, a split without one, fewer clips than shots, an impossible setting.
    """

    def __init__(
        self,
        source: Any,
        *,
        side: int,
        clip: int = 8,
        batch_size: int = 2,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        flips: bool = True,
        radiometric: float = 0.5,
        focus: tuple[float, float] | None = None,
        gap: int = 1,
        leave: float = 0.0,
        shots: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(source, ClipSource):
            raise UserError(f"task=tracking learns from clips, {source.spec.name} has images; take data=cine_synthetic")
        if not (focus is None or (len(focus) == 2 and 1 <= focus[0] <= focus[1])) or gap < 1 or not 0 <= leave <= 1:
            raise UserError(
                f"augment.focus={focus} gap={gap} leave={leave}: focus is null or the least and the greatest width of "
                "a window in widths of a structure, from 1; gap is at least 1; leave is a share, 0 to 1"
            )
        if clip < 2 or batch_size < 1 or (steps_per_epoch or 1) < 1 or num_workers < 0 or seed < 0:
            raise UserError(
                f"loader.clip={clip} batch_size={batch_size} steps_per_epoch={steps_per_epoch} "
                f"num_workers={num_workers} seed={seed}; clip is at least 2, batch_size and steps_per_epoch at least "
                "1, num_workers and seed at least 0"
            )
        self.source, self.side, self.clip, self.seed = source, side, clip, seed
        self.batch_size, self.steps_per_epoch, self.num_workers = batch_size, steps_per_epoch, num_workers
        self.flips, self.radiometric, self.gap, self.leave = flips, radiometric, gap, leave
        self.focus = None if focus is None else (float(focus[0]), float(focus[1]))
        self.shots = shots

    def samples(self, split: str) -> Clips:
        """The clips of "train", "val" or "test", whole and unaugmented."""
        clips = self.source.clips(split)
        if not len(clips):
            raise UserError(f"{self.source.spec.name}: the {split} split holds no clip; look at the folder and data.*")
        return clips

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Augmented pieces in the order of (seed, epoch)."""
        clips = self.samples("train")
        if self.shots is None:  # in the order in which the package's weights were trained
            chosen = [int(i) for i in np.random.default_rng(self.seed).permutation(len(clips))]
        else:
            chosen = [*drawn(self.shots, len(clips), seed=self.seed, name=self.source.spec.name, what="clips")]
        pieces = Pieces(
            clips,
            chosen,
            length=self.clip,
            side=self.side,
            flips=self.flips,
            radiometric=self.radiometric,
            focus=self.focus,
            gap=self.gap,
            leave=self.leave,
            seed=self.seed,
        )
        draws = None if self.steps_per_epoch is None else self.steps_per_epoch * self.batch_size
        sampler = EpochSampler(len(chosen), draws=draws, seed=self.seed)
        return self._loader(
            pieces, batch_size=self.batch_size, sampler=sampler, drop_last=len(sampler) >= self.batch_size
        )

    def val_dataloader(self) -> DataLoader[ClipSample]:
        """Whole clips of the val split."""
        return self._loader(self.samples("val"), batch_size=None)

    def test_dataloader(self) -> DataLoader[ClipSample]:
        """Whole clips of the test split."""
        return self._loader(self.samples("test"), batch_size=None)

    def _loader(self, samples: Any, **settings: Any) -> DataLoader[Any]:
        return DataLoader(
            samples,
            generator=torch.Generator().manual_seed(self.seed),  # or each start would draw from torch's own
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **settings,
        )
