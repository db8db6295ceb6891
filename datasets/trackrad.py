"""TrackRAD2025: sagittal cine-MR of MR-linacs with tumours traced in every frame."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vfmadapt.contracts import UserError
from vfmadapt.datasets._clips import ClipData, ClipItem, Labels
from vfmadapt.datasets._pairs import split_of
from vfmadapt.frames import Clip, open_clip
from vfmadapt.frames.labelled import label_map


class TrackRad(ClipData):
    """Cases CASE/images/CASE_frames.mha with CASE/targets/CASE_labels.mha, as the labelled training set holds them.

    Training, validation and test cases are drawn by a hash of their names: the challenge published no split. Cases
    without labels are left aside. Source: trackrad2025.grand-challenge.org, Wang et al. 2025, arXiv 2503.19119.

    Args:
        root: the folder of the cases.
        val_fraction: share of the cases that validates.
        test_fraction: share of the cases that tests.
    """

    def __init__(self, root: str, *, val_fraction: float = 0.1, test_fraction: float = 0.2) -> None:
        super().__init__("trackrad2025", ("background", "tumour"), None)
        self.root, self._fractions = Path(root).expanduser(), (val_fraction, test_fraction)

    def _items(self, split: str) -> Sequence[ClipItem]:
        cases = [path.parents[1] for path in sorted(self.root.glob("*/targets/*_labels.mha"))]
        if not cases:
            raise UserError(
                f"data.root={self.root}: no CASE/targets/CASE_labels.mha in it; give the folder of the cases"
            )
        chosen = [case for case in cases if split_of(case.name, *self._fractions) == split]
        return [ClipItem(case.name, partial(_open, case)) for case in chosen]


def _open(case: Path) -> tuple[Clip, Labels]:
    options = {"kind": "video", "time_first": True}
    clip = open_clip(case / "images" / f"{case.name}_frames.mha", **options)
    return clip, partial(label_map, open_clip(case / "targets" / f"{case.name}_labels.mha", **options))
