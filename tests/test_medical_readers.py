"""Published folder layouts, written here in small, read with their labels, splits, spacing and time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vfmadapt.contracts import IGNORE_INDEX
from vfmadapt.datasets.camus import Camus
from vfmadapt.datasets.clip_folder import ClipFolder
from vfmadapt.datasets.echonet import EchoNet
from vfmadapt.datasets.trackrad import TrackRad
from vfmadapt.errors import UserError
from vfmadapt.frames import open_clip
from vfmadapt.frames.write_nifti import write_nifti as write_labels

nibabel = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")
av = pytest.importorskip("av")

RNG = np.random.default_rng(0)


def square(frames: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Labels (T, H, W): a square that moves a pixel to the right per frame."""
    labels = np.zeros((frames, height, width), np.uint8)
    for index in range(frames):
        labels[index, 5:12, 8 + index : 15 + index] = 1
    return labels


def write_nifti(path: Path, values: np.ndarray, zooms: tuple[float, float, float] = (0.5, 0.4, 5.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.T, np.diag([*zooms, 1.0])), path)


def test_trackrad_has_time_first(tmp_path: Path) -> None:
    labels = square(6)
    frames = labels.astype(int) * 500 + RNG.integers(0, 50, labels.shape)
    for case in (tmp_path / f"A_{i:03d}" for i in range(12)):
        for kind, values in (("images", frames.astype(np.uint16)), ("targets", labels)):
            (case / kind).mkdir(parents=True)
            image = sitk.GetImageFromArray(np.moveaxis(values, 0, -1))  # rows, columns, time, as ITK's arrays come
            image.SetSpacing((1.0, 1.5, 2.0))
            name = f"{case.name}_{'frames' if kind == 'images' else 'labels'}.mha"
            sitk.WriteImage(image, str(case / kind / name), True)
        (case / "frame-rate.json").write_text("4.0")
    (tmp_path / "A_099" / "images").mkdir(parents=True)  # not labelled
    data = TrackRad(str(tmp_path), val_fraction=0.3, test_fraction=0.3)
    splits = {name: {c.id for c in data.clips(name).items} for name in ("train", "val", "test")}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 12
    clip = data.clips("train")[0]
    assert torch.equal(clip["mask"], torch.from_numpy(labels.astype(np.int64)))
    assert clip["spacing"] == (None, 2.0, 1.5)
    assert clip["image"][3, 0][clip["mask"][3] == 1].min() > clip["image"][3, 0][clip["mask"][3] == 0].max()
    opened, _ = data.clips("train").items[0].open()
    assert opened.info.seconds_per_frame == 0.25


def test_a_scan_of_trackrad_knows_its_frame_rate(tmp_path: Path) -> None:
    files = [tmp_path / "B_1" / "images" / name for name in ("B_1_frames.mha", "B_1_frames2.mha")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        sitk.WriteImage(sitk.GetImageFromArray(square(3)), str(file))
    video = {"kind": "video", "time_first": True}
    assert open_clip(files[0], **video).info.seconds_per_frame is None
    (tmp_path / "B_1" / "frame-rate.json").write_text("8")
    (tmp_path / "B_1" / "frame-rate2.json").write_text("5")
    assert [open_clip(file, **video).info.seconds_per_frame for file in files] == [1 / 8, 1 / 5]
    assert open_clip(files[0], **video, seconds_per_frame=0.5).info.seconds_per_frame == 0.5
    assert open_clip(files[0]).info.seconds_per_frame is None
    for wrong in ("0", "-4", "[4]", "fast", "NaN"):
        (tmp_path / "B_1" / "frame-rate.json").write_text(wrong)
        with pytest.raises(UserError, match=r"frame-rate\.json holds no frames per second"):
            open_clip(files[0], **video)


def test_camus_follows_its_own_splits(tmp_path: Path) -> None:
    labels = square(5) * 3
    for number in (1, 2, 3):
        for view in ("2CH", "4CH"):
            folder = tmp_path / "database_nifti" / f"patient{number:04d}"
            name = folder / f"patient{number:04d}_{view}_half_sequence"
            write_nifti(Path(f"{name}.nii.gz"), RNG.integers(0, 255, labels.shape).astype(np.uint8))
            write_nifti(Path(f"{name}_gt.nii.gz"), labels)
    (tmp_path / "database_split").mkdir()
    for name, patients in (("training", "patient0003\npatient0001\n"), ("validation", ""), ("testing", "patient0002")):
        (tmp_path / "database_split" / f"subgroup_{name}.txt").write_text(patients)
    data = Camus(str(tmp_path))
    assert [c.id for c in data.clips("test").items] == ["patient0002_2CH", "patient0002_4CH"]
    assert len(data.clips("train")) == 4
    clip = data.clips("test")[1]
    assert torch.equal(clip["mask"], torch.from_numpy(labels.astype(np.int64)))
    assert clip["spacing"] == (None, pytest.approx(0.4), pytest.approx(0.5))
    assert len(Camus(str(tmp_path), views=["4CH"]).split("test")) == 5
    with pytest.raises(UserError, match="no clip is for val"):
        data.clips("val")


def test_echonet_labels_traced_frames_alone(tmp_path: Path) -> None:
    (tmp_path / "Videos").mkdir()
    for name in ("0X1A", "0X2B", "0X3C"):
        with av.open(str(tmp_path / "Videos" / f"{name}.avi"), "w") as file:
            stream = file.add_stream("mjpeg", rate=50)
            stream.height, stream.width, stream.pix_fmt = 112, 112, "yuvj420p"
            for _ in range(6):
                noise = RNG.integers(0, 255, (112, 112, 3)).astype(np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            file.mux(stream.encode())
    (tmp_path / "FileList.csv").write_text(
        "FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split\n"
        "0X1A,60,30,80,112,112,50,6,TRAIN\n0X2B,50,40,80,112,112,50,6,TEST\n0X3C,50,40,80,112,112,50,6,TRAIN\n"
    )
    rows = ["FileName,X1,Y1,X2,Y2,Frame"]
    for name in ("0X1A.avi", "0X2B.avi"):
        for frame, half in ((1, 20), (4, 10)):
            rows += [f"{name},50,30,50,70,{frame}"]  # the long axis
            rows += [f"{name},{50 - half},{y},{50 + half},{y},{frame}" for y in range(30, 71, 4)]
    (tmp_path / "VolumeTracings.csv").write_text("\n".join(rows))
    data = EchoNet(str(tmp_path))
    train = data.clips("train")
    assert [item.id for item in train.items] == ["0X1A"]  # 0X3C is not traced
    assert list(train.labelled(0)) == [1, 4]
    mask = train[0]["mask"]
    assert [(frame == IGNORE_INDEX).all().item() for frame in mask] == [True, False, True, True, False, True]
    assert (mask[1] == 1).sum() == pytest.approx(40 * 40, rel=0.06)
    assert (mask[4] == 1).sum() == pytest.approx(20 * 40, rel=0.1)
    assert [s["id"] for s in (data.split("test")[0], data.split("test")[1])] == ["0X2B/0001", "0X2B/0004"]


def test_any_pairs_by_name_or_by_folder(tmp_path: Path) -> None:
    labels = square(4)
    scan = (labels * 200 - 100 + RNG.normal(0, 5, labels.shape)).astype(np.float32)
    for index in range(8):
        write_nifti(tmp_path / f"a{index}.nii.gz", scan)
        write_nifti(tmp_path / f"a{index}_mask.nii.gz", labels)
        write_nifti(tmp_path / "imagesTr" / f"b{index}_0000.nii.gz", scan)
        write_nifti(tmp_path / "labelsTr" / f"b{index}.nii.gz", labels)
    np.savez(tmp_path / "c.npz", imgs=scan, gts=labels, spacing=[0.5, 0.4, 5.0])
    data = ClipFolder(str(tmp_path), window=[-150, 150], test=["a0", "c"], val_fraction=0.3)
    assert [c.id for c in data.clips("test").items] == ["a0", "c"]
    assert len(data.clips("train")) + len(data.clips("val")) == 15
    pair, volume = data.clips("test")[0], data.clips("test")[1]
    for key in ("image", "mask"):
        assert torch.equal(pair[key], volume[key])
    assert pair["spacing"] == (5.0, pytest.approx(0.4), 0.5)
    inside = pair["image"][:, 0][pair["mask"] == 1]
    assert inside.mean() == pytest.approx((100 + 150) / 300, abs=0.01)
    assert len(data.spec.classes) == 2


def test_pictures_with_masks_in_black_and_white(tmp_path: Path) -> None:
    labels = square(4)
    for index, mask in enumerate(labels):
        Image.fromarray(mask * 100 + 50).save(tmp_path / f"a{index}.png")
        Image.fromarray(mask * 255).save(tmp_path / f"a{index}_mask.png")
    unsure = np.where(labels[0] == labels[3], labels[0], 255 - 254 * labels[0]).astype(np.uint8)
    Image.fromarray(unsure).save(tmp_path / "a0_mask.png")  # 255 beside 1 is what does not count
    data = ClipFolder(str(tmp_path), test=[f"a{index}" for index in range(4)])
    frames = data.split("test")
    assert [sample["id"] for sample in (frames[0], frames[3])] == ["a0/0000", "a3/0000"]
    np.testing.assert_array_equal(frames[0]["mask"], np.where(unsure == 255, IGNORE_INDEX, unsure))
    for index in (1, 2, 3):
        np.testing.assert_array_equal(frames[index]["mask"], labels[index])
    many = ClipFolder(str(tmp_path), test=["a1"], classes=["background", "polyp", "tool"])
    assert set(many.split("test")[0]["mask"].unique().tolist()) == {0, IGNORE_INDEX}


def test_dicom_series_with_masks(dicom_series: Path, tmp_path: Path) -> None:
    masks = np.zeros((5, 41, 33), np.uint8)
    masks[2, 5:9, 20:30] = 1
    with open_clip(dicom_series) as clip:
        write_labels(tmp_path / "series_mask.nii.gz", masks, clip.info)
    image = nibabel.as_closest_canonical(nibabel.load(tmp_path / "series_mask.nii.gz"))
    nibabel.save(image, tmp_path / "series_mask.nii.gz")
    clip = ClipFolder(str(tmp_path), window=[-1000, -600], test=["series"]).clips("test")[0]
    np.testing.assert_array_equal(clip["mask"], masks)
    assert clip["image"][:, 0, 0, 0].tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert clip["spacing"] == (2.5, 0.9, 0.7)


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", square(3) * 7)
    write_nifti(tmp_path / "a_seg.nii.gz", square(3) * 7)
    with pytest.raises(UserError, match=r"labels \[7\]; allowed are 0 to 1"):
        ClipFolder(str(tmp_path), test=["a"]).clips("test")[0]
    with pytest.raises(UserError, match="has no clip z; it has: a"):
        ClipFolder(str(tmp_path), test=["z"]).prepare()
    with pytest.raises(UserError, match="black and white"):
        ClipFolder(str(tmp_path), window=[3, 3])
    for made, message in ((TrackRad, "_labels.mha"), (Camus, "database_nifti"), (EchoNet, "FileList.csv")):
        with pytest.raises(UserError, match=message):
            made(str(tmp_path)).prepare()


def test_real_volumes_are_clips_with_lesions(real_data: Path) -> None:
    data = ClipFolder(str(real_data / "ct_lesions"), classes=["background", "lesion"], val_fraction=0, test_fraction=0)
    clips = data.clips("train")
    assert len(clips) == 4
    for index in range(4):
        clip = clips.read(index, [len(clips.labelled(index)) // 2])
        assert clip["spacing"][0] == 5
        assert clip["mask"].max() == 1
