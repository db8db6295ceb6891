"""What is wrong with a clip is said in one line, or made right and warned about."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vfmadapt.errors import UserError
from vfmadapt.frames import open_clip


def _sibling(name: str) -> ModuleType:
    """Another test file, for its writers: with importlib's import mode tests are in no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


frames = _sibling("test_frames")
VOLUME = np.random.default_rng(0).integers(0, 2000, (6, 9, 7)).astype(np.int16)


def refused(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        list(open_clip(path, **options).iterate())
    assert "\n" not in str(error.value)


def test_nothing_there_and_nothing_known(tmp_path: Path) -> None:
    refused(tmp_path / "none.mp4", "no such file")
    (tmp_path / "a.xyz").write_bytes(b"x" * 200)
    refused(tmp_path / "a.xyz", "not a known kind")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither images")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.npz", "a.dcm", "a.mp4", "a.avi", "a.png"])
@pytest.mark.parametrize("content", [b"", b"nonsense" * 100])
def test_files_that_are_not_what_their_name_says(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "not a readable")


def test_options_and_frames_that_are_not_there(tmp_path: Path) -> None:
    path = frames.write_nifti(tmp_path / "a.nii", VOLUME)
    refused(path, "no option 'keys'; for files of this kind there are: kind, slice, time", keys=1)
    refused(path, "one volume", slice=1)
    with pytest.raises(UserError, match="no frame 6; it has 6, counted from 0 to 5"):
        open_clip(path).frame(6)


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    from PIL import Image

    sitk = frames.sitk
    sitk.WriteImage(sitk.GetImageFromArray(VOLUME), str(tmp_path / "a.mha"))
    refused(tmp_path / "a.mha", "seconds_per_frame= is for kind=video", seconds_per_frame=0.1)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True), str(tmp_path / "b.mha"))
    refused(tmp_path / "b.mha", "time_first= is for grey images", time_first=True)
    Image.new("L", (5, 4)).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "step=3 is from slice to slice; give kind=volume", step=3)


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_cut_off_metaimages(tmp_path: Path, compressed: bool, time_first: bool) -> None:
    path = tmp_path / "a.mha"
    frames.sitk.WriteImage(frames.sitk.GetImageFromArray(VOLUME), str(path), compressed)
    path.write_bytes(path.read_bytes()[:-40])
    refused(path, "cannot be read; make a whole copy", time_first=time_first)


def test_metaimages_in_several_files(tmp_path: Path) -> None:
    header = "ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 7 9 2\nElementType = MET_SHORT\n"
    (tmp_path / "a.mhd").write_text(header + "ElementDataFile = LIST\n0.raw\n1.raw\n")
    for index in range(2):
        (tmp_path / f"{index}.raw").write_bytes(VOLUME[index].tobytes())
    np.testing.assert_array_equal(open_clip(tmp_path / "a.mhd").frame(1)[0], VOLUME[1])
    refused(tmp_path / "a.mhd", "not in one plain file", time_first=True)


def test_four_axes_need_a_choice(tmp_path: Path) -> None:
    path = frames.write_nifti(tmp_path / "a.nii", np.zeros((4, 3, 5, 6), np.uint8))
    refused(path, "3 slices at 4 moments; give slice=0..2")
    refused(path, "slice=3 is not there", slice=3)


def test_one_frame_is_a_clip(tmp_path: Path) -> None:
    assert len(open_clip(frames.write_nifti(tmp_path / "a.nii", VOLUME[:1]))) == 1
    assert len(open_clip(frames.write_dicom(tmp_path / "s", VOLUME[:1], [3.0]))) == 1
    assert len(open_clip(frames.write_video(tmp_path / "a.mp4", frames.moving(1)))) == 1


def test_clips_without_frames(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", imgs=np.zeros((0, 4, 4)))
    refused(tmp_path / "a.npz", "none of them 0")
    np.savez(tmp_path / "b.npz", a=np.zeros((2, 4, 4)), b=np.zeros((2, 4, 4)))
    refused(tmp_path / "b.npz", "has the keys a, b")
    np.savez(tmp_path / "c.npz", imgs=np.array([{}]))
    refused(tmp_path / "c.npz", "Python objects")
    with frames.av.open(str(tmp_path / "a.mp4"), "w") as file:
        file.add_stream("mpeg4", rate=25)
        file.start_encoding()
    refused(tmp_path / "a.mp4", "no frame|not a readable|no video")


def test_frames_of_different_sizes(tmp_path: Path) -> None:
    from PIL import Image

    for index, width in enumerate((5, 5, 6)):
        Image.new("L", (width, 4)).save(tmp_path / f"{index}.png")
    refused(tmp_path, "2.png has 4 x 6 pixels, 0.png 4 x 5")
    folder = frames.write_dicom(tmp_path / "s", VOLUME, [*range(6)])
    one = frames.pydicom.dcmread(folder / "004.dcm")
    one.Rows, one.PixelData = 8, VOLUME[4, :8].astype(np.uint16).tobytes()
    one.save_as(folder / "004.dcm")
    refused(folder, "004.dcm has 8 x 7 pixels, 000.dcm 9 x 7")


def test_nan_becomes_the_least_value_and_sixteen_bits_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = np.linspace(5, 60000, 6 * 9 * 7, dtype=np.float32).reshape(6, 9, 7)
    values[2, 3, 4], values[2, 0, 0] = np.nan, np.inf
    clip = open_clip(frames.write_nifti(tmp_path / "a.nii", values))
    frame = clip.frame(2)
    assert frame[0, 3, 4] == frame[0, 0, 0] == np.nanmin(values[2])
    assert frame.max() == values[2, 8, 6]
    assert "not finite" in caplog.text
    assert np.isfinite(clip.window()).all()
    deep = frames.write_nifti(tmp_path / "b.nii", (VOLUME.astype(np.uint16) * 30))
    np.testing.assert_array_equal(open_clip(deep).frame(1)[0], VOLUME[1].astype(np.float32) * 30)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_cut_off_videos_give_what_is_there_or_say_so(
    tmp_path: Path, share: float, front: bool, codec: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3)).astype(np.uint8)
    options = {"movflags": "faststart"} if front and ending == "mp4" else {}
    whole = frames.write_video(tmp_path / f"a.{ending}", noise, codec, **options)
    cut = tmp_path / f"b.{ending}"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    complete = dict(open_clip(whole).iterate())
    said, seen = "", {}
    try:
        for index, frame in open_clip(cut).iterate():
            seen[index] = frame
    except UserError as error:
        said = str(error)
    if seen:
        assert not said
        assert len(seen) < 12
        assert len(caplog.messages) == 1
        assert f"ends early: {len(seen)} " in caplog.text
    else:
        assert "whole" in said
        assert "\n" not in said
    assert seen or not (front and ending == "mp4")
    for index in list(seen)[: -1 if ending == "avi" else None]:  # there the last may be presented after lost ones
        np.testing.assert_array_equal(seen[index], complete[index])


def damaged(path: Path, first: int, last: int) -> Path:
    """The video with zeros instead of packets `first` to `last`, in the order of decoding."""
    with frames.av.open(str(path)) as file:
        packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for place, size in packets[first : last + 1]:
        data[place : place + size] = bytes(size)
    path.write_bytes(data)
    return path


def test_frames_of_a_damaged_video_are_stood_in_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = frames.write_video(tmp_path / "a.mp4", frames.moving(40), "libx264", gop=10)
    ordered = dict(open_clip(path).iterate())
    clip = open_clip(damaged(path, 12, 13))
    seen = dict(clip.iterate())
    assert list(seen) == list(range(40))
    for index in [*range(10), *range(20, 40)]:  # the other parts are as they were
        np.testing.assert_array_equal(seen[index], ordered[index])
    assert len(caplog.messages) == 1
    assert "is damaged: frame 1" in caplog.text
    for index, frame in clip.iterate(39, None, -1):
        np.testing.assert_array_equal(frame, seen[index])


def test_a_video_ends_where_nothing_more_can_be_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = frames.write_video(tmp_path / "a.mp4", frames.moving(40), "libx264", gop=10)
    ordered = dict(open_clip(path).iterate())
    clip = open_clip(damaged(path, 20, 40))
    seen = dict(clip.iterate())
    assert 10 <= len(seen) <= 20
    for index, frame in seen.items():
        np.testing.assert_array_equal(frame, ordered[index])
    assert [message.split(":")[1] for message in caplog.messages] == [
        f" frames {len(seen)} to 39 cannot be decoded and are left out; make a whole copy"
    ]
    with pytest.raises(UserError, match="frame 30 of 40 cannot be decoded, nor what follows"):
        clip.frame(30)
    refused(damaged(path, 0, 40), "frame 0 of 40 cannot be decoded, nor what follows")


def test_dicom_slices_in_any_order_come_by_position(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = [15.0, 0.0, 25.0, 5.0, 20.0, 10.0]
    clip = open_clip(frames.write_dicom(tmp_path / "s", VOLUME, places))
    order = np.argsort(places)
    for index in range(6):
        np.testing.assert_array_equal(clip.frame(index)[0], VOLUME[order[index]] * 2.0 - 1024)
    assert clip.info.spacing[0] == 5
    assert "placed by their position" in caplog.text


def test_missing_dicom_slices_leave_a_gap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = open_clip(frames.write_dicom(tmp_path / "s", VOLUME, [0, 5, 10, 20, 25, 30]))
    assert clip.info.slots == (0, 1, 2, 4, 5, 6)
    assert clip.info.spacing[0] == 5
    assert clip.info.affine is not None
    assert clip.info.affine[2][2] == pytest.approx(5)
    assert "1 slices are missing, at 15 mm" in caplog.text


def test_unevenly_spaced_slices_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_clip(frames.write_dicom(tmp_path / "s", VOLUME, [0, 5, 11, 14, 20, 25]))
    assert "unevenly, 3.00 to 6.00 mm" in caplog.text


def test_dicom_folders_that_need_a_choice(tmp_path: Path) -> None:
    folder = frames.write_dicom(tmp_path / "s", VOLUME, [0, 5, 10] * 2, TriggerTime=[0.0] * 3 + [40.0] * 3)
    refused(folder, "3 slices at 2 moments")
    followed = open_clip(folder, slice=1)
    assert (followed.info.kind, len(followed)) == ("video", 2)
    frames.write_dicom(folder, VOLUME[:2], [0, 5], names=["x", "y"], SeriesNumber=9)
    refused(folder, r"the series 3 \(6 files\), 9 \(2 files\); choose one with series=")
    assert len(open_clip(folder, series=9)) == 2


def test_dicom_without_an_image(tmp_path: Path) -> None:
    folder = frames.write_dicom(tmp_path / "s", VOLUME[:1], [0])
    data = frames.pydicom.dcmread(folder / "000.dcm")
    del data.Rows, data.PixelData
    data.save_as(folder / "000.dcm")
    refused(folder, "no DICOM file in it holds an image")
    refused(folder / "000.dcm", "holds no image")
