"""Readers of images with depth: every kind of file, every layout, and one line for what is wrong."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vfmadapt.contracts import UserError, ValueSource
from vfmadapt.datasets._depth_files import read_depth
from vfmadapt.datasets.depth_folder import DepthFolder
from vfmadapt.datasets.kitti_eigen import KittiEigen
from vfmadapt.datasets.nyuv2 import NyuV2, NyuV2Lists
from vfmadapt.datasets.scared import Scared

DEPTH = np.array([[1.5, 0, 3.25], [4, 5, 60]], dtype=np.float32)
UNKNOWN = np.array([[False, True, False], [False, False, False]])


def write_image(path: Path, size: tuple[int, int] = (2, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return path


def write_depth(path: Path, write_tiff, depth: np.ndarray = DEPTH) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, depth)
    elif path.suffix == ".npz":
        np.savez(path, depth)
    elif path.suffix == ".png":
        Image.fromarray((depth * 256).astype(np.uint16)).save(path)
    else:
        write_tiff(path, depth[None])
    return path


@pytest.mark.parametrize("ending", ["npy", "npz", "png", "tif"])
def test_every_kind_of_file_gives_the_same_depth(tmp_path, write_tiff, ending) -> None:
    scale = 1 / 256 if ending == "png" else 1.0
    found = read_depth(write_depth(tmp_path / f"a.{ending}", write_tiff), scale=scale)
    assert np.allclose(found, np.where(UNKNOWN, np.nan, DEPTH), equal_nan=True)
    assert np.isnan(found[0, 1])
    assert np.allclose(read_depth(tmp_path / f"a.{ending}", scale=2 * scale)[1], 2 * DEPTH[1])


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, -np.inf])
def test_what_is_no_depth_is_unknown(tmp_path, bad) -> None:
    depth = DEPTH.copy()
    depth[1, 1] = bad
    np.save(tmp_path / "a.npy", depth)
    assert np.isnan(read_depth(tmp_path / "a.npy", scale=1.0)[1, 1])


def test_openexr_is_read_or_refused_in_one_line(tmp_path) -> None:
    import os

    os.environ["OPENCV_IO_ENABLE_OPENEXR"] = "1"
    import cv2

    path = tmp_path / "a.exr"
    try:
        written = cv2.imwrite(str(path), DEPTH)
    except cv2.error:
        written = False
    if written:
        assert np.allclose(read_depth(path, scale=1.0), np.where(UNKNOWN, np.nan, DEPTH), equal_nan=True)
    path.write_bytes(b"no such format")
    with pytest.raises(UserError, match="convert it to NPY or TIFF"):
        read_depth(path, scale=1.0)


def test_files_that_hold_no_depth_are_told(tmp_path) -> None:
    np.savez(tmp_path / "two.npz", a=DEPTH, b=DEPTH)
    np.save(tmp_path / "colour.npy", np.zeros((4, 5, 3)))
    write_image(tmp_path / "colour.png")
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    for name, message in (
        ("two.npz", "holds the arrays a, b"),
        ("colour.npy", "shape \\(4, 5, 3\\); a depth map is"),
        ("colour.png", "mode RGB"),
        ("broken.npy", "not a readable depth map"),
        ("depth.txt", "no such depth file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_depth(tmp_path / name, scale=1.0)
        assert "\n" not in str(caught.value)
    (tmp_path / "depth.txt").write_text("1")
    with pytest.raises(UserError, match="files that end in"):
        read_depth(tmp_path / "depth.txt", scale=1.0)


def test_a_folder_of_images_and_depth(tmp_path, write_tiff) -> None:
    for i in range(20):
        write_image(tmp_path / "images" / f"{i}.png")
        write_depth(tmp_path / "depth" / f"{i}.npy", write_tiff)
    source = DepthFolder(root=str(tmp_path), val_fraction=0.3, test_fraction=0.3)
    assert isinstance(source, ValueSource)
    source.prepare()
    assert sum(len(source.split(name)) for name in ("train", "val", "test")) == 20
    sample = source.split("train")[0]
    assert sample["image"].shape == (3, 2, 3)
    assert np.array_equal(np.isnan(sample["depth"].numpy()), UNKNOWN)
    value, logs = source.spec.values[0], np.log(DEPTH[~UNKNOWN])
    assert value.mean == pytest.approx(logs.mean(), rel=1e-5)
    assert value.std == pytest.approx(logs.std(), rel=1e-4)


def test_a_folder_that_is_split_and_files_side_by_side(tmp_path, write_tiff) -> None:
    for split in ("train", "val", "test"):
        write_image(tmp_path / "a" / split / "images" / "x.jpg")
        write_depth(tmp_path / "a" / split / "depth" / "x.tif", write_tiff)
        write_image(tmp_path / "b" / f"{split}_left.png")
        write_depth(tmp_path / "b" / f"{split}_disparity.npz", write_tiff)
    assert len(DepthFolder(root=str(tmp_path / "a")).split("val")) == 1
    side_by_side = DepthFolder(
        root=str(tmp_path / "b"),
        images=".",
        depths=".",
        image_suffix="_left",
        depth_suffix="_disparity",
        inverse=True,
        unit="px",
        test_fraction=1.0,
        val_fraction=0.0,
    )
    assert len(side_by_side.split("test")) == 3
    assert side_by_side.spec.values[0].inverse
    assert not side_by_side.spec.values[0].log


def test_what_is_wrong_with_a_folder_is_told(tmp_path, write_tiff) -> None:
    with pytest.raises(UserError, match="no such folder"):
        DepthFolder(root=str(tmp_path / "none")).prepare()
    write_image(tmp_path / "images" / "x.png", size=(4, 3))
    (tmp_path / "depth").mkdir()
    with pytest.raises(UserError, match="has no depth: looked in"):
        DepthFolder(root=str(tmp_path)).prepare()
    write_depth(tmp_path / "depth" / "x.npy", write_tiff)
    with pytest.raises(UserError, match=r"4 x 3 pixels, its depth .* 2 x 3; they must be"):
        DepthFolder(root=str(tmp_path), test_fraction=1.0, val_fraction=0.0).split("test")[0]
    with pytest.raises(UserError, match="above 0"):
        DepthFolder(root=str(tmp_path), scale=0.0)
    with pytest.raises(UserError, match="sum to at most 1"):
        DepthFolder(root=str(tmp_path), val_fraction=0.9)
    np.save(tmp_path / "depth" / "x.npy", np.zeros((4, 3)))
    with pytest.raises(UserError, match="no training image has a known depth"):
        _ = DepthFolder(root=str(tmp_path), test_fraction=1.0, val_fraction=0.0).spec


def test_kitti_by_its_lists(tmp_path, write_tiff) -> None:
    lines = []
    for i in range(3):
        write_image(tmp_path / "raw" / "drive" / f"{i}.png", size=(40, 60))
        write_depth(tmp_path / "depth" / "drive" / f"{i}.png", write_tiff, np.full((40, 60), 7.5, np.float32))
        lines.append(f"drive/{i}.png drive/{i}.png 721.5")
    (tmp_path / "test.txt").write_text("\n".join([*lines, "drive/9.png None 721.5", ""]))
    settings = {"root": str(tmp_path / "raw"), "depth_root": str(tmp_path / "depth")}
    source = KittiEigen(**settings, test_list=str(tmp_path / "test.txt"), train_list=str(tmp_path / "test.txt"))
    source.prepare()
    assert [len(source.split(name)) for name in ("train", "val", "test")] == [2, 1, 3]
    depth = source.split("test")[0]["depth"]
    known = np.isfinite(depth.numpy())
    assert (depth[known] == 7.5).all()
    assert not known[:16].any()  # Garg's crop
    assert known[16:39, 2:57].all()
    with pytest.raises(UserError, match="allowed are garg, eigen"):
        KittiEigen(**settings, test_list="x", crop="all")
    with pytest.raises(UserError, match="no such list"):
        KittiEigen(**settings, test_list=str(tmp_path / "none.txt")).prepare()
    (tmp_path / "bad.txt").write_text("drive/7.png drive/7.png\n")
    with pytest.raises(UserError, match=r"line 1: .* is not there"):
        KittiEigen(**settings, test_list=str(tmp_path / "bad.txt")).prepare()


def test_scared_by_data_set(tmp_path, write_tiff) -> None:
    points = np.stack([np.zeros((2, 3)), np.ones((2, 3)), DEPTH]).astype(np.float32)
    points[2, 0, 1] = np.nan
    for number in (1, 7, 8):
        place = tmp_path / f"dataset_{number}" / "keyframe_1"
        write_image(place / "Left_Image.png")
        write_tiff(place / "left_depth_map.tiff", points)
    write_image(tmp_path / "dataset_1" / "keyframe_1" / "data" / "left" / "000003.png")
    (tmp_path / "dataset_1" / "keyframe_1" / "data" / "scene_points").mkdir()
    write_tiff(tmp_path / "dataset_1" / "keyframe_1" / "data" / "scene_points" / "scene_points000003.tiff", points)
    source = Scared(root=str(tmp_path))
    source.prepare()
    assert [len(source.split(name)) for name in ("train", "val", "test")] == [2, 1, 1]
    sample = source.split("train")[1]
    assert np.allclose(sample["depth"], np.where(UNKNOWN, np.nan, DEPTH), equal_nan=True)
    assert sample["id"] == "dataset_1/keyframe_1/000003"
    assert len(Scared(root=str(tmp_path), frames=False).split("train")) == 1
    with pytest.raises(UserError, match="no such folder"):
        Scared(root=str(tmp_path / "none")).prepare()


def test_nyu_by_its_lists(tmp_path, write_tiff) -> None:
    write_image(tmp_path / "kitchen" / "rgb.png")
    Image.fromarray((DEPTH * 1000).astype(np.uint16)).save(tmp_path / "kitchen" / "depth.png")
    (tmp_path / "test.txt").write_text("kitchen/rgb.png kitchen/depth.png 518.8\n")
    source = NyuV2Lists(root=str(tmp_path), test_list=str(tmp_path / "test.txt"))
    depth = source.split("test")[0]["depth"].numpy()
    assert np.allclose(depth, np.where(UNKNOWN, np.nan, DEPTH), equal_nan=True)
    with pytest.raises(UserError, match="no image is for train"):
        source.split("train")


def test_nyu_labelled(tmp_path) -> None:
    h5py = pytest.importorskip("h5py")
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    images, depths = rng.integers(0, 255, (4, 3, 6, 5), dtype=np.uint8), rng.random((4, 6, 5)).astype(np.float32) + 1
    with h5py.File(tmp_path / "labeled.mat", "w") as file:
        file["images"], file["depths"] = images, depths
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1], [2]]), "testNdxs": np.array([[3], [4]])})
    source = NyuV2(path=str(tmp_path / "labeled.mat"))
    sample = source.split("test")[1]
    assert sample["id"] == "0004"
    assert np.allclose(sample["depth"], depths[3].T)
    assert np.allclose(sample["image"], images[3].transpose(0, 2, 1) / 255)
    assert [len(source.split(name)) for name in ("train", "val")] == [1, 1]


def test_nyu_without_its_files_is_told(tmp_path) -> None:
    with pytest.raises(UserError, match="is not there"):
        NyuV2(path=str(tmp_path / "labeled.mat")).prepare()


def test_a_real_stereo_pair(real_data) -> None:
    from vfmadapt.depth_metrics import plane_fit

    source = DepthFolder(
        root=str(real_data / "stereo"),
        images=".",
        depths=".",
        image_suffix="_left",
        depth_suffix="_disparity",
        inverse=True,
        unit="px",
        val_fraction=0.0,
        test_fraction=1.0,
    )
    source.prepare()
    sample = source.split("test")[0]
    known = sample["depth"].isfinite()
    assert sample["image"].shape[1:] == sample["depth"].shape == (500, 741)
    assert 0.7 < known.float().mean() < 1
    truth = sample["depth"].double()
    errors = [(fit - truth)[known].square().mean().sqrt() for fit in (truth[known].mean(), plane_fit(truth, known))]
    assert errors[1] < errors[0]
