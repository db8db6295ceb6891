"""`evaluate=` on published layouts, read as folders and as data sources; and what the package's weights must reach."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vfmadapt.backbones.sam2_video import shipped
from vfmadapt.build import compose
from vfmadapt.errors import UserError
from vfmadapt.frames import Clip
from vfmadapt.track import main
from vfmadapt.tracking.baselines import copy_masks
from vfmadapt.tracking.tracker import StepResult

nibabel = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")
av = pytest.importorskip("av")
RNG = np.random.default_rng(0)


def moving(frames: int, label: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Frames and labels (T, H, W): a bright square that moves a pixel to the right per frame."""
    labels = np.zeros((frames, 24, 32), np.uint8)
    for index in range(frames):
        labels[index, 5:13, 8 + index : 16 + index] = label
    return ((labels > 0) * 150 + RNG.integers(0, 50, labels.shape)).astype(np.uint8), labels


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the tracker: the prompt's mask in every frame."""

    def track(model: object, clip: Clip, prompts: Any, **_: Any) -> Iterator[tuple[int, StepResult]]:
        return copy_masks(clip, prompts)

    monkeypatch.setattr("vfmadapt.tracking.tracker.track", track)
    monkeypatch.setattr("vfmadapt.track.tracking_model", lambda cfg: None)


def evaluated(*overrides: str) -> dict[str, Any]:
    result = main(compose("track", overrides))
    json.dumps(result, allow_nan=False)
    return result


def trackrad(folder: Path, cases: int = 3) -> None:
    frames, labels = moving(5)
    for case in (folder / f"A_{i:03d}" for i in range(cases)):
        for kind, name, values in (("images", "frames", frames), ("targets", "labels", labels)):
            (case / kind).mkdir(parents=True)
            image = sitk.GetImageFromArray(np.moveaxis(values, 0, -1))  # rows, columns, time, as ITK's arrays come
            image.SetSpacing((1.0, 1.5, 2.0))
            sitk.WriteImage(image, str(case / kind / f"{case.name}_{name}.mha"), True)


@pytest.mark.usefixtures("copied")
def test_trackrad_as_a_folder_and_as_a_source(tmp_path: Path) -> None:
    trackrad(tmp_path)
    asked = [f"evaluate={tmp_path}", "prompt=first"]
    folder = evaluated(*asked, "reader={kind: video, time_first: true}")
    source = evaluated(
        "data=trackrad", f"data.root={tmp_path}", "data.test_fraction=1", "data.val_fraction=0", "evaluate=test",
        "prompt=first",
    )  # fmt: skip
    for found in (folder, source):
        assert [v["frames"] for v in found["volumes"]] == [5, 5, 5]
        assert found["dice"] == pytest.approx(np.mean([1 - n / 8 for n in (1, 2, 3, 4)]))
        assert (found["unit"], found["centre_distance"]) == ("mm", pytest.approx(2.5 * 1.5))
        assert found["dice_flow"] > found["dice_copy"] == found["dice"]
        assert found["confidence"]["dice"] == pytest.approx([found["dice"]] * 2)
    assert folder["volumes"][0]["id"] == "A_000/images/A_000_frames"
    assert {v["id"] for v in source["volumes"]} == {"A_000", "A_001", "A_002"}


@pytest.mark.usefixtures("copied")
def test_camus_by_its_own_splits(tmp_path: Path) -> None:
    frames, labels = moving(5, label=3)
    folder = tmp_path / "database_nifti" / "patient0001"
    folder.mkdir(parents=True)
    for view in ("2CH", "4CH"):
        for end, values in (("", frames), ("_gt", labels)):
            image = nibabel.Nifti1Image(values.T, np.diag([0.5, 0.4, 1, 1]))
            nibabel.save(image, folder / f"patient0001_{view}_half_sequence{end}.nii.gz")
    (tmp_path / "database_split").mkdir()
    (tmp_path / "database_split" / "subgroup_testing.txt").write_text("patient0001")
    found = evaluated("data=camus", f"data.root={tmp_path}", "evaluate=test")
    assert [v["id"] for v in found["volumes"]] == ["patient0001_2CH", "patient0001_4CH"]
    assert list(found["structures"]) == ["3"]
    assert found["dice"] == pytest.approx(np.mean([1 - n / 8 for n in (2, 1, 1, 2)]))


@pytest.mark.usefixtures("copied")
def test_echonet_counts_traced_frames_alone(tmp_path: Path) -> None:
    (tmp_path / "Videos").mkdir()
    with av.open(str(tmp_path / "Videos" / "0X1A.avi"), "w") as file:
        stream = file.add_stream("mjpeg", rate=50)
        stream.height, stream.width, stream.pix_fmt = 112, 112, "yuvj420p"
        for _ in range(6):
            noise = RNG.integers(0, 255, (112, 112, 3)).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        file.mux(stream.encode())
    (tmp_path / "FileList.csv").write_text("FileName,Split\n0X1A,TEST\n")
    rows = ["FileName,X1,Y1,X2,Y2,Frame"]
    for frame, half in ((1, 20), (4, 10)):
        rows += [f"0X1A.avi,50,30,50,70,{frame}"]  # the long axis
        rows += [f"0X1A.avi,{50 - half},{y},{50 + half},{y},{frame}" for y in range(30, 71, 4)]
    (tmp_path / "VolumeTracings.csv").write_text("\n".join(rows))
    asked = ["data=echonet", f"data.root={tmp_path}", "evaluate=test"]
    for place, prompt in (("first", 1), ("middle", 4)):
        found = evaluated(*asked, f"prompt={place}")
        (structure,) = found["volumes"][0]["structures"].values()
        assert (structure["prompt_frame"], structure["frames"], structure["frames_present"]) == (prompt, 1, 1)
        assert found["dice"] == pytest.approx(2 * 20 / (20 + 40), rel=0.05)
        assert (found["unit"], found["false_positive_frames"]) == ("px", 0)
    with pytest.raises(UserError, match="no clip is for train"):
        evaluated(*asked[:2], "evaluate=train")


@pytest.mark.usefixtures("copied")
def test_pixels_that_are_ignored_do_not_count(tmp_path: Path) -> None:
    frames, labels = moving(3)
    labels[1, :, :9] = 255  # where the copy of the first frame's mask has its first column
    np.savez(tmp_path / "a.npz", imgs=frames, gts=labels)
    asked = ["data=clip_folder", f"data.root={tmp_path}", "data.test=[a]", "evaluate=test", "prompt=first"]
    found = evaluated(*asked)["volumes"][0]
    assert list(found["structures"]) == ["1"]
    assert found["dice"] == pytest.approx((2 * 56 / (56 + 64) + 2 * 48 / (64 + 64)) / 2)


def test_sources_that_cannot_be_followed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", imgs=moving(3)[0], gts=moving(3)[1])
    for overrides, message in (
        (["data=clip_folder", f"data.root={tmp_path}", "evaluate=all"], "no split 'all': choose one of"),
        (["data=clip_folder", f"data.root={tmp_path}", "evaluate=test", "reader={kind: video}"], "leave it out with"),
        (["data=npz_stack", f"data.path={tmp_path / 'a.npz'}", "data.image=imgs", "data.mask=gts", "evaluate=test"],
         "has images, evaluate= follows clips"),
        (["data=trackrad", f"data.root={tmp_path}", "evaluate=test"], "no CASE/targets"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as raised:
            evaluated(*overrides)
        assert "\n" not in str(raised.value)


def test_ejection_fraction_of_a_beating_ventricle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    beat = [20.0, 17.0, 15.0, 18.0, 20.0]
    masks = np.stack([(y / 26) ** 2 + (x / half) ** 2 <= 1 for half in beat]).astype(np.uint8)
    for name, values in (("echo", masks * 100 + 40), ("lv", masks)):
        nibabel.save(nibabel.Nifti1Image(values.T, np.diag([0.5, 0.5, 1, 1])), tmp_path / f"{name}.nii.gz")

    def perfect(model: object, clip: Clip, prompts: Any, **_: Any) -> Iterator[tuple[int, StepResult]]:
        for index in range(len(clip)):
            logits = torch.from_numpy(masks[index][None] - 0.5).float()
            yield index, StepResult(logits, torch.ones(1))

    monkeypatch.setattr("vfmadapt.tracking.tracker.track", perfect)
    monkeypatch.setattr("vfmadapt.track.tracking_model", lambda cfg: None)
    prompt = f"prompt=[{{object: lv, frame: 0, mask: {tmp_path / 'lv.nii.gz'}}}]"
    asked = [f"input={tmp_path / 'echo.nii.gz'}", prompt, f"output={tmp_path / 'o.csv'}", "ejection_fraction=lv"]
    with pytest.raises(UserError, match=r"is a volume; .*write reader=\{kind: video\}"):
        evaluated(*asked)
    found = evaluated(*asked, "reader={kind: video}")["ejection_fraction"]
    assert found["fraction"] == pytest.approx(1 - (15 / 20) ** 2, abs=0.02)
    assert (found["end_diastole"], found["end_systole"]) == (0, 2)
    assert found["end_diastolic_ml"] == pytest.approx(4 / 3 * np.pi * 13 * 10**2 / 1000, rel=0.05)  # of 40 pixels


def test_the_packages_weights_follow_lesions_better_than_the_baselines(real_data: Path) -> None:
    assert shipped(compose("track").backbone.name)
    found = evaluated(f"evaluate={real_data / 'ct_lesions'}", "prompt=middle", "device=cpu")
    assert len(found["volumes"]) == 4
    assert found["dice3d"] > max(found["dice3d_copy"], found["dice3d_flow"])
    assert found["dice3d"] >= 0.65  # 0.678 as they ship
    assert found["dice"] > found["dice_copy"]
