"""`height_synthetic`: procedural aerial photographs with the height of every roof and crown above the ground.

The scenes of `urban_synthetic`: roofs of several kinds, trees, streets, fields, under a sun whose shadows tell heights.
Facades have half their building's height. Test scenes are of a region and a camera that no training scene has.
"""

from pathlib import Path

from vfmadapt.contracts import DataSpec, UserError, ValueSpec
from vfmadapt.datasets._aerial_scene import VERSION
from vfmadapt.datasets._height_files import write_tile
from vfmadapt.datasets._value_tiles import GeneratedValues, ValueJob
from vfmadapt.datasets.urban_synthetic import MEAN, STD

__all__ = ["VERSION", "HeightSynthetic"]

# over render_scene(seed) for seeds 9_000_000 .. 9_000_007; frozen with VERSION 1
_HEIGHT = ValueSpec("height", "m", mean=2.0, std=5.0)


class HeightSynthetic(GeneratedValues):
    """Data source of procedural aerial scenes with heights; `prepare` renders the tiles that are not there yet.

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
        train: int = 80,
        val: int = 4,
        test: int = 16,
        size: int = 256,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if size < 64 or min(train, val, test, seed) < 0:
            raise UserError(f"height_synthetic: size={size} must be >= 64, seed={seed} and the numbers of tiles >= 0")
        counts = {"train": train, "val": val, "test": test}
        job = ValueJob(Path(root) / f"v{VERSION}_seed{seed}_{size}px", seed, size, counts)
        spec = DataSpec(f"height_synthetic@{VERSION}", ("red", "green", "blue"), (), MEAN, STD, values=(_HEIGHT,))
        super().__init__(job, spec, write=write_tile, workers=workers)
