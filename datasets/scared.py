"""SCARED: stereo endoscopy of porcine abdomens with depth from structured light.

Allan et al. 2021, "Stereo Correspondence and Reconstruction of Endoscopic Data Challenge",
https://arxiv.org/abs/2101.01133. Key frames as released (`Left_Image.png` beside `left_depth_map.tiff`, whose third
band is the depth in millimetres), and frames of the videos where they were extracted to `data/left/NAME.png` beside
`data/scene_points/scene_pointsNAME.tiff` (points of the left camera, of the image's size).
"""

from pathlib import Path

from vfmadapt.contracts import ValueSpec
from vfmadapt.datasets._depth_files import DepthData, DepthItem, folder
from vfmadapt.datasets._tiles import SPLITS

_POINTS = 3  # the band of z


class Scared(DepthData):
    """Key frames, and frames that were extracted, of `root/dataset_N/keyframe_M`.

    Args:
        root: the folder that holds dataset_1, dataset_2, ...
        val: numbers of the data sets that validate.
        test: numbers of those that test, by default the challenge's.
        frames: also extracted frames of the videos, not the key frames alone.

    Raises:
        UserError: on use: no folder, a frame without depth, other sizes.
    """

    def __init__(
        self, *, root: str, val: tuple[int, ...] = (7,), test: tuple[int, ...] = (8, 9), frames: bool = True
    ) -> None:
        super().__init__("scared", ValueSpec("depth", "mm", log=True), scale=1.0)
        self._root, self._val, self._test, self._frames = root, tuple(val), tuple(test), frames

    def _items(self) -> dict[str, list[DepthItem]]:
        root = folder(self._root, "dataset_1/keyframe_1/Left_Image.png and so on")
        found: dict[str, list[DepthItem]] = {name: [] for name in SPLITS}
        for place in sorted(root.glob("dataset_*/keyframe_*"), key=_numbers):
            number = _numbers(place)[0]
            split = "test" if number in self._test else "val" if number in self._val else "train"
            found[split] += self._frames_of(place)
        return found

    def _frames_of(self, place: Path) -> list[DepthItem]:
        name, items = f"{place.parent.name}/{place.name}", []
        if (image := place / "Left_Image.png").is_file():
            items.append(DepthItem(name, image, place / "left_depth_map.tiff", _POINTS))
        if self._frames:
            points = place / "data" / "scene_points"
            items += [
                DepthItem(f"{name}/{frame.stem}", frame, points / f"scene_points{frame.stem}.tiff", _POINTS)
                for frame in sorted((place / "data" / "left").glob("*.png"))
            ]
        return items


def _numbers(place: Path) -> tuple[int, int]:
    """Numbers of a data set and of a key frame."""
    return int(place.parent.name.rpartition("_")[2]), int(place.name.rpartition("_")[2])
