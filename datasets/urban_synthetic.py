"""`urban_synthetic` and `landcover_synthetic`: procedural aerial photographs of towns and farmland, as PNG tiles.

A scene is a plan of streets and blocks. Blocks hold houses in gardens, old town, estates, halls, car parks, parks,
fields, woods or bare soil; rivers run through; a sun gives everything its shadow, a camera its haze, colours and noise.
The ground sample distance varies from 0.35 to 0.9 m. Many things share a material and differ in their class: streets,
car parks and flat roofs; rivers, pools and shadows; fields, lawns and earth.

Test scenes come from another range of seeds, from a region whose roofs, trees and soils are mixed as in no training
region, and from another camera. Both entries share the tiles: they differ in how the classes are named.
"""

from pathlib import Path

from vfmadapt.contracts import DataSpec, UserError
from vfmadapt.datasets._aerial_files import write_tile
from vfmadapt.datasets._aerial_scene import TEST_REGION, TRAIN_REGIONS, VERSION, AerialScene, render_scene
from vfmadapt.datasets._landcover import class_set
from vfmadapt.datasets._png_tiles import PngJob, PngSource

__all__ = ["TEST_REGION", "TRAIN_REGIONS", "VERSION", "AerialScene", "UrbanSynthetic", "render_scene"]

# (mean, std) of red, green, blue over render_scene(seed) for seeds 9_000_000 .. 9_000_199, that is, over all training
# regions; frozen with VERSION 1.
MEAN, STD = (0.494, 0.491, 0.434), (0.191, 0.168, 0.162)


class UrbanSynthetic(PngSource):
    """Data source of procedural aerial scenes; `prepare` renders the tiles that are not there yet.

    Args:
        root: folder of the tiles; each generator version, seed and size has its own folder below.
        classes: urban (other, building, road, water) or landcover (LoveDA's seven).
        train: number of training tiles.
        val: number of validation tiles.
        test: number of test tiles.
        size: side of a tile in pixels.
        seed: another seed, other scenes.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        UserError: an unknown class set, or a number out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        classes: str = "urban",
        train: int = 300,
        val: int = 12,
        test: int = 40,
        size: int = 256,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if size < 64 or min(train, val, test) < 0 or seed < 0:
            raise UserError(f"urban_synthetic: size={size} must be >= 64, seed={seed} and the numbers of tiles >= 0")
        named, counts = class_set(classes), {"train": train, "val": val, "test": test}
        job = PngJob(Path(root) / f"v{VERSION}_seed{seed}_{size}px", seed, size, counts)
        spec = DataSpec(f"{classes}_synthetic@{VERSION}", ("red", "green", "blue"), named.classes, MEAN, STD)
        super().__init__(job, spec, write=write_tile, workers=workers, labels=named.labels)
