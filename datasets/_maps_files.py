"""Map sheets as PNG files. Here, and not in `maps_synthetic`, because processes that render do without torch."""

from dataclasses import dataclass

from vfmadapt.datasets._maps_sheet import render_sheet
from vfmadapt.datasets._maps_styles import STYLES, TEST_STYLE
from vfmadapt.datasets._png_tiles import PngJob
from vfmadapt.datasets._tiles import tile_seed


@dataclass(frozen=True)
class MapJob(PngJob):
    """Tiles of one style, or of the styles that belong to their split where it is None."""

    style: str | None


def write_tile(job: MapJob, split: str, index: int) -> None:
    """Render and write one tile."""
    style = STYLES[job.style] if job.style else TEST_STYLE if split == "test" else None
    sheet = render_sheet(tile_seed(split, index, job.seed), size=(job.size, job.size), style=style)
    job.write(split, index, sheet.image, sheet.labels)
