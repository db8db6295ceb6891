"""Masks lie on the voxels that they were drawn on, however their file stores them; or they are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vfmadapt.errors import UserError
from vfmadapt.frames import open_clip
from vfmadapt.frames.labelled import LabelledClip, labelled_clips, open_masks
from vfmadapt.frames.write_dicom_seg import write_dicom_seg
from vfmadapt.frames.write_nifti import write_nifti
from vfmadapt.tracking.asking import read_prompts

nibabel = pytest.importorskip("nibabel")
RNG = np.random.default_rng(0)
AFFINE = np.array([[-0.7, 0, 0, 30], [0, -0.9, 0.5, -20], [0, 0.4, 3.0, 5], [0, 0, 0, 1]])  # oblique
MASKS = RNG.integers(0, 3, (5, 9, 7)).astype(np.uint8)  # (T, H, W), nowhere symmetric


def write(path: Path, values: np.ndarray, affine: Any = AFFINE, axes: str | None = None) -> Path:
    """NIfTI of values (T, H, W), stored along other axes, such as "LPS", by nibabel."""
    image = nibabel.Nifti1Image(values.T, affine)
    if axes is not None:
        ornt = nibabel.orientations
        image = image.as_reoriented(ornt.ornt_transform(ornt.io_orientation(affine), ornt.axcodes2ornt(axes)))
    nibabel.save(image, path)
    return path


def pair(folder: Path, masks: np.ndarray = MASKS, **how: Any) -> LabelledClip:
    write(folder / "a.nii.gz", RNG.integers(0, 99, (5, 9, 7)).astype(np.int16))
    write(folder / "a_mask.nii.gz", masks, **how)
    (found,) = labelled_clips(folder)
    return found


def shown(labelled: LabelledClip, **options: Any) -> np.ndarray:
    """The masks as they come with the frames of their clip, from the last on: order must not matter."""
    clip, masks = labelled.open(**options)
    with clip, masks:
        assert (masks.info.size, len(masks), masks.info.channels) == (clip.info.size, len(clip), 1)
        return np.stack([masks.frame(i)[0] for i in reversed(range(len(masks)))])[::-1]


@pytest.mark.parametrize("axes", [None, "LPS", "RAS", "LAS", "RPI", "PIR", "SLA", "ASR"])
def test_masks_of_the_same_grid_are_turned(tmp_path: Path, axes: str | None) -> None:
    np.testing.assert_array_equal(shown(pair(tmp_path, axes=axes)), MASKS)


def test_headers_round(tmp_path: Path) -> None:
    off = AFFINE + np.where(np.arange(4) < 3, 1e-3, 0.2)[None] * (np.arange(4) < 3)[:, None]
    np.testing.assert_array_equal(shown(pair(tmp_path, affine=off)), MASKS)


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(4),
        AFFINE + np.array([0, 0, 0, 3.0]) * np.array([[0], [0], [1], [0]]),  # a slice further
        AFFINE @ np.diag([2.0, 1, 1, 1]),
        AFFINE @ np.diag([1.1, 1, 1, 1]),
        AFFINE @ np.diag([-1.0, 1, 1, 1]),  # mirrored, yet not onto the same voxels
    ],
)
def test_masks_that_lie_elsewhere_are_refused(tmp_path: Path, affine: np.ndarray) -> None:
    labelled = pair(tmp_path, affine=affine)
    with pytest.raises(UserError, match="does not lie on the voxels of") as raised:
        labelled.open()
    assert "\n" not in str(raised.value)
    with open_clip(labelled.image) as clip, pytest.raises(UserError, match="does not lie on the voxels of"):
        read_prompts(str(labelled.masks), clip.info)


def test_a_file_that_does_not_say_where_it_lies_is_taken_as_it_is(tmp_path: Path) -> None:
    labelled = pair(tmp_path, affine=None)
    with open_masks(labelled.masks) as masks:
        assert masks.info.assumed
    np.testing.assert_array_equal(shown(labelled), MASKS)
    labelled = pair(tmp_path, masks=MASKS[1:], affine=None)
    with pytest.raises(UserError, match="4 masks of 9 x 7 pixels for 5 frames"):
        labelled.open()


@pytest.mark.parametrize("axes", ["LPS", "RAI"])
def test_in_time_only_the_plane_counts(tmp_path: Path, axes: str) -> None:
    affine = np.diag([0.5, 0.4, 1.0, 1.0])
    labelled = pair(tmp_path, axes=axes, affine=affine)
    write(labelled.image, MASKS.astype(np.int16), affine + np.array([0, 0, 7, 30])[:, None] * np.array([0, 0, 0, 1.0]))
    turned = {"LPS": MASKS, "RAI": MASKS[::-1]}[axes]  # the third axis of a video is time, which has no left
    np.testing.assert_array_equal(shown(labelled, kind="video"), turned)
    write(labelled.masks, MASKS, np.diag([0.5, 0.8, 1, 1]))
    with pytest.raises(UserError, match="does not lie on the voxels"):
        labelled.open(kind="video")


def test_masks_are_read_with_what_says_how_frames_lie(tmp_path: Path) -> None:
    moving = RNG.integers(0, 3, (4, 5, 9, 7)).astype(np.uint8)  # time, slice, row, column
    for name, values in (("a.nii.gz", moving * 9), ("a_mask.nii.gz", moving), ("b.nii.gz", MASKS)):
        nibabel.save(nibabel.Nifti1Image(values.T, AFFINE), tmp_path / name)
    (labelled,) = labelled_clips(tmp_path)
    np.testing.assert_array_equal(shown(labelled, slice=2), moving[:, 2])
    np.testing.assert_array_equal(shown(labelled, time=1), moving[1])
    of_a_moment = LabelledClip("b", labelled.image, tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(shown(of_a_moment, time=1), MASKS)
    with open_clip(labelled.image, slice=2) as clip:
        (prompt, _) = read_prompts(str(labelled.masks), clip.info, {"slice": 2}).prompts
        np.testing.assert_array_equal(prompt.mask, moving[prompt.frame, 2] == 1)
        with pytest.raises(UserError, match="does not lie on the voxels"):
            read_prompts(str(labelled.masks), clip.info, {"slice": 3})


def test_prompts_for_a_series_from_nifti_beside_it(dicom_series: Path, tmp_path: Path) -> None:
    masks = np.zeros((5, 41, 33), np.uint8)
    masks[1, 5:9, 20:30], masks[3, 30:40, 2:9] = 1, 2
    with open_clip(dicom_series) as clip:
        info = clip.info
    flipped = nibabel.as_closest_canonical(nibabel.load(write_nifti(tmp_path / "m.nii.gz", masks, info)))
    nibabel.save(flipped, tmp_path / "flipped.nii.gz")
    assert not np.array_equal(np.asarray(flipped.dataobj).T, masks)
    for name in ("m", "flipped"):
        first, second = read_prompts(str(tmp_path / f"{name}.nii.gz"), info).prompts
        assert (first.frame, second.frame) == (1, 3)
        np.testing.assert_array_equal(first.mask, masks[1] == 1)
        np.testing.assert_array_equal(second.mask, masks[3] == 2)
    (one,) = read_prompts([{"mask": str(tmp_path / "flipped.nii.gz"), "frame": 3, "object": 7}], info).prompts
    np.testing.assert_array_equal(one.mask, masks[3] > 0)


def test_masks_for_slices_that_a_series_lacks(dicom_series: Path, tmp_path: Path) -> None:
    with open_clip(dicom_series) as clip:
        whole = clip.info
    masks = RNG.integers(0, 3, (5, 41, 33)).astype(np.uint8)
    write_nifti(tmp_path / "series_mask.nii.gz", masks, whole)
    (dicom_series / "3.dcm").unlink()  # the middle one
    (labelled,) = labelled_clips(tmp_path)
    np.testing.assert_array_equal(shown(labelled), masks[[0, 1, 3, 4]])
    with open_clip(dicom_series) as clip:
        write_nifti(tmp_path / "series_mask.nii.gz", masks[[0, 1, 3, 4]], clip.info)  # as we write them
    np.testing.assert_array_equal(shown(labelled), masks[[0, 1, 3, 4]])


def test_series_and_files_of_many_frames_have_nifti_masks(dicom_series: Path, tmp_path: Path) -> None:
    from pydicom import dcmread

    masks = RNG.integers(0, 3, (5, 41, 33)).astype(np.uint8)
    with open_clip(dicom_series) as clip:
        write_nifti(tmp_path / "series_mask.nii.gz", masks, clip.info)
    cine = dcmread(dicom_series / "1.dcm")
    cine.NumberOfFrames, cine.PixelData = 5, cine.PixelData * 5
    for key in ("ImagePositionPatient", "ImageOrientationPatient"):
        delattr(cine, key)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    cine.save_as(tmp_path / "images" / "echo.dcm")
    nibabel.save(nibabel.Nifti1Image(masks.transpose(2, 1, 0)[:, :, None], np.eye(4)), tmp_path / "masks" / "echo.nii")
    found = labelled_clips(tmp_path)
    assert [c.id for c in found] == ["images/echo", "series"]
    for labelled in found:
        np.testing.assert_array_equal(shown(labelled), masks)


def test_dicom_segmentations_are_masks(dicom_series: Path, tmp_path: Path) -> None:
    masks = np.zeros((5, 41, 33), np.uint8)
    masks[1, 5:9, 20:30], masks[2:4, 30:40, 2:9] = 1, 2  # the first and the last frame are left out of the file
    with open_clip(dicom_series) as clip:
        info = clip.info
        write_dicom_seg(tmp_path / "series_seg.dcm", masks, {1: "a", 2: "b"}, info)
    (labelled,) = labelled_clips(tmp_path)
    np.testing.assert_array_equal(shown(labelled), masks)
    first, second = read_prompts(str(tmp_path / "series_seg.dcm"), info).prompts
    np.testing.assert_array_equal(first.mask, masks[1] == 1)
    assert (first.frame, second.frame) == (1, 2)
    with pytest.raises(UserError, match=r"belongs to DICOM images, .*give its masks as NIfTI"):
        read_prompts(str(tmp_path / "series_seg.dcm"), open_clip(write(tmp_path / "o.nii", MASKS)).info)
    for file in dicom_series.iterdir():  # another series
        file.write_bytes(file.read_bytes().replace(*(uid(file, "SOPInstanceUID", i) for i in (0, 1))))
    with pytest.raises(UserError, match="was drawn on other images than"):
        labelled.open()


def uid(file: Path, name: str, change: int) -> bytes:
    """A tag's bytes, its last digit changed."""
    from pydicom import dcmread

    value = str(dcmread(file)[name].value)
    return (value[:-1] + str((int(value[-1]) + change) % 10)).encode()


def test_pictures_are_clips_of_one_frame(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.arange(54, dtype=np.uint8).reshape(9, 6)
    for name in ("a.png", "a_mask.png", "images/b.jpg", "masks/b.png", "c.tif", "c_gt.gif", "d.bmp", "alone.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels % 2 if "mask" in name or "gt" in name else pixels).save(tmp_path / name)
    write(tmp_path / "v.nii.gz", MASKS)  # previews beside volumes are no masks of theirs, nor have they masks
    write(tmp_path / "v_mask.nii.gz", MASKS)
    for name in ("v.png", "v_mask.png", "w_mask.png"):
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / name)
    write(tmp_path / "w.nii.gz", MASKS)
    found = {labelled.id: labelled for labelled in labelled_clips(tmp_path)}
    assert list(found) == ["a", "c", "images/b", "v"]
    assert found["v"].masks.name == "v_mask.nii.gz"
    for name in ("a", "c", "images/b"):
        np.testing.assert_array_equal(shown(found[name]), pixels[None] % 2)
