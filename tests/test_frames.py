"""Readers of frames: values, geometry and order, one frame at a time; formats written here by other libraries."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vfmadapt.frames import open_clip
from vfmadapt.frames.video import VideoClip

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
av = pytest.importorskip("av")
sitk = pytest.importorskip("SimpleITK")

TURNED = np.array([[0, -1.5, 0, 10], [0.8, 0, 0, -20], [0, 0, 4.0, 30], [0, 0, 0, 1]])  # rows along x, columns along y


@pytest.fixture
def volume() -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(-1000, 2000, (6, 9, 7)).astype(np.int16)  # (T, H, W)


def write_nifti(path: Path, volume: NDArray[Any], affine: NDArray[Any] = TURNED) -> Path:
    nibabel.save(nibabel.Nifti1Image(volume.T, affine), path)
    return path


def write_dicom(
    folder: Path, volume: NDArray[Any], places: list[float], *, names: list[str] | None = None, **tags: Any
) -> Path:
    """One file per slice at z = places[i] mm, 1.5 mm between rows and 0.8 mm between columns."""
    folder.mkdir(exist_ok=True)
    series = pydicom.uid.generate_uid()
    for index, (pixels, z) in enumerate(zip(volume, places, strict=True)):
        data = pydicom.Dataset()
        data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
        data.SeriesInstanceUID, data.SeriesNumber, data.InstanceNumber = series, 3, index + 1
        data.Modality = "CT"
        data.Rows, data.Columns = pixels.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 0
        data.ImagePositionPatient, data.ImageOrientationPatient = [10, 20, z], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing = [1.5, 0.8]
        data.RescaleSlope, data.RescaleIntercept = 2, -1024
        data.PixelData = pixels.astype(np.uint16).tobytes()
        for name, value in tags.items():
            setattr(data, name, value[index] if isinstance(value, list) else value)
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.save_as(folder / (names[index] if names else f"{index:03d}.dcm"), enforce_file_format=True)
    return folder


def write_video(
    path: Path, frames: NDArray[np.uint8], codec: str = "mpeg4", rate: int = 25, gop: int = 5, **options: str
) -> Path:
    """A video with a key frame every `gop` frames; H.264 also where the picture changes, and frames out of order."""
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.bit_rate = 2_000_000
        for values in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        file.mux(stream.encode())
    return path


def moving(frames: int = 12) -> NDArray[np.uint8]:
    """A bright square that moves to the right, 4 pixels a frame: (T, 32, 64, 3)."""
    clip = np.full((frames, 32, 64, 3), 40, np.uint8)
    for index in range(frames):
        clip[index, 12:20, 4 * index : 4 * index + 8] = 220
    return clip


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_gives_slices_with_the_files_own_geometry(tmp_path: Path, volume: NDArray[np.int16], name: str) -> None:
    clip = open_clip(write_nifti(tmp_path / name, volume))
    assert (len(clip), *clip.info.size, clip.info.channels) == (6, 9, 7, 1)
    assert clip.info.spacing == (4.0, 1.5, pytest.approx(0.8))
    np.testing.assert_allclose(clip.info.affine, TURNED, atol=1e-6)
    for index in (5, 0, 3):
        frame = clip.frame(index)
        assert frame.dtype == np.float32
        np.testing.assert_array_equal(frame[0], volume[index])


def test_nifti_of_four_axes_follows_a_slice_or_takes_a_moment(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 6, 3, 4)).astype(np.float32)
    image = nibabel.Nifti1Image(values, np.diag([1, 1, 8, 1]))
    image.header.set_zooms((1, 1, 8, 50))
    image.header.set_xyzt_units("mm", "msec")
    nibabel.save(image, tmp_path / "a.nii.gz")
    followed = open_clip(tmp_path / "a.nii.gz", slice=2)
    assert (followed.info.kind, len(followed), followed.info.dims) == ("video", 4, 4)
    assert followed.info.seconds_per_frame == pytest.approx(0.05)
    assert followed.info.affine is not None
    assert followed.info.affine[2][3] == 16  # where that slice lies
    np.testing.assert_array_equal(followed.frame(3)[0], values[:, :, 2, 3].T)
    moment = open_clip(tmp_path / "a.nii.gz", time=1)
    assert (moment.info.kind, len(moment), moment.info.spacing) == ("volume", 3, (8.0, 1.0, 1.0))
    np.testing.assert_array_equal(moment.frame(2)[0], values[:, :, 2, 1].T)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3), (4, 2, 5, 6)])
def test_npz_of_any_order_of_the_axes(
    tmp_path: Path, shape: tuple[int, ...], order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfmadapt.frames.frame_file._BLOCK", 64)  # bytes, so that there are several blocks
    values = np.asarray(np.random.default_rng(0).integers(-9, 9, shape).astype(np.int16), order=order)
    np.savez(tmp_path / "a.npz", imgs=values)
    clip = open_clip(tmp_path / "a.npz")
    for index in (3, 1):
        wanted = values[index].transpose(2, 0, 1) if shape[-1] == 3 else values[index].reshape(-1, *shape[-2:])
        np.testing.assert_array_equal(clip.frame(index), wanted)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64", "float32", "float64"])
def test_metaimage_with_time_first_agrees_with_itk(
    tmp_path: Path, name: str, compressed: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfmadapt.frames.frame_file._BLOCK", 256)
    values = np.random.default_rng(0).integers(0, 99, (9, 7, 6)).astype(dtype)  # (H, W, T)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / name), compressed)
    clip = open_clip(tmp_path / name, kind="video", time_first=True, seconds_per_frame=0.25)
    assert (len(clip), clip.info.size, clip.info.seconds_per_frame) == (6, (9, 7), 0.25)
    for index in (4, 1):
        np.testing.assert_array_equal(clip.frame(index)[0], values[:, :, index])


def test_metaimage_of_the_other_byte_order(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9999, (9, 7, 6)).astype(">i2")
    header = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = True\nDimSize = 6 7 9\n"
    fields = "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "a.mha").write_bytes((header + fields).encode() + values.tobytes())
    for options in ({}, {"kind": "video", "time_first": True}):
        clip = open_clip(tmp_path / "a.mha", **options)
        np.testing.assert_array_equal(clip.frame(4)[0], values[:, :, 4] if options else values[4])


@pytest.mark.parametrize("compressed", [False, True])
def test_metaimage_agrees_with_itk_and_with_its_nifti(
    tmp_path: Path, volume: NDArray[np.int16], compressed: bool
) -> None:
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((0.8, 1.5, 4.0))
    image.SetOrigin((3, 4, 5))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "a.mha"), compressed)
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    ours, nifti = open_clip(tmp_path / "a.mha"), open_clip(tmp_path / "a.nii")
    np.testing.assert_allclose(ours.info.affine, nifti.info.affine, atol=1e-5)
    np.testing.assert_allclose(ours.info.spacing, nifti.info.spacing, atol=1e-6)
    for index in (4, 1):
        np.testing.assert_array_equal(ours.frame(index)[0], volume[index])


def test_npz_of_medsam2s_layout(tmp_path: Path, volume: NDArray[np.int16]) -> None:
    facts = {"spacing": [0.8, 1.5, 5.0], "direction": np.eye(3).ravel(), "origin": [1.0, 2.0, 3.0]}
    np.savez_compressed(tmp_path / "a.npz", imgs=volume, gts=volume > 0, **facts)
    clip = open_clip(tmp_path / "a.npz")
    assert (clip.info.kind, clip.info.spacing) == ("volume", (5.0, 1.5, 0.8))
    np.testing.assert_allclose(clip.info.affine, [[-0.8, 0, 0, -1], [0, -1.5, 0, -2], [0, 0, 5, 3], [0, 0, 0, 1]])
    assert clip.info.upright == (False, False)
    np.testing.assert_array_equal(clip.frame(2)[0], volume[2])
    np.testing.assert_array_equal(open_clip(tmp_path / "a.npz", key="gts").frame(2)[0], volume[2] > 0)


@pytest.mark.parametrize(("shape", "wanted"), [((4, 5, 6, 3), (3, 5, 6)), ((4, 2, 5, 6), (2, 5, 6))])
def test_npz_channels_first_and_last(tmp_path: Path, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    np.savez(tmp_path / "a.npz", video=np.zeros(shape, np.uint8), seconds_per_frame=0.1)
    clip = open_clip(tmp_path / "a.npz")
    assert clip.frame(3).shape == wanted
    assert (clip.info.kind, clip.info.seconds_per_frame) == ("video", 0.1)


def test_dicom_series_agrees_with_itk(tmp_path: Path, volume: NDArray[np.int16]) -> None:
    write_dicom(tmp_path / "s", volume + 1000, [5.0 * i for i in range(6)])
    clip = open_clip(tmp_path / "s")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    sitk.WriteImage(reader.Execute(), str(tmp_path / "s.nii"))
    itk = open_clip(tmp_path / "s.nii")
    np.testing.assert_allclose(clip.info.affine, itk.info.affine, atol=1e-5)
    assert clip.info.spacing == (5.0, 1.5, 0.8)
    assert len(clip.info.sources) == 6
    np.testing.assert_array_equal(clip.frame(4), itk.frame(4))


def test_dicom_windows_and_inverted_grey(tmp_path: Path, volume: NDArray[np.int16]) -> None:
    window = {"WindowCenter": [[40, 50]] * 6, "WindowWidth": [[400, 350]] * 6}
    shown = open_clip(write_dicom(tmp_path / "a", volume, [*range(6)], **window))
    assert shown.window() == (-160, 240)
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    assert open_clip(write_dicom(tmp_path / "b", volume, [*range(6)], **window, **inverted)).window() == (240, -160)


def test_dicom_cine_at_one_place_is_ordered_by_trigger_time(tmp_path: Path, volume: NDArray[np.int16]) -> None:
    times = [80.0, 0.0, 40.0, 120.0, 200.0, 160.0]
    clip = open_clip(write_dicom(tmp_path / "s", volume + 1000, [7.0] * 6, TriggerTime=times))
    assert (clip.info.kind, clip.info.spacing[0]) == ("video", None)
    assert clip.info.seconds_per_frame == pytest.approx(0.04)
    np.testing.assert_array_equal(clip.frame(0)[0], (volume[1] + 1000) * 2.0 - 1024)


def test_dicom_of_many_frames(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3)).astype(np.uint8)
    region = pydicom.Dataset()
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.03, 0.05
    folder = write_dicom(
        tmp_path / "s", frames[:1], [0], Modality="US", NumberOfFrames=5, SamplesPerPixel=3, BitsAllocated=8,
        BitsStored=8, HighBit=7, PhotometricInterpretation="RGB", PlanarConfiguration=0, FrameTime=20, Rows=4,
        Columns=6, PixelData=frames.tobytes(), SequenceOfUltrasoundRegions=pydicom.Sequence([region]),
    )  # fmt: skip
    path = folder / "000.dcm"
    data = pydicom.dcmread(path)
    for name in ("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"):
        delattr(data, name)
    data.save_as(path)
    clip = open_clip(path)
    assert (clip.info.kind, len(clip), clip.info.channels) == ("video", 5, 3)
    assert clip.info.spacing == (None, pytest.approx(0.5), pytest.approx(0.3))
    assert clip.info.seconds_per_frame == pytest.approx(0.02)
    np.testing.assert_array_equal(clip.frame(3), frames[3].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "mpeg4"), ("a.avi", "mjpeg"), ("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "libx264")],
)
def test_video_frames_in_any_order_are_those_in_order(tmp_path: Path, name: str, codec: str) -> None:
    clip = open_clip(write_video(tmp_path / name, moving(), codec))
    assert (len(clip), clip.info.size, clip.info.channels) == (12, (32, 64), 3)
    assert clip.info.seconds_per_frame == pytest.approx(0.04)
    ordered = {i: f for i, f in clip.iterate()}
    for index in (11, 3, 4, 0, 7):
        np.testing.assert_array_equal(clip.frame(index), ordered[index])
        assert abs(ordered[index].mean(0).mean(0).argmax() - 4 * index - 3.5) <= 4.5  # the square is where it was
    for wanted in (range(11, -1, -1), range(9, 2, -3), range(1, 12, 4)):
        seen = dict(clip.iterate(wanted.start, None if wanted.stop == -1 else wanted.stop, wanted.step))
        assert list(seen) == list(wanted)
        for index, frame in seen.items():
            np.testing.assert_array_equal(frame, ordered[index])


@pytest.mark.parametrize(("gop", "most"), [(40, 40 + 32 + 24 + 16 + 8), (5, 40)])
def test_backwards_few_frames_are_decoded_twice_and_few_are_held(
    tmp_path: Path, gop: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def counted(self: VideoClip) -> Iterator[Any]:
        for timed in decode(self):
            decoded.append(timed[0])
            yield timed

    decode = VideoClip._decoded
    monkeypatch.setattr(VideoClip, "_decoded", counted)
    monkeypatch.setattr("vfmadapt.frames.video._HELD", 8 * 32 * 64)  # eight frames
    noise = np.random.default_rng(0).integers(0, 40, (40, 32, 64, 3)).astype(np.uint8)
    clip = open_clip(write_video(tmp_path / "a.mp4", moving(40) // 2 + noise, gop=gop))
    ordered = dict(clip.iterate())
    assert len(decoded) == 40
    decoded.clear()
    for index, frame in clip.iterate(39, None, -1):
        np.testing.assert_array_equal(frame, ordered[index])
        assert len(clip._held) <= 8
    assert len(decoded) <= most


def test_folders_of_images_go_by_number_and_pages_by_page(tmp_path: Path) -> None:
    from PIL import Image

    pages = [Image.fromarray(np.full((4, 5), 20 * i, np.uint8)) for i in range(12)]
    (tmp_path / "f").mkdir()
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for index, page in enumerate(pages):
        page.save(tmp_path / "f" / f"frame{index}.png")
    for path in ("f", "a.tif"):
        clip = open_clip(tmp_path / path, spacing=0.5)
        assert [float(f.mean()) for _, f in clip.iterate()] == [20.0 * i for i in range(12)]
        assert clip.info.pixel_area == 0.25
        assert open_clip(tmp_path / path, kind="volume", spacing=0.5, step=3.0).info.spacing == (3.0, 0.5, 0.5)
    deep = np.array([[0, 300], [40000, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(open_clip(tmp_path / "deep.png").frame(0)[0], deep)


def test_label_images_keep_the_numbers_of_their_palette(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(open_clip(tmp_path / "a.png", labels=True).frame(0), [[[0, 1], [2, 1]]])
    assert open_clip(tmp_path / "a.png").frame(0).shape == (3, 2, 2)


def test_real_volumes_open_with_what_their_files_say(real_data: Path) -> None:
    for path in sorted((real_data / "ct_lesions").glob("*.npz")):
        clip = open_clip(path)
        with np.load(path) as file:
            assert clip.info.spacing == tuple(file["spacing"][::-1])
            np.testing.assert_array_equal(clip.frame(len(clip) // 2)[0], file["imgs"][len(clip) // 2])


PEAK = """
import sys
from vfmadapt.frames import frame_file, open_clip, video
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # kB; ru_maxrss would count the parent's
frame_file._BLOCK = video._HELD = 1 << 20
for path in sys.argv[1:]:
    before = peak()
    with open_clip(path, **({"kind": "video", "time_first": True} if path.endswith("mha") else {})) as clip:
        for way in (clip.iterate(), clip.iterate(len(clip) - 1, None, -1)):
            for _, frame in way:
                pass
print(peak() - before)
"""


def write_mha(path: Path, volume: NDArray[Any]) -> Path:
    """Compressed, time first."""
    sitk.WriteImage(sitk.GetImageFromArray(np.moveaxis(volume, 0, -1)), str(path), True)
    return path


def write_npz(path: Path, **arrays: NDArray[Any]) -> Path:
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel must tell the peak of memory")
@pytest.mark.parametrize("kind", ["nifti", "npz", "npz_of_columns", "metaimage", "video"])
def test_memory_does_not_grow_with_the_clip(tmp_path: Path, kind: str) -> None:
    def make(frames: int) -> Path:
        zeros = np.zeros((frames, 256, 256), np.float32)  # 40 MB of 160
        makers: dict[str, Callable[[], Path]] = {
            "nifti": lambda: write_nifti(tmp_path / f"{frames}.nii.gz", zeros),
            "npz": lambda: write_npz(tmp_path / f"{frames}.npz", imgs=zeros),
            "npz_of_columns": lambda: write_npz(tmp_path / f"{frames}.npz", imgs=np.asfortranarray(zeros)),
            "metaimage": lambda: write_mha(tmp_path / f"{frames}.mha", zeros),
            "video": lambda: write_video(
                tmp_path / f"{frames}.mp4", np.zeros((frames, 256, 256, 3), np.uint8)
            ),  # 30 MB
        }
        return makers[kind]()

    command = [sys.executable, "-c", PEAK, str(make(40)), str(make(160))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 15_000  # kB
