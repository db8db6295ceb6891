"""Radar scenes as PNG files. Here, and not in `radar_synthetic`, because processes that render do without torch."""

from vfmadapt.datasets._png_tiles import PngJob
from vfmadapt.datasets._radar_scene import render_scene
from vfmadapt.datasets._tiles import tile_seed


def write_tile(job: PngJob, split: str, index: int) -> None:
    """Render and write one tile."""
    scene = render_scene(tile_seed(split, index, job.seed), size=(job.size, job.size))
    job.write(split, index, scene.image, scene.labels)
