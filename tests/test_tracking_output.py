"""Masks, tables and pictures of tracked clips as other programs read them."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vfmadapt.errors import UserError
from vfmadapt.frames import Clip, ClipInfo, open_clip
from vfmadapt.frames.write_dicom_seg import write_dicom_seg
from vfmadapt.frames.write_nifti import write_nifti
from vfmadapt.tracking.measures import COLUMNS, disc_volume, ejection_fraction, write_table
from vfmadapt.tracking.overlay import pictures, write_gif, write_mp4
from vfmadapt.tracking.tracked import Tracked

SIZE = (41, 33)  # odd: video codecs want even sizes


class Ramp(Clip):
    """Grey ramps that get brighter."""

    def __init__(self, info: ClipInfo) -> None:
        self.info = info

    def _read(self, index: int) -> np.ndarray:
        ramp = np.linspace(0, 1, self.info.width)[None, None] + np.zeros((self.info.height, 1))
        return ramp * 80 + 10 * index


def info(**facts: object) -> ClipInfo:
    given = {"path": "made", "kind": "video", "frames": 5, "height": SIZE[0], "width": SIZE[1], "channels": 1}
    return ClipInfo(**given | facts)


def tracked(about: ClipInfo) -> Tracked:
    """Structure 3 moves two columns a frame and is gone in the last; structure 7 rests."""
    labels = np.zeros((about.frames, about.height, about.width), dtype=np.uint8)
    for i in range(about.frames - 1):
        labels[i, 10:20, 4 + 2 * i : 10 + 2 * i] = 3
    labels[:, 30:36, 20:28] = 7
    present = np.array([[(labels[i] == k).any() for k in (3, 7)] for i in range(about.frames)])
    return Tracked(about, (3, 7), ("tumour", "liver"), (1, 0), labels, present.astype(np.float32), present)


AFFINE = ((-0.7, 0.0, 0.0, 30.0), (0.0, -0.9, 0.5, -20.0), (0.0, 0.4, 3.0, 5.0), (0.0, 0.0, 0.0, 1.0))


@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz"])
def test_nifti_lies_on_its_source(tmp_path: Path, name: str) -> None:
    import nibabel

    about = info(kind="volume", spacing=(3.04, 0.98, 0.7), affine=AFFINE)
    found = tracked(about)
    write_nifti(tmp_path / name, found.labels, about)
    image = nibabel.load(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(image.dataobj), found.labels.transpose(2, 1, 0))
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    assert image.get_data_dtype() == np.uint8
    with open_clip(tmp_path / name) as back:
        np.testing.assert_array_equal(back.frame(2)[0], found.labels[2])
    first = (tmp_path / name).read_bytes()
    write_nifti(tmp_path / name, found.labels, about)
    assert (tmp_path / name).read_bytes() == first


def test_nifti_without_an_affine_keeps_the_spacing(tmp_path: Path) -> None:
    import nibabel

    about = info(kind="volume", spacing=(3.0, 0.9, 0.7))
    write_nifti(tmp_path / "m.nii.gz", tracked(about).labels, about)
    assert nibabel.load(tmp_path / "m.nii.gz").header.get_zooms() == pytest.approx((0.7, 0.9, 3.0))


def test_nifti_of_a_video_has_time_as_fourth_axis(tmp_path: Path) -> None:
    import nibabel

    about = info(spacing=(None, 0.9, 0.7), seconds_per_frame=0.25)
    write_nifti(tmp_path / "m.nii.gz", tracked(about).labels, about)
    image = nibabel.load(tmp_path / "m.nii.gz")
    assert image.shape == (SIZE[1], SIZE[0], 1, 5)
    assert image.header.get_zooms() == pytest.approx((0.7, 0.9, 1.0, 0.25))
    assert image.header.get_xyzt_units() == ("mm", "sec")


def test_missing_slices_stay_empty(tmp_path: Path) -> None:
    import nibabel

    about = info(kind="volume", spacing=(3.0, 0.9, 0.7), slots=(0, 1, 3, 4, 6))
    found = tracked(about)
    write_nifti(tmp_path / "m.nii.gz", found.labels, about)
    data = np.asarray(nibabel.load(tmp_path / "m.nii.gz").dataobj)
    assert data.shape[2] == 7
    np.testing.assert_array_equal(data[..., 3], found.labels[2].T)
    assert not data[..., [2, 5]].any()


def test_dicom_segmentation_refers_to_its_slices(dicom_series: Path, tmp_path: Path) -> None:
    import highdicom
    from pydicom import dcmread

    with open_clip(dicom_series) as clip:
        assert [clip.frame(i)[0, 0, 0] for i in range(5)] == [-1000, -900, -800, -700, -600]
        found = tracked(clip.info)
        write_dicom_seg(tmp_path / "s.dcm", found.labels, {3: "tumour", 7: "liver"}, clip.info)
        made = highdicom.seg.segread(tmp_path / "s.dcm")
        uids = [dcmread(file).SOPInstanceUID for file in clip.info.sources]
    masks = made.get_pixels_by_source_instance(uids, combine_segments=True)
    np.testing.assert_array_equal(masks, np.select([found.labels == 3, found.labels == 7], [1, 2]))
    assert [d.SegmentLabel for d in made.SegmentSequence] == ["tumour", "liver"]
    assert made.get_volume(combine_segments=True).spacing == pytest.approx((2.5, 0.9, 0.7))


def test_dicom_segmentation_is_refused_of_other_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refers to the slices of a DICOM volume"):
        write_dicom_seg(tmp_path / "s.dcm", tracked(info()).labels, {3: "a", 7: "b"}, info())
    assert not (tmp_path / "s.dcm").exists()


def test_dicom_segmentation_of_frames_stored_against_their_order(dicom_series: Path, tmp_path: Path) -> None:
    import highdicom
    from pydicom import Dataset, Sequence, dcmread
    from pydicom.uid import EnhancedCTImageStorage

    def group(name: str, key: str, value: object) -> Dataset:
        inner, outer = Dataset(), Dataset()
        setattr(inner, key, value)
        setattr(outer, name, Sequence([inner]))
        return outer

    ds = dcmread(dicom_series / "1.dcm")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared = group("PlaneOrientationSequence", "ImageOrientationPatient", [1, 0, 0, 0, 1, 0])
    shared.update(group("PixelMeasuresSequence", "PixelSpacing", [0.9, 0.7]))
    shared.PixelMeasuresSequence[0].SliceThickness = 2.5
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        [group("PlanePositionSequence", "ImagePositionPatient", [0, 0, -2.5 * i]) for i in range(5)]
    )
    ds.NumberOfFrames, ds.PixelData = 5, ds.PixelData * 5
    del ds.ImagePositionPatient
    ds.save_as(tmp_path / "many.dcm")
    with open_clip(tmp_path / "many.dcm") as clip:
        found = tracked(clip.info)
        write_dicom_seg(tmp_path / "s.dcm", found.labels, {3: "a", 7: "b"}, clip.info)
    made = highdicom.seg.segread(tmp_path / "s.dcm")
    masks = made.get_pixels_by_source_frame(ds.SOPInstanceUID, [5, 4, 3, 2, 1], combine_segments=True)
    np.testing.assert_array_equal(masks > 0, found.labels > 0)


def test_dicom_segmentation_needs_the_patients_tags(dicom_series: Path, tmp_path: Path) -> None:
    from pydicom import dcmread

    for file in dicom_series.iterdir():
        ds = dcmread(file)
        del ds.StudyInstanceUID
        ds.save_as(file)
    with open_clip(dicom_series) as clip, pytest.raises(UserError, match=r"cannot carry .*StudyInstanceUID"):
        write_dicom_seg(tmp_path / "s.dcm", tracked(clip.info).labels, {3: "a", 7: "b"}, clip.info)


def test_dicom_segmentation_of_nothing(dicom_series: Path, tmp_path: Path) -> None:
    import highdicom

    with open_clip(dicom_series) as clip:
        write_dicom_seg(tmp_path / "s.dcm", np.zeros((5, *SIZE), np.uint8), {1: "a"}, clip.info)
    made = highdicom.seg.segread(tmp_path / "s.dcm")
    assert not made.pixel_array.any()


def test_mp4_has_every_frame_at_the_clips_rate(tmp_path: Path) -> None:
    import av

    about = info(seconds_per_frame=0.04)
    write_mp4(tmp_path / "o.mp4", Ramp(about), tracked(about))
    with av.open(str(tmp_path / "o.mp4")) as container:
        stream = container.streams.video[0]
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert stream.average_rate == 25
    assert len(decoded) == 5
    assert not any(n % 2 for n in decoded[0].shape[:2])
    drawn = list(pictures(Ramp(about), tracked(about)))
    height, width = drawn[0].shape[:2]
    off = np.abs(decoded[3][:height, :width].astype(float) - drawn[3])
    assert off.mean() < 8  # colour is stored at half the resolution


def test_gif_has_every_frame(tmp_path: Path) -> None:
    from PIL import Image

    about = info(seconds_per_frame=0.05)
    write_gif(tmp_path / "o.gif", Ramp(about), tracked(about))
    with Image.open(tmp_path / "o.gif") as image:
        assert (image.n_frames, image.info["duration"]) == (5, 50)


def test_overlay_tints_the_structures_alone() -> None:
    about = info()
    found = tracked(about)
    bare = replace(found, labels=np.zeros_like(found.labels))
    with_masks, without = (next(iter(pictures(Ramp(about), t))) for t in (found, bare))
    factor = with_masks.shape[1] // SIZE[1]
    changed = (with_masks != without).any(2)[: SIZE[0] * factor]
    np.testing.assert_array_equal(changed, np.kron(found.labels[0] > 0, np.ones((factor, factor))) > 0)


def test_overlay_shows_patients_as_radiologists_do_and_pixels_square() -> None:
    about = info(
        kind="volume", spacing=(2.0, 1.4, 0.7), affine=((0.7, 0, 0, 0), (0, 1.4, 0, 0), (0, 0, 2, 0), AFFINE[3])
    )
    found = replace(tracked(about), objects=(3,), names=("a",), present=np.ones((5, 1), bool), prompts=(0,))
    picture = next(iter(pictures(Ramp(about), found)))
    factor = picture.shape[1] // SIZE[1]
    assert len(picture) > 2 * SIZE[0] * factor  # twice as tall, and the caption
    assert picture[0, 0, 0] > picture[0, -1, 0]  # the ramp brightens to the patient's right, which is shown on the left


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_measures_each_frame(tmp_path: Path) -> None:
    about = info(spacing=(None, 0.9, 0.5), seconds_per_frame=0.2)
    write_table(tmp_path / "t.csv", tracked(about))
    read = rows(tmp_path / "t.csv")
    assert list(read[0]) == list(COLUMNS)
    assert len(read) == 10
    tumour = [row for row in read if row["structure"] == "tumour"]
    assert [float(row["area_mm2"]) for row in tumour[:4]] == pytest.approx([60 * 0.45] * 4)
    assert [float(row["displacement_mm"]) for row in tumour[:4]] == pytest.approx([1, 0, 1, 2])  # since frame 1
    assert [float(row["shift_x_mm"]) for row in tumour[:4]] == pytest.approx([-1, 0, 1, 2])
    assert (tumour[0]["centroid_x"], tumour[0]["centroid_y"]) == ("6.500", "14.500")
    assert (tumour[2]["time_s"], tumour[2]["present"], tumour[4]["present"]) == ("0.4000", "1", "0")
    assert (tumour[4]["area_px"], tumour[4]["centroid_x"], tumour[4]["displacement_mm"]) == ("0", "", "")


def test_the_table_leaves_millimetres_out_where_they_are_unknown(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", tracked(info()))
    row = rows(tmp_path / "t.csv")[0]
    assert (row["area_px"], row["area_mm2"], row["shift_x_mm"], row["time_s"]) == ("60", "", "", "")


def ellipse(long: float, short: float, degrees: float, side: int = 120) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    angle = np.deg2rad(degrees)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (along / long) ** 2 + (across / short) ** 2 <= 1


@pytest.mark.parametrize("degrees", [0, 37, 90])
def test_disc_volume_of_an_ellipsoid(degrees: float) -> None:
    # twenty discs of an ellipsoid hold 0.1 % more than it, pixels add up to a few times that
    wanted = 4 / 3 * np.pi * 45 * 20**2
    assert disc_volume(ellipse(45, 20, degrees), (1.0, 1.0)) == pytest.approx(wanted, rel=0.02)
    assert disc_volume(ellipse(45, 20, degrees), (0.5, 0.5)) == pytest.approx(wanted / 8, rel=0.02)


def test_ejection_fraction_of_a_beating_ellipsoid() -> None:
    beat = [20.0, 17.0, 15.0, 18.0, 20.0, 0.0]
    about = info(height=120, width=120, frames=6, seconds_per_frame=0.05, spacing=(None, 0.5, 0.5))
    labels = np.stack([ellipse(45, short, 70) if short else np.zeros((120, 120), bool) for short in beat])
    made = Tracked(
        about, (1,), ("lv",), (0,), labels.astype(np.uint8), np.ones((6, 1), np.float32), np.ones((6, 1), bool)
    )
    found = ejection_fraction(made, "lv")
    assert found.fraction == pytest.approx(1 - (15 / 20) ** 2, abs=0.02)
    assert (found.end_diastole, found.end_systole) == (0, 2)
    assert found.end_diastolic_ml == pytest.approx(4 / 3 * np.pi * 22.5 * 10**2 / 1000, rel=0.02)
    unknown = ejection_fraction(replace(made, info=replace(about, spacing=(None, None, None))), "lv")
    assert unknown.fraction == pytest.approx(found.fraction)
    assert unknown.end_systolic_ml is None


def test_ejection_fraction_is_refused_without_a_beat() -> None:
    with pytest.raises(UserError, match=r"prompted are: tumour, liver"):
        ejection_fraction(tracked(info()), "lv")
    with pytest.raises(UserError, match="is a volume"):
        ejection_fraction(tracked(info(kind="volume")), "liver")
    empty = replace(tracked(info()), labels=np.zeros((5, *SIZE), np.uint8))
    with pytest.raises(UserError, match="found in 0 frames"):
        ejection_fraction(empty, "liver")
