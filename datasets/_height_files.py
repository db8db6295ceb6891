"""Aerial scenes with heights as files. Here, and not in `height_synthetic`, because rendering does without torch."""

from vfmadapt.datasets._aerial_scene import render_scene
from vfmadapt.datasets._tiles import tile_seed
from vfmadapt.datasets._value_tiles import ValueJob


def write_tile(job: ValueJob, split: str, index: int) -> None:
    """Render and write one tile; region and camera of test tiles are those of no other."""
    scene = render_scene(tile_seed(split, index, job.seed), size=(job.size, job.size), test=split == "test")
    job.write(split, index, scene.image, scene.heights)
