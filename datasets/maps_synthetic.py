"""`maps_synthetic`: procedural sheets that look like scanned historical maps, written as PNG tiles.

A sheet is drawn ink by ink in one of several styles (palette, signatures, type faces), printed with its faults on old
paper and scanned. Lines are labelled as annotators draw them: a railway from the outside of one rail to that of the
other, a road from casing to casing, a stream 5 pixels wide. Where features overlap, the label is that of the first of
railway, road, river, built-up, lake, vineyard. Single dashed lines (footpaths, boundaries) are background.

Training and validation sheets have palettes and signs drawn anew for each, or mixed from four styles, or are of the
first of these, which is drawn like the Siegfried map. Test sheets have a fifth style, from another range of seeds. A
sixth is there for few-shot adaptation: `style=field`. Scanned sheets have no CRS, so the samples have none.
"""

from pathlib import Path

from vfmadapt.contracts import ClassSpec, DataSpec, UserError
from vfmadapt.datasets._maps_files import MapJob, write_tile
from vfmadapt.datasets._maps_plates import NAMES
from vfmadapt.datasets._maps_sheet import VERSION, Sheet, render_sheet
from vfmadapt.datasets._maps_styles import STYLES, TEST_STYLE, TRAIN_STYLES
from vfmadapt.datasets._png_tiles import PngSource

__all__ = ["CLASSES", "STYLES", "TEST_STYLE", "TRAIN_STYLES", "VERSION", "MapsSynthetic", "Sheet", "render_sheet"]

_LINES = ("railway", "road", "river")
_COLOURS = (
    (240, 240, 240),
    (229, 57, 53),
    (251, 140, 0),
    (66, 165, 245),
    (142, 36, 170),
    (21, 101, 192),
    (84, 84, 84),
)
CLASSES = tuple(ClassSpec(name, colour, line=name in _LINES) for name, colour in zip(NAMES, _COLOURS, strict=True))

# (mean, std) of red, green, blue over render_sheet(seed) for seeds 9_000_000 .. 9_000_199; frozen with VERSION 5.
_MEAN, _STD = (0.688, 0.663, 0.582), (0.252, 0.247, 0.242)


class MapsSynthetic(PngSource):
    """Data source of procedural map sheets; `prepare` renders the tiles that are not there yet.

    Args:
        root: folder of the tiles; each generator version, style, seed and size has its own folder below.
        train: number of training tiles.
        val: number of validation tiles.
        test: number of test tiles.
        size: side of a tile in pixels.
        style: one for all splits; by default those of training sheets, and the test style.
        seed: another seed, other sheets.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        UserError: an unknown style, or a number out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: int = 600,
        val: int = 12,
        test: int = 40,
        size: int = 256,
        style: str | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if style is not None and style not in STYLES:
            raise UserError(f"data.style={style}: choose one of {', '.join(STYLES)}, or null (mixed, then survey)")
        if size < 64 or min(train, val, test) < 0 or seed < 0:
            raise UserError(f"maps_synthetic: size={size} must be >= 64, seed={seed} and the numbers of tiles >= 0")
        counts = {"train": train, "val": val, "test": test}
        folder = Path(root) / f"v{VERSION}_{style or 'styles'}_seed{seed}_{size}px"
        job = MapJob(folder, seed, size, counts, style)
        spec = DataSpec(f"maps_synthetic@{VERSION}", ("red", "green", "blue"), CLASSES, _MEAN, _STD)
        super().__init__(job, spec, write=write_tile, workers=workers)
