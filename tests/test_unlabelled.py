"""Windows of unlabelled files: every kind read in place, and bad files named, left out and counted."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vfmadapt.contracts import UnlabelledSource
from vfmadapt.datasets.pretrain_synthetic import PicturesSynthetic
from vfmadapt.datasets.unlabelled import Unlabelled
from vfmadapt.errors import UserError
from vfmadapt.tasks.unlabelled import WithoutLabels


def draw(seed=0):
    return np.random.default_rng(seed)


def ramp(height, width, bands=3):
    """uint8 (H, W, bands): the first band counts rows, the second columns."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)][:bands], -1).astype(np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        save(tmp_path / f"sub{i}" / f"{i}.png", ramp(40, 60))
    return tmp_path


def test_a_window_lies_in_place_and_is_of_its_generator(folder):
    source = Unlabelled(root=str(folder))
    assert isinstance(source, UnlabelledSource)
    source.prepare()
    assert len(source) == 3
    assert source.spec.bands == ("red", "green", "blue")
    assert source.spec.classes == ()
    corners = set()
    for seed in range(20):
        image, valid = source.window(1, 16, draw(seed))
        assert image.shape == (3, 16, 16)
        assert valid.all()
        top, left = (round(float(image[b, 0, 0]) * 255) for b in (0, 1))
        torch.testing.assert_close(
            image * 255, torch.from_numpy(ramp(40, 60)[top : top + 16, left : left + 16]).permute(2, 0, 1).float()
        )
        corners.add((top, left))
        assert torch.equal(image, source.window(1, 16, draw(seed))[0])
    assert len(corners) > 15
    assert source.window(0, 100, draw())[0].shape == (3, 40, 40)  # the shorter side


def test_ten_bands_of_a_geotiff_with_holes(tmp_path, write_tiff):
    values = np.random.default_rng(0).uniform(0.1, 1, (10, 80, 90)).astype(np.float32)
    values[:, :, :45] = -9999
    names = tuple(f"B{i}" for i in range(10))
    write_tiff(tmp_path / "a.tif", values, nodata=-9999, descriptions=names)
    source = Unlabelled(root=str(tmp_path))
    assert source.spec.bands == names
    assert 0.4 < source.spec.mean[3] < 0.7  # the void has no part in it
    shares = [source.window(0, 20, draw(s))[1].float().mean() for s in range(10)]
    assert min(shares) >= 0.5
    some = Unlabelled(root=str(tmp_path), bands=["B7", "B2"])
    image, valid = some.window(0, 20, draw())
    whole, _ = source.window(0, 20, draw())
    torch.testing.assert_close(image, whole[[7, 2]])
    assert valid.dtype == torch.bool


def test_volumes_videos_and_dicom_beside_images(tmp_path, dicom_series):
    nibabel = pytest.importorskip("nibabel")
    volume = np.arange(40 * 50 * 6, dtype=np.int16).reshape(40, 50, 6)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "ct.nii.gz")
    save(tmp_path / "scan.png", ramp(36, 44, 1)[..., 0])
    source = Unlabelled(root=str(tmp_path), window=[0, 12000])
    source.prepare()
    assert source.spec.bands == ("grey",)
    assert len(source) == 7  # five DICOM slices, each a file
    for index in range(7):
        image, valid = source.window(index, 24, draw(index))
        assert image.shape == (1, 24, 24)
        assert valid.all()
        assert 0 <= image.min() <= image.max() <= 1
    slices = {float(source.window(0, 24, draw(s))[0].max()) for s in range(12)}
    assert len(slices) > 3  # of the volume, several frames


def test_videos_in_colour(tmp_path):
    pytest.importorskip("av")
    frames = [Image.fromarray(np.roll(ramp(48, 64), 5 * i, 0)) for i in range(4)]
    import av

    with av.open(str(tmp_path / "clip.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_image(frame)))
        out.mux(stream.encode(None))
    colour, grey = (Unlabelled(root=str(tmp_path), bands=b) for b in (None, ["grey"]))
    assert colour.spec.bands == ("red", "green", "blue")
    image, _ = colour.window(0, 32, draw())
    assert image.shape == (3, 32, 32)
    torch.testing.assert_close(grey.window(0, 32, draw())[0], image.mean(0, keepdim=True))


def one_line(error):
    assert "\n" not in str(error.value)


def test_no_folder_and_an_empty_one_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder") as error:
        Unlabelled(root=str(tmp_path / "none")).prepare()
    one_line(error)
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(UserError, match="no image, volume or video in it") as error:
        Unlabelled(root=str(tmp_path)).prepare()
    one_line(error)


def test_a_corrupt_file_is_named_left_out_and_counted(folder, caplog):
    (folder / "broken.png").write_bytes(b"not a picture")
    source = Unlabelled(root=str(folder))
    with caplog.at_level(logging.WARNING):
        source.prepare()
    assert len(source) == 3
    assert [p.name for p in source.skipped] == ["broken.png"]
    assert any("broken.png" in m for m in caplog.messages)
    assert any("1 of 4 files are left out" in m for m in caplog.messages)


def test_a_file_cut_off_behind_its_header_gives_way_to_the_next(folder, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    whole = save(folder / "sub1" / "1.png", noise).read_bytes()
    (folder / "sub1" / "1.png").write_bytes(whole[: len(whole) // 2])
    source = Unlabelled(root=str(folder))
    source.prepare()
    with caplog.at_level(logging.WARNING):
        image, _ = source.window(1, 40, draw(3))
        again, _ = source.window(1, 40, draw(3))
    other, _ = Unlabelled(root=str(folder)).window(1, 40, draw(3))
    assert torch.equal(image, again)
    assert torch.equal(image, other)  # the same in another process
    assert sum("1.png" in m for m in caplog.messages) == 2  # once for each source
    assert [p.name for p in source.skipped] == ["1.png"]


def test_nothing_but_corrupt_files_is_one_line(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of its 2 files can be read") as error:
        Unlabelled(root=str(tmp_path)).prepare()
    one_line(error)


def test_bands_that_differ_are_one_line_that_says_what_to_do(folder):
    save(folder / "grey.png", ramp(40, 60, 1)[..., 0])
    with pytest.raises(UserError, match=r"has the bands .*name in data\.bands .*\[grey\]") as error:
        Unlabelled(root=str(folder)).prepare()
    one_line(error)
    source = Unlabelled(root=str(folder), bands=["grey"])
    source.prepare()
    assert [source.window(i, 16, draw())[0].shape for i in range(4)] == [(1, 16, 16)] * 4


def test_images_smaller_than_a_crop(folder, caplog):
    save(folder / "small.png", ramp(20, 90))
    source = Unlabelled(root=str(folder))
    with caplog.at_level(logging.WARNING):
        source.require(32)
    assert len(source) == 3
    assert any("small.png has 20 x 90 pixels, a crop 32" in m for m in caplog.messages)
    with pytest.raises(UserError, match="every image is smaller than a crop of 64 pixels, the largest has 40") as error:
        source.require(64)
    one_line(error)


def test_no_labels_to_train_on(folder):
    with pytest.raises(UserError, match=r"tools/pretrain\.py"):
        Unlabelled(root=str(folder)).split("train")


def test_a_labelled_data_set_without_its_labels(tmp_path):
    from vfmadapt.datasets.radar_synthetic import RadarSynthetic

    data = RadarSynthetic(tmp_path, train=2, val=0, test=0, size=64, workers=1)
    data.prepare()
    source = WithoutLabels(data, cache_mb=8)
    assert isinstance(source, UnlabelledSource)
    image, valid = source.window(1, 32, draw(5))
    rng = draw(5)
    top, left = int(rng.integers(33)), int(rng.integers(33))
    assert torch.equal(image, data.split("train")[1]["image"][:, top : top + 32, left : left + 32])
    assert valid.shape == (32, 32)
    with pytest.raises(UserError, match="64 x 64 pixels are smaller than a crop of 96"):
        source.require(96)


def test_pictures_of_the_pool(tmp_path):
    source = PicturesSynthetic(root=str(tmp_path), images=2, workers=1)
    source.prepare()
    assert isinstance(source, UnlabelledSource)
    image, valid = source.window(1, 64, draw())
    assert image.shape == (3, 64, 64)
    assert 0 <= image.min() < image.max() <= 1
    assert valid.all()
    with pytest.raises(UserError, match="a crop 300"):
        source.require(300)


def test_real_scenes(real_data: Path):
    source = Unlabelled(root=str(real_data / "satellite_png"))
    source.prepare()
    assert len(source) == 12
    assert all(torch.isfinite(source.window(i, 154, draw(i))[0]).all() for i in range(12))
    ten = Unlabelled(root=str(real_data / "hls"))
    assert len(ten.spec.bands) == 10
    assert ten.window(0, 64, draw())[0].shape == (10, 64, 64)
