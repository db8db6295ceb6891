"""Generated endoscopy: equal for equal seeds; depth, poses and intrinsics that agree with the pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vfmadapt.contracts import DataSource, UserError
from vfmadapt.datasets._endo_clip import EndoClip, render_clip
from vfmadapt.datasets._endo_lumen import LENGTH, Lumen, make_lumen
from vfmadapt.datasets._endo_path import TURN, relative
from vfmadapt.datasets._endo_view import Lens, cast, motion
from vfmadapt.datasets._procedural import warp
from vfmadapt.datasets.endo_synthetic import EndoSynthetic

SMALL = {"frames": 3, "size": (32, 40), "fov": 80.0}


@pytest.fixture(scope="module")
def clip() -> EndoClip:
    return render_clip(3, **SMALL)


@pytest.fixture(scope="module")
def lumen() -> Lumen:
    return make_lumen(np.random.default_rng(0))


def test_a_clip_is_a_function_of_its_seed(clip: EndoClip) -> None:
    again, other = (render_clip(seed, **SMALL) for seed in (3, 4))
    assert np.array_equal(clip.image, again.image)
    assert np.array_equal(clip.depth, again.depth)
    assert not np.array_equal(clip.image, other.image)
    assert clip.image.shape == (3, 32, 40, 3)
    assert clip.depth.shape == (3, 32, 40)


def test_neighbouring_frames_turn_by_more_than_six_degrees(clip: EndoClip) -> None:
    assert TURN[0] > 6
    for one, two in zip(clip.poses[:-1], clip.poses[1:], strict=True):
        rotation = relative(one, two)[:3, :3]
        assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        assert np.rad2deg(np.arccos(rotation[2, 2])) >= TURN[0] - 1e-6


def test_focal_length_is_that_of_the_field_of_view(clip: EndoClip) -> None:
    focal = clip.intrinsics[0, 0]
    assert 2 * np.rad2deg(np.arctan(40 / 2 / focal)) == pytest.approx(80)
    assert clip.intrinsics[1, 1] == focal
    assert tuple(clip.intrinsics[:2, 2]) == (19.5, 15.5)


def test_depth_lies_on_the_wall(clip: EndoClip) -> None:
    lumen = make_lumen(np.random.default_rng(3))
    lens, pose = Lens((32, 40), 80.0), clip.poses[0]
    points = pose[:3, 3] + (lens.rays() * clip.depth[0].reshape(-1, 1)) @ pose[:3, :3].T
    room = lumen.room(points.astype(np.float32), table=lumen.radius)
    assert np.abs(room).mean() < 0.02
    assert (clip.depth > 1).all()
    assert clip.depth.max() < 1.5 * LENGTH


def test_no_ray_goes_through_a_fold(lumen: Lumen) -> None:
    """Against steps of a fiftieth of a millimetre, on rays along the tube."""
    pose = np.eye(4)
    pose[:3, 3] = lumen.middle(60)
    rays = Lens((6, 8), 80.0).rays()
    depth, fine = cast(lumen, pose, rays), np.arange(0, 160, 0.02, dtype=np.float32)
    origin = pose[:3, 3].astype(np.float32)
    for ray, found in zip(rays, depth, strict=True):
        outside = lumen.room(origin + fine[:, None] * ray, table=lumen.radius) <= 0
        assert found == pytest.approx(fine[outside.argmax()], abs=0.05)


def test_depth_and_poses_explain_how_the_picture_moves() -> None:
    clip = render_clip(5, frames=3, size=(64, 80), fov=80.0)
    grey = clip.image.mean(-1).astype(np.float32)
    for source in (0, 2):
        move = relative(clip.poses[1], clip.poses[source])
        columns, rows = motion(clip.depth[1], move, clip.intrinsics)
        x, y = np.meshgrid(np.arange(80), np.arange(64))
        seen = (np.abs(x + columns - 39.5) < 38) & (np.abs(y + rows - 31.5) < 30)
        moved = np.abs(warp(grey[source], rows, columns) - grey[1])[seen].mean()
        still = np.abs(grey[source] - grey[1])[seen].mean()
        assert moved < 0.6 * still


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> EndoSynthetic:
    made = EndoSynthetic(
        tmp_path_factory.mktemp("endo"), train=1, val=0, test=1, frames=3, size=(32, 40), pairs=True, workers=1
    )
    made.prepare()
    return made


def test_frames_have_depth(source: EndoSynthetic) -> None:
    single = EndoSynthetic(source.folder.parent, train=1, val=0, test=1, frames=3, size=(32, 40))
    single.prepare()  # the same files
    assert isinstance(single, DataSource)
    frames = single.split("train")
    assert len(frames) == 3
    sample = frames[2]
    assert sample["image"].shape == (3, 32, 40)
    assert sample["depth"].dtype == torch.float32
    assert sample["depth"].min() > 0
    assert sample["valid"].all()
    assert sample["id"] == "train/0000/002"
    assert len(single.split("val")) == 0
    with pytest.raises(IndexError):
        frames[3]


def test_triples_have_what_self_supervision_needs(source: EndoSynthetic) -> None:
    (sample,) = (source.split("test")[i] for i in range(len(source.split("test"))))
    clip = render_clip(2_000_000, **SMALL)  # the first seed of the test split
    assert torch.equal(sample["image"], torch.from_numpy(clip.image[1]).movedim(-1, 0) / 255)
    assert torch.equal(sample["sources"][1], torch.from_numpy(clip.image[2]).movedim(-1, 0) / 255)
    assert torch.allclose(sample["depth"], torch.from_numpy(clip.depth[1]), rtol=1e-3)
    back = np.linalg.inv(sample["poses"][0].numpy()) @ np.array([0, 0, 0, 1])
    assert np.allclose(clip.poses[1] @ back, clip.poses[0][:, 3], atol=1e-3)
    assert torch.allclose(sample["intrinsics"], torch.from_numpy(clip.intrinsics).float())


@pytest.mark.parametrize("wrong", [{"fov": 60.0}, {"size": (16, 40)}, {"frames": 2}, {"seed": -1}])
def test_impossible_settings_are_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match="endo_synthetic"):
        EndoSynthetic(tmp_path, **wrong)


def test_unknown_splits_and_missing_files_are_told(tmp_path: Path) -> None:
    source = EndoSynthetic(tmp_path)
    with pytest.raises(UserError, match="no split 'dev'"):
        source.split("dev")
    with pytest.raises(UserError, match="call prepare"):
        source.split("train")[0]
