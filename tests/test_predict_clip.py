"""The tool `predict` on volumes and videos: which part of a file is read, and what the output keeps of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vfmadapt
from vfmadapt.build import build_model, compose
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.predict import main

nibabel = pytest.importorskip("nibabel")
TINY = {
    "backbone": {
        "_target_": "vfmadapt.backbones.timm_models.timm_backbone",
        "name": "vit_tiny_patch16_224",
        "pretrained": False,
        "settings": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    },
    "adapter": {"_target_": "vfmadapt.adapters.frozen.Frozen"},
    "head": {"_target_": "vfmadapt.heads.linear.LinearHead"},
}
SCAN = np.random.default_rng(0).integers(0, 255, (32, 48, 5, 3)).astype(np.uint8)  # (column, row, slice, time)


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    classes = ClassSpec("background", (0, 0, 0)), ClassSpec("organ", (200, 90, 90))
    model = build_model(TINY, DataSpec("made", ("grey",), classes, (0.5,), (0.3,)))
    return vfmadapt.save(tmp_path_factory.mktemp("adapter") / "a.safetensors", model)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    image = nibabel.Nifti1Image(SCAN, np.diag([0.7, 0.9, 3.0, 1.0]))
    image.header.set_zooms((0.7, 0.9, 3.0, 0.04))
    nibabel.save(image, tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def predict(path: Path, adapter_file: Path, *overrides: str) -> tuple[dict[str, Any], Any]:
    given = [f"input={path}", f"adapter_file={adapter_file}", f"output={path.parent / 'out.nii.gz'}"]
    result = main(compose("predict", [*given, "preview=false", "tile=64", "device=cpu", *overrides]))
    return result, nibabel.load(result["map"])


def test_a_slice_or_a_moment_is_chosen(scan: Path, adapter_file: Path) -> None:
    with pytest.raises(UserError, match=r"5 slices at 3 moments; .* tools take reader=\{slice: 0\}"):
        predict(scan, adapter_file)
    followed, image = predict(scan, adapter_file, "reader={slice: 2}")
    assert (followed["frames"], image.shape) == (3, (32, 48, 1, 3))
    moment, image = predict(scan, adapter_file, "reader={time: 1}")
    assert (moment["frames"], image.shape) == (5, (32, 48, 5))
    assert image.header.get_zooms() == pytest.approx((0.7, 0.9, 3.0))
    assert sum(moment["shares"].values()) == pytest.approx(1)
    alone = scan.with_name("alone.nii.gz")
    nibabel.save(nibabel.Nifti1Image(SCAN[..., 1], np.diag([0.7, 0.9, 3.0, 1.0])), alone)
    wanted = np.asarray(image.dataobj)
    np.testing.assert_array_equal(np.asarray(predict(alone, adapter_file)[1].dataobj), wanted)


def test_a_series_is_chosen(dicom_series: Path, adapter_file: Path) -> None:
    from pydicom import dcmread
    from pydicom.uid import generate_uid

    other = generate_uid()
    for file in sorted(dicom_series.iterdir())[:2]:
        slice_ = dcmread(file)
        slice_.SeriesInstanceUID, slice_.SeriesNumber = other, 7
        slice_.save_as(file.with_name(f"other{file.name}"))
    with pytest.raises(UserError, match=r"choose one with series=; tools take reader=\{series: 1\}"):
        predict(dicom_series, adapter_file)
    assert predict(dicom_series, adapter_file, "reader={series: 7}")[0]["frames"] == 2


def test_a_folder_of_images_as_a_volume(tmp_path: Path, adapter_file: Path) -> None:
    from PIL import Image

    (tmp_path / "slices").mkdir()
    for index in range(3):
        Image.fromarray(SCAN[:, :, index, 0].T).save(tmp_path / "slices" / f"{index}.png")
    result, image = predict(tmp_path / "slices", adapter_file, "reader={kind: volume, spacing: 0.5, step: 4}")
    assert image.header.get_zooms() == (0.5, 0.5, 4.0)
    assert sum(result["millilitres"].values()) <= 3 * 32 * 48 * 0.5**2 * 4 / 1000


def test_what_a_reader_does_not_take(scan: Path, adapter_file: Path) -> None:
    with pytest.raises(UserError, match="no option 'slices'; for files of this kind there are: kind, slice, time"):
        predict(scan, adapter_file, "reader={slices: 1}")
    with pytest.raises(UserError, match="reader=3: wanted is null or a mapping"):
        predict(scan, adapter_file, "reader=3")


def test_a_model_of_colour_sees_the_colours_of_a_video(tmp_path: Path) -> None:
    torch.manual_seed(1)
    classes = ClassSpec("background", (0, 0, 0)), ClassSpec("polyp", (200, 90, 90))
    model = build_model(TINY, DataSpec("made", ("red", "green", "blue"), classes, (0.5,) * 3, (0.3,) * 3)).eval()
    adapter_file = vfmadapt.save(tmp_path / "a.safetensors", model)
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3)).astype(np.uint8)
    np.savez(tmp_path / "scope.npz", imgs=frames)
    _, image = predict(tmp_path / "scope.npz", adapter_file, "scale=0.00392156862745098", "reader={kind: video}")
    found = np.asarray(image.dataobj).reshape(48, 32, 3).T
    with torch.no_grad():
        shown = torch.from_numpy(frames).movedim(-1, 1) / 255
        wanted = model(shown, torch.ones(3, 32, 48, dtype=torch.bool)).argmax(1).numpy()
    assert 0 < wanted.mean() < 1
    np.testing.assert_array_equal(found, wanted)
