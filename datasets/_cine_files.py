"""Generated clips as NPZ files. Here, and not in `cine_synthetic`, because processes that render do without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vfmadapt.datasets._cine_scene import render_clip
from vfmadapt.datasets._tiles import Job, atomic, tile_seed


@dataclass(frozen=True)
class CineJob(Job):
    """Clips of `frames` frames; `styles` and `test_styles` take turns within the training and the test split."""

    frames: int
    styles: tuple[str, ...]
    test_styles: tuple[str, ...]

    def image(self, split: str, index: int) -> Path:
        """Path of a clip: the layout of MedSAM2's volumes, labels included."""
        return self.folder / split / f"{self.style(split, index)}_{index:05d}.npz"

    def label(self, split: str, index: int) -> Path:
        """The same file."""
        return self.image(split, index)

    def style(self, split: str, index: int) -> str:
        """Style of a clip."""
        styles = self.test_styles if split == "test" else self.styles
        return styles[index % len(styles)]


def write_clip(job: CineJob, split: str, index: int) -> None:
    """Render and write one clip."""
    style = job.style(split, index)
    clip = render_clip(tile_seed(split, index, job.seed), style=style, frames=job.frames, size=job.size)
    step, row, column = clip.spacing
    facts: dict[str, Any] = {"spacing": np.array([column, row, step or 1.0])}
    if clip.seconds is not None:
        facts["seconds_per_frame"] = np.array(clip.seconds)
    with atomic(job.image(split, index)) as temporary:
        np.savez_compressed(temporary, imgs=clip.image, gts=clip.labels, **facts)
