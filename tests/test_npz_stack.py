"""The NPZ reader: splits, validity, and its errors."""

from pathlib import Path

import numpy as np
import pytest

from vfmadapt.contracts import IGNORE_INDEX, DataSource
from vfmadapt.datasets.npz_stack import NpzStack
from vfmadapt.errors import UserError


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 9, 7, 1)).astype(np.float16)
    images[5, 2, 3] = np.nan
    np.savez(tmp_path / "s.npz", ndvi=images, cloud=(images > 0).astype(np.uint8))
    return tmp_path / "s.npz"


def source(path: Path, **settings: object) -> NpzStack:
    return NpzStack(path=str(path), image="ndvi", mask="cloud", **settings)


def test_splits_are_disjoint_and_hold_out_every_fourth(stack: Path) -> None:
    data = source(stack)
    assert isinstance(data, DataSource)
    ids = {name: {data.split(name)[i]["id"] for i in range(len(data.split(name)))} for name in ("train", "val", "test")}
    assert ids["test"] == {f"frame{i:05d}" for i in (3, 7, 11, 15)}
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 16


def test_nan_is_neither_valid_nor_labelled(stack: Path) -> None:
    data = source(stack, holdout=8)
    for split in ("train", "val", "test"):
        for i in range(len(data.split(split))):
            sample = data.split(split)[i]
            if sample["id"] == "frame00005":
                assert not sample["valid"][2, 3]
                assert sample["mask"][2, 3] == IGNORE_INDEX
                assert sample["image"][0, 2, 3] == 0
                assert sample["valid"].sum() == 62
                return
    pytest.fail("frame 5 is in no split")


def test_statistics_are_of_the_training_frames(stack: Path) -> None:
    data = source(stack)
    values = np.concatenate([data.split("train")[i]["image"].flatten() for i in range(len(data.split("train")))])
    np.testing.assert_allclose(data.spec.mean[0], values[values != 0].mean(), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "red"}, "has the keys ndvi, cloud"),
        ({"image": "ndvi", "bands": ["a", "b"]}, "names 2 bands"),
        ({"image": "ndvi", "classes": ["one"]}, "data.classes names 1"),
        ({"image": "ndvi", "holdout": 2}, "at least 3"),
    ],
)
def test_errors(stack: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = NpzStack(**{"path": str(stack), "image": "ndvi", "mask": "cloud"} | settings).spec


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        source(tmp_path / "none.npz").prepare()
    (tmp_path / "bad.npz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable"):
        source(tmp_path / "bad.npz").prepare()
