"""Generated endoscopy as files. Here, and not in `endo_synthetic`, because processes that render do without torch."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vfmadapt.datasets._endo_clip import render_clip
from vfmadapt.datasets._tiles import Job, atomic, tile_seed


@dataclass(frozen=True)
class EndoJob(Job):
    """Clips of `frames` frames of `shape` pixels (H, W), seen by a camera of `fov` degrees across; `size` is W."""

    frames: int
    shape: tuple[int, int]
    fov: float

    def image(self, split: str, index: int, frame: int = 0) -> Path:
        """Path of a frame: RGB, 8 bits."""
        return self.folder / split / f"{index:04d}" / f"image_{frame:03d}.png"

    def depth(self, split: str, index: int, frame: int = 0) -> Path:
        """Path of a frame's depth: float16 (H, W), millimetres."""
        return self.folder / split / f"{index:04d}" / f"depth_{frame:03d}.npy"

    def label(self, split: str, index: int) -> Path:
        """Path of a clip's camera, the last of its files: poses (camera to world, millimetres) and intrinsics."""
        return self.folder / split / f"{index:04d}" / "camera.json"


def write_clip(job: EndoJob, split: str, index: int) -> None:
    """Render and write one clip."""
    from PIL import Image

    clip = render_clip(tile_seed(split, index, job.seed), frames=job.frames, size=job.shape, fov=job.fov)
    for frame, (image, depth) in enumerate(zip(clip.image, clip.depth, strict=True)):
        with atomic(job.image(split, index, frame)) as temporary:
            Image.fromarray(image).save(temporary)
        with atomic(job.depth(split, index, frame)) as temporary:
            np.save(temporary, depth.astype(np.float16))
    camera = {"poses": clip.poses.tolist(), "intrinsics": clip.intrinsics.tolist()}
    with atomic(job.label(split, index)) as temporary:
        temporary.write_text(json.dumps(camera))
