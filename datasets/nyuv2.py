"""NYU Depth v2 (Silberman et al. 2012): indoor images with depth in metres, labelled or extracted.

Either the labelled file `nyu_depth_v2_labeled.mat` (1449 pairs) beside `splits.mat` (795 for training, 654 for tests),
read through h5py; or lists of extracted images and depths (PNG of 16 bits, millimetres), as BTS and AdaBins have them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vfmadapt.contracts import DataSpec, DepthSample, UserError, ValueSpec
from vfmadapt.datasets._depth_files import BANDS, DepthData, DepthItem, folder, listed
from vfmadapt.datasets._tiles import SPLITS

_VALUE = ValueSpec("depth", "m", log=True)
# of the labelled file's colours, as usual for photographs, and of log depth between 0.7 and 10 m
_MEAN, _STD, _LOG = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.9, 0.47)
_VAL_EVERY = 20  # of the training pairs, one of so many validates


class NyuV2Lists(DepthData):
    """Extracted images and depths named by lists.

    Args:
        root: folder that the lists are relative to.
        train_list: of training images; None: there are none.
        test_list: of the 654 test images.
        val_list: of validation images; None: every twentieth of the training list.

    Raises:
        UserError: on use: no folder or list, files that are not there.
    """

    def __init__(
        self, *, root: str, test_list: str, train_list: str | None = None, val_list: str | None = None
    ) -> None:
        super().__init__("nyuv2", _VALUE, scale=1 / 1000)
        self._root, self._lists = root, {"train": train_list, "val": val_list, "test": test_list}

    def _items(self) -> dict[str, list[DepthItem]]:
        root = folder(self._root, "NYUv2's images and depths")
        found = {name: listed(root, root, Path(file)) for name, file in self._lists.items() if file is not None}
        if "val" not in found and found.get("train"):
            found["val"] = found["train"][::_VAL_EVERY]
            found["train"] = [item for i, item in enumerate(found["train"]) if i % _VAL_EVERY]
        return found


class _Labelled:
    """Pairs of the labelled file; opened anew in each process."""

    def __init__(self, path: Path, indices: list[int]) -> None:
        self._path, self._indices = path, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> DepthSample:
        number = self._indices[index]
        with _open(self._path) as file:  # MATLAB's order of axes: columns come before rows
            image = np.asarray(file["images"][number]).transpose(0, 2, 1).astype(np.float32) / np.float32(255)
            depth = np.asarray(file["depths"][number]).T.astype(np.float32)
        return DepthSample(
            image=torch.from_numpy(np.ascontiguousarray(image)),
            depth=torch.from_numpy(np.where(depth > 0, depth, np.float32(np.nan))),
            valid=torch.ones(depth.shape, dtype=torch.bool),
            id=f"{number + 1:04d}",
            bands=BANDS,
        )


class NyuV2:
    """The labelled pairs with their official split.

    Args:
        path: nyu_depth_v2_labeled.mat; `splits.mat` lies beside it.

    Raises:
        UserError: on use: no such files, h5py is not installed.
    """

    def __init__(self, *, path: str) -> None:
        self._path = Path(path).expanduser()

    @property
    def values(self) -> tuple[ValueSpec, ...]:
        """Depth in metres."""
        return (_VALUE,)

    @property
    def spec(self) -> DataSpec:
        """Bands, depth and statistics."""
        value = ValueSpec(_VALUE.name, _VALUE.unit, *_LOG, log=True)
        return DataSpec("nyuv2", BANDS, (), _MEAN, _STD, values=(value,))

    def prepare(self) -> None:
        """Look for the files; raises UserError where they are not there."""
        _ = self.split("train")[0]

    def split(self, name: str) -> _Labelled:
        """The pairs of "train", "val" or "test"; every twentieth training pair validates instead."""
        if name not in SPLITS:
            raise UserError(f"nyuv2 has no split {name!r}: choose one of {', '.join(SPLITS)}")
        splits = self._path.with_name("splits.mat")
        for path in (self._path, splits):
            if not path.is_file():
                raise UserError(f"data.path={self._path}: {path} is not there; both come from the page of NYU Depth v2")
        from scipy.io import loadmat

        numbers = loadmat(splits)["testNdxs" if name == "test" else "trainNdxs"].ravel()
        indices = [int(n) - 1 for n in numbers]
        if name != "test":
            indices = [n for i, n in enumerate(indices) if (i % _VAL_EVERY == 0) == (name == "val")]
        return _Labelled(self._path, indices)


def _open(path: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading it needs h5py; type: pip install 'vfmadapt[depth]'") from error
    return h5py.File(path)
