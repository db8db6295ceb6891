"""CAMUS: apical two- and four-chamber echocardiograms, traced in every frame from end-diastole to end-systole."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vfmadapt.contracts import UserError
from vfmadapt.datasets._clips import ClipData, ClipItem, Labels
from vfmadapt.datasets._pairs import split_of
from vfmadapt.frames import Clip, open_clip
from vfmadapt.frames.labelled import label_map

_SPLITS = {"train": "training", "val": "validation", "test": "testing"}


class Camus(ClipData):
    """Half sequences of CAMUS_public: database_nifti/PATIENT/PATIENT_VIEW_half_sequence.nii.gz with their _gt.

    The patients of a split are those of database_split/subgroup_*.txt; where that folder is missing, a hash of the
    patient's name decides. Leclerc et al. 2019, IEEE Transactions on Medical Imaging 38(9).

    Args:
        root: the folder that holds database_nifti.
        views: "2CH" and "4CH".
        val_fraction: share of the patients that validates where there is no list.
        test_fraction: share of the patients that tests where there is no list.
    """

    def __init__(
        self,
        root: str,
        *,
        views: Sequence[str] = ("2CH", "4CH"),
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
    ) -> None:
        if unknown := set(views) - {"2CH", "4CH"}:
            raise UserError(f"data.views={[*views]}: no view {unknown.pop()}; choose from 2CH, 4CH")
        super().__init__("camus", ("background", "left ventricle", "myocardium", "left atrium"), None)
        self.root, self._views, self._fractions = Path(root).expanduser(), tuple(views), (val_fraction, test_fraction)

    def _items(self, split: str) -> Sequence[ClipItem]:
        folder = self.root / "database_nifti"
        if not folder.is_dir():
            raise UserError(f"data.root={self.root}: it holds no database_nifti; give the folder CAMUS_public")
        names = [f"{patient}_{view}_half_sequence" for patient in self._patients(folder, split) for view in self._views]
        files = [folder / name.split("_")[0] / f"{name}.nii.gz" for name in names]
        return [ClipItem(file.name.split("_half")[0], partial(_open, file)) for file in files if file.is_file()]

    def _patients(self, folder: Path, split: str) -> list[str]:
        told = self.root / "database_split" / f"subgroup_{_SPLITS[split]}.txt"
        if told.is_file():
            return told.read_text().split()
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        return [name for name in names if split_of(name, *self._fractions) == split]


def _open(file: Path) -> tuple[Clip, Labels]:
    masks = file.with_name(file.name.replace(".nii.gz", "_gt.nii.gz"))
    return open_clip(file, kind="video"), partial(label_map, open_clip(masks, kind="video"))
