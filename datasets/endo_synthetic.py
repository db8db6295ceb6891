"""`endo_synthetic`: procedural endoscopy video with exact depth, poses and intrinsics.

A bent tube with haustral folds, vessels, polyps and a blind end, seen by a pinhole camera whose two lamps move with it:
light falls off with the square of distance, the wet wall glitters, motion blurs. Between neighbouring frames the
optical axis turns by more than 6 degrees, without which a focal length could not be observed. Test scenes come from
another range of seeds.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vfmadapt.contracts import DataSpec, DepthSample, FrameTriple, UserError, ValueSpec
from vfmadapt.datasets._endo_clip import VERSION
from vfmadapt.datasets._endo_files import EndoJob, write_clip
from vfmadapt.datasets._endo_path import relative
from vfmadapt.datasets._generated import GeneratedTiles, read_picture

__all__ = ["BANDS", "VERSION", "EndoSynthetic"]

BANDS = ("red", "green", "blue")

# (mean, std) of red, green, blue over two frames of 20 clips, seeds 9_000_000 on; frozen with VERSION 1.
_MEAN, _STD = (0.598, 0.362, 0.309), (0.217, 0.153, 0.133)

# of the logarithm of depth, over 72 training frames of the default set
_DEPTH = ValueSpec("depth", "mm", mean=3.3, std=0.5, log=True)


@dataclass(frozen=True)
class _Frames:
    """One split, frame by frame: index -> DepthSample."""

    job: EndoJob
    name: str

    def __len__(self) -> int:
        return self.job.counts[self.name] * self.job.frames

    def __getitem__(self, index: int) -> DepthSample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        clip, frame = divmod(index, self.job.frames)
        image = _image(self.job, self.name, clip, frame)
        return DepthSample(
            image=image,
            depth=_depth(self.job, self.name, clip, frame),
            valid=torch.ones(image.shape[1:], dtype=torch.bool),
            id=f"{self.name}/{clip:04d}/{frame:03d}",
            bands=BANDS,
        )


@dataclass(frozen=True)
class _Triples:
    """One split, each frame with those before and after it: index -> FrameTriple."""

    job: EndoJob
    name: str

    def __len__(self) -> int:
        return self.job.counts[self.name] * (self.job.frames - 2)

    def __getitem__(self, index: int) -> FrameTriple:
        if not 0 <= index < len(self):
            raise IndexError(index)
        clip, before = divmod(index, self.job.frames - 2)
        around = (before, before + 2)
        camera = json.loads(self.job.label(self.name, clip).read_text())
        poses = np.asarray(camera["poses"])
        moves = np.stack([relative(poses[before + 1], poses[source]) for source in around])
        return FrameTriple(
            image=_image(self.job, self.name, clip, before + 1),
            sources=torch.stack([_image(self.job, self.name, clip, source) for source in around]),
            depth=_depth(self.job, self.name, clip, before + 1),
            poses=torch.from_numpy(moves.astype(np.float32)),
            intrinsics=torch.tensor(camera["intrinsics"]),
            id=f"{self.name}/{clip:04d}/{before + 1:03d}",
        )


class EndoSynthetic(GeneratedTiles):
    """Data source of generated endoscopy; `prepare` renders the clips that are not there yet.

    Args:
        root: folder of the clips; each generator version and setting has its own folder below.
        train: number of training clips.
        val: number of validation clips.
        test: number of test clips.
        frames: frames of each clip.
        size: (H, W) of a frame in pixels.
        fov: horizontal field of view, degrees.
        pairs: give each frame with those before and after it, poses and intrinsics, instead of frames one by one.
        seed: another seed, other clips.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: int = 36,
        val: int = 2,
        test: int = 8,
        frames: int = 12,
        size: Sequence[int] = (128, 160),
        fov: float = 80.0,
        pairs: bool = False,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if len(size) != 2 or min(size) < 32 or not 70 <= fov <= 120 or frames < 3 or min(train, val, test, seed) < 0:
            raise UserError(
                f"endo_synthetic: size={[*size]} is (H, W), each at least 32, fov={fov} 70 to 120 degrees, "
                f"frames={frames} at least 3, seed={seed} and the numbers of clips at least 0"
            )
        shape, counts = (int(size[0]), int(size[1])), {"train": train, "val": val, "test": test}
        folder = Path(root) / f"v{VERSION}_seed{seed}_{frames}x{shape[0]}x{shape[1]}px_{fov:g}deg"
        job = EndoJob(folder, seed, shape[1], counts, frames, shape, fov)
        spec = DataSpec(f"endo_synthetic@{VERSION}", BANDS, (), _MEAN, _STD, values=(_DEPTH,))
        super().__init__(job, spec, write=write_clip, workers=workers)
        self._clips, self._pairs = job, pairs

    @property
    def values(self) -> tuple[ValueSpec, ...]:
        """Depth in millimetres."""
        return self._spec.values

    def split(self, name: str) -> _Frames | _Triples:
        """The frames of "train", "val" or "test"; raises UserError for another name."""
        self.check_split(name)
        return _Triples(self._clips, name) if self._pairs else _Frames(self._clips, name)


def _image(job: EndoJob, split: str, clip: int, frame: int) -> Tensor:
    """A frame, float32 (3, H, W) in 0..1."""
    return torch.from_numpy(read_picture(job.image(split, clip, frame)))


def _depth(job: EndoJob, split: str, clip: int, frame: int) -> Tensor:
    """A frame's depth, float32 (H, W) in millimetres."""
    return torch.from_numpy(np.load(job.depth(split, clip, frame)).astype(np.float32))
