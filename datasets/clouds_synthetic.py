"""`clouds_synthetic`: procedural satellite scenes with thick clouds, thin clouds and shadows, written as GeoTIFF tiles.

A scene is a mixture of land covers under cloud layers of power-law optical depth, lit and shadowed by one sun, seen by
a sensor of random stretch, cast and sharpness. Test scenes come from another range of seeds and from a sensor that no
training scene has.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vfmadapt.contracts import IGNORE_INDEX, ClassSpec, DataSpec, Sample, UserError
from vfmadapt.datasets._clouds_files import COLOURS, scene_of, write_scene, write_tile
from vfmadapt.datasets._clouds_scene import VERSION, Scene, render_scene
from vfmadapt.datasets._clouds_sensor import TEST_PRESET, TRAIN_PRESETS, Preset
from vfmadapt.datasets._clouds_spectra import BANDS
from vfmadapt.datasets._generated import GeneratedTiles
from vfmadapt.datasets._tiles import Job

__all__ = [
    "BANDS",
    "CLASSES",
    "TEST_PRESET",
    "TRAIN_PRESETS",
    "VERSION",
    "CloudsSynthetic",
    "Preset",
    "Scene",
    "render_scene",
    "scene_of",
    "write_scene",
]

CLASSES = tuple(
    ClassSpec(name, COLOURS[value]) for value, name in enumerate(("clear", "thick cloud", "thin cloud", "shadow"))
)

# Per-band (mean, std) over the valid pixels of render_scene(seed, size=(128, 128)) for seeds 9_000_000 .. 9_000_399,
# that is, over all training sensors; frozen with VERSION 1.
_STATISTICS = {
    "blue": (0.562, 0.234),
    "green": (0.558, 0.235),
    "red": (0.526, 0.239),
    "nir": (0.468, 0.190),
    "swir1": (0.438, 0.197),
    "swir2": (0.417, 0.207),
}


@dataclass(frozen=True)
class _Tiles:
    """One split: index -> Sample, of the asked bands only."""

    job: Job
    name: str
    bands: tuple[str, ...]

    def __len__(self) -> int:
        return self.job.counts[self.name]

    def __getitem__(self, index: int) -> Sample:
        import rasterio

        if not 0 <= index < len(self):
            raise IndexError(index)
        path = self.job.image(self.name, index)
        if not path.exists():
            raise UserError(f"{path} is not there: call prepare() of the data source first")
        with rasterio.open(path) as file:
            numbers = file.read([file.descriptions.index(band) + 1 for band in self.bands])
            valid = (numbers != file.nodata).all(axis=0)
            image = numbers.astype(np.float32) * np.float32(file.scales[0])
            crs, transform = file.crs.to_wkt(), tuple(file.transform)[:6]
        with rasterio.open(self.job.label(self.name, index)) as file:
            mask = file.read(1).astype(np.int64)
        image[:, ~valid] = 0
        mask[~valid] = IGNORE_INDEX
        return Sample(
            image=torch.from_numpy(image),
            mask=torch.from_numpy(mask),
            valid=torch.from_numpy(valid),
            id=f"{self.name}/{index:05d}",
            bands=self.bands,
            crs=crs,
            transform=transform,
        )


class CloudsSynthetic(GeneratedTiles):
    """Data source of procedural cloud scenes; `prepare` renders the tiles that are not there yet.

    Args:
        root: folder of the tiles; each generator version, seed and size has its own folder below.
        train: number of training tiles.
        val: number of validation tiles.
        test: number of test tiles.
        size: side of a tile in pixels.
        bands: band names, in the order wanted, of blue, green, red, nir, swir1, swir2.
        seed: another seed, other scenes.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        UserError: an unknown band, or a number out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: int = 320,
        val: int = 40,
        test: int = 60,
        size: int = 256,
        bands: tuple[str, ...] | list[str] = ("red", "green", "blue"),
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        unknown = [band for band in bands if band not in BANDS]
        if unknown or not bands:
            raise UserError(
                f"clouds_synthetic has no band {unknown[0] if unknown else ''!r}: choose bands of {', '.join(BANDS)}"
            )
        if size < 32 or min(train, val, test) < 0 or seed < 0:
            raise UserError(f"clouds_synthetic: size={size} must be >= 32, seed={seed} and the numbers of tiles >= 0")
        counts = {"train": train, "val": val, "test": test}
        job = Job(Path(root) / f"v{VERSION}_seed{seed}_{size}px", seed, size, counts)
        spec = DataSpec(
            name=f"clouds_synthetic@{VERSION}",
            bands=tuple(bands),
            classes=CLASSES,
            mean=tuple(_STATISTICS[band][0] for band in bands),
            std=tuple(_STATISTICS[band][1] for band in bands),
        )
        super().__init__(job, spec, write=write_tile, workers=workers)

    def split(self, name: str) -> _Tiles:
        """The tiles of "train", "val" or "test"; raises UserError for another name."""
        self.check_split(name)
        return _Tiles(self._job, name, self._spec.bands)
