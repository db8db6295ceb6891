"""`rooms_synthetic`: procedural rooms with furniture and things on the floor, and the depth of every pixel.

Boxes, ellipsoids, cylinders and tables of any colour and texture, seen at the height of a sitting or standing person by
cameras of 45 to 75 degrees, lit by one lamp with its shadows. For relative depth of indoor photographs.
"""

from pathlib import Path

from vfmadapt.contracts import DataSpec, UserError, ValueSpec
from vfmadapt.datasets._rooms_scene import VERSION, write_tile
from vfmadapt.datasets._value_tiles import GeneratedValues, ValueJob

__all__ = ["VERSION", "RoomsSynthetic"]

# (mean, std) of red, green, blue, and of log depth, over render_room(seed) for seeds 9_000_000 .. 9_000_009
_MEAN, _STD = (0.615, 0.594, 0.613), (0.181, 0.177, 0.181)
_DEPTH = ValueSpec("depth", "m", mean=1.1, std=0.46, log=True)


class RoomsSynthetic(GeneratedValues):
    """Data source of procedural rooms; `prepare` renders the tiles that are not there yet.

    Args:
        root: folder of the tiles; each generator version, seed and size has its own folder below.
        train: number of training tiles.
        val: number of validation tiles.
        test: number of test tiles.
        size: width of a tile in pixels, half as much again as its height.
        seed: another seed, other rooms.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: int = 200,
        val: int = 6,
        test: int = 16,
        size: int = 192,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if size < 48 or min(train, val, test, seed) < 0:
            raise UserError(f"rooms_synthetic: size={size} must be >= 48, seed={seed} and the numbers of tiles >= 0")
        counts = {"train": train, "val": val, "test": test}
        job = ValueJob(Path(root) / f"v{VERSION}_seed{seed}_{size}px", seed, size, counts)
        spec = DataSpec(f"rooms_synthetic@{VERSION}", ("red", "green", "blue"), (), _MEAN, _STD, values=(_DEPTH,))
        super().__init__(job, spec, write=write_tile, workers=workers, kind="depth")
