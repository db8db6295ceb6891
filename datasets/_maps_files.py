"""Map sheets as PNG files. Here, and not in `maps_synthetic`, because processes that render do without torch."""

from dataclasses import dataclass
from pathlib import Path

from vfmadapt.datasets._maps_sheet import render_sheet
from vfmadapt.datasets._maps_styles import STYLES, TEST_STYLE
from vfmadapt.datasets._tiles import Job, atomic, tile_seed


@dataclass(frozen=True)
class MapJob(Job):
    """Tiles of one style, or of the styles that belong to their split where it is None."""

    style: str | None

    def image(self, split: str, index: int) -> Path:
        """Path of an image tile: folders as `data=geotiff_folder` reads them."""
        return self.folder / split / "images" / f"{index:05d}.png"

    def label(self, split: str, index: int) -> Path:
        """Path of a label tile."""
        return self.folder / split / "masks" / f"{index:05d}.png"


def write_tile(job: MapJob, split: str, index: int) -> None:
    """Render and write one tile."""
    from PIL import Image

    style = STYLES[job.style] if job.style else TEST_STYLE if split == "test" else None
    sheet = render_sheet(tile_seed(split, index, job.seed), size=(job.size, job.size), style=style)
    for path, pixels in ((job.image(split, index), sheet.image), (job.label(split, index), sheet.labels)):
        with atomic(path) as temporary:
            Image.fromarray(pixels).save(temporary)
