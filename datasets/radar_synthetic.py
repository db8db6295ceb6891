"""`radar_synthetic`: procedural scenes as an X-band radar sees them, PNG tiles with VV, VH and their ratio as colours.

A domain that no version of `vfm_tiny` ever saw. Open land, cropland with its rows, forest, water and towns, on relief
that brightens one flank, under speckle. The gain of every scene is another, so texture and shape must tell.
"""

from pathlib import Path

from vfmadapt.contracts import ClassSpec, DataSpec, UserError
from vfmadapt.datasets._png_tiles import PngJob, PngSource
from vfmadapt.datasets._radar_files import write_tile
from vfmadapt.datasets._radar_scene import NAMES, VERSION, RadarScene, render_scene

__all__ = ["CLASSES", "VERSION", "RadarScene", "RadarSynthetic", "render_scene"]

_COLOURS = ((205, 190, 140), (240, 210, 80), (30, 130, 60), (40, 100, 200), (210, 50, 60))
CLASSES = tuple(ClassSpec(name, colour) for name, colour in zip(NAMES, _COLOURS, strict=True))

# (mean, std) of VV, VH and ratio over render_scene(seed) for seeds 9_000_000 .. 9_000_199; frozen with VERSION 2.
_MEAN, _STD = (0.534, 0.528, 0.435), (0.143, 0.134, 0.222)


class RadarSynthetic(PngSource):
    """Data source of procedural radar scenes; `prepare` renders the tiles that are not there yet.

    Args:
        root: folder of the tiles; each generator version, seed and size has its own folder below.
        train: number of training tiles.
        val: number of validation tiles.
        test: number of test tiles.
        size: side of a tile in pixels.
        seed: another seed, other scenes.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: int = 300,
        val: int = 12,
        test: int = 40,
        size: int = 256,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if size < 64 or min(train, val, test) < 0 or seed < 0:
            raise UserError(f"radar_synthetic: size={size} must be >= 64, seed={seed} and the numbers of tiles >= 0")
        job = PngJob(
            Path(root) / f"v{VERSION}_seed{seed}_{size}px", seed, size, {"train": train, "val": val, "test": test}
        )
        spec = DataSpec(f"radar_synthetic@{VERSION}", ("red", "green", "blue"), CLASSES, _MEAN, _STD)
        super().__init__(job, spec, write=write_tile, workers=workers)
