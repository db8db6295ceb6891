"""What the generated data sets of clips share: their files, and how styles are dealt out to splits."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vfmadapt.contracts import UserError
from vfmadapt.datasets._cine_files import CineJob, write_clip
from vfmadapt.datasets._clips import ClipData, ClipItem
from vfmadapt.datasets._tiles import write_missing
from vfmadapt.datasets.clip_folder import open_pair
from vfmadapt.frames.labelled import LabelledClip


class GeneratedClips(ClipData):
    """A source of generated clips; `prepare` renders those that are not there yet.

    Args:
        root: folder of the clips; each generator version and setting has its own folder below.
        name: of the data set.
        version: of its generator.
        classes: names in the order of the labels.
        statistics: mean and standard deviation of the frames.
        known: the styles that there are.
        styles: of training and validation clips, in turn; None for all.
        test_styles: of test clips; None: those of training.
        counts: number of clips by split.
        frames: frames of each clip.
        size: side of a frame in pixels.
        seed: another seed, other clips.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        UserError: an unknown style, or a number out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        name: str,
        version: int,
        classes: Sequence[str],
        statistics: tuple[float, float],
        known: Sequence[str],
        styles: Sequence[str] | None,
        test_styles: Sequence[str] | None,
        counts: dict[str, int],
        frames: int,
        size: int,
        seed: int,
        workers: int,
    ) -> None:
        super().__init__(f"{name}@{version}", classes, None, statistics)
        chosen = tuple(styles or known)
        tested = tuple(test_styles or chosen)
        if unknown := [style for style in (*chosen, *tested) if style not in known]:
            raise UserError(f"data.styles, data.test_styles: no style {unknown[0]}; choose from {', '.join(known)}")
        if size < 64 or frames < 1 or min(counts.values()) < 0 or seed < 0:
            raise UserError(
                f"{name}: size={size} must be >= 64, frames={frames} >= 1, seed={seed} and the numbers of clips >= 0"
            )
        folder = Path(root) / f"v{version}_{'-'.join(chosen)}_to_{'-'.join(tested)}_seed{seed}_{frames}x{size}px"
        self._job = CineJob(folder, seed, size, counts, frames, chosen, tested)
        self._workers = workers

    @property
    def folder(self) -> Path:
        """Where the clips are: SPLIT/STYLE_INDEX.npz."""
        return self._job.folder

    def prepare(self) -> None:
        """Render the clips that are missing; does nothing where all are there."""
        write_missing(self._job, write_clip, self._workers)

    def _items(self, split: str) -> Sequence[ClipItem]:
        paths = [self._job.image(split, index) for index in range(self._job.counts[split])]
        return [ClipItem(f"{split}/{p.stem}", partial(open_pair, LabelledClip(p.stem, p, p))) for p in paths]
