"""EchoNet-Dynamic: apical four-chamber videos, the left ventricle traced in two frames of each."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import IGNORE_INDEX, UserError
from vfmadapt.datasets._clips import ClipData, ClipItem, Labels
from vfmadapt.frames import Clip, open_clip

Tracing = NDArray[np.float64]


class EchoNet(ClipData):
    """Videos/NAME.avi with FileList.csv (their splits) and VolumeTracings.csv (chords of the ventricle, in pixels).

    Only traced frames are labelled; all others are IGNORE_INDEX. A video tells no millimetres. Ouyang et al. 2020,
    Nature 580.

    Args:
        root: the folder EchoNet-Dynamic.
    """

    def __init__(self, root: str) -> None:
        super().__init__("echonet_dynamic", ("background", "left ventricle"), None)
        self.root = Path(root).expanduser()

    def _items(self, split: str) -> Sequence[ClipItem]:
        items = []
        for name, its_split in self._listed.items():
            path = self.root / "Videos" / f"{name}.avi"
            if its_split == split and name in self._tracings and path.is_file():
                traced = {frame: _outline(chords) for frame, chords in self._tracings[name].items()}
                items.append(ClipItem(name, partial(_open, path, traced), labelled=tuple(sorted(traced))))
        return items

    @cached_property
    def _listed(self) -> dict[str, str]:
        """Name -> split."""
        return {Path(row["FileName"]).stem: row["Split"].lower() for row in self._rows("FileList.csv")}

    @cached_property
    def _tracings(self) -> Mapping[str, Mapping[int, Tracing]]:
        """Name -> frame -> chords (N, 4): x1, y1, x2, y2, the first of them the long axis."""
        found: dict[str, dict[int, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
        for row in self._rows("VolumeTracings.csv"):
            chord = [float(row[key]) for key in ("X1", "Y1", "X2", "Y2")]
            found[Path(row["FileName"]).stem][int(row["Frame"])].append(chord)
        return {name: {frame: np.array(c) for frame, c in frames.items()} for name, frames in found.items()}

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.root / name
        if not path.is_file():
            raise UserError(f"data.root={self.root}: it holds no {name}; give the folder EchoNet-Dynamic")
        with path.open(newline="") as file:
            return list(csv.DictReader(file))


def _outline(chords: Tracing) -> Tracing:
    """Chords across the long axis -> corners (N, 2) of the outline, x and y: down one side and up the other."""
    across = chords[1:]
    return np.concatenate([across[:, :2], across[::-1, 2:]])


def _open(path: Path, traced: Mapping[int, Tracing]) -> tuple[Clip, Labels]:
    clip = open_clip(path)
    return clip, partial(_labels, clip.info.size, traced)


def _labels(size: tuple[int, int], traced: Mapping[int, Tracing], frame: int) -> NDArray[np.integer]:
    from skimage.draw import polygon2mask

    if frame not in traced:
        return np.full(size, IGNORE_INDEX, np.uint8)
    return np.asarray(polygon2mask(size, traced[frame][:, ::-1]), dtype=np.uint8)
