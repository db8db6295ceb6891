"""Segmentation of medical frames: metrics of volumes, training, and labels that lie exactly on their source."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vfmadapt import predict, train
from vfmadapt.build import compose
from vfmadapt.errors import UserError
from vfmadapt.volume_metrics import VolumeMetrics

nibabel = pytest.importorskip("nibabel")
monai_metrics = pytest.importorskip("monai.metrics")

TINY = [
    "experiment=medseg", "data.train=2", "data.val=1", "data.test=2", "data.slices=2", "data.size=64", "data.workers=1",
    "loader.batch_size=2", "loader.crop=64", "loader.steps_per_epoch=2", "trainer.max_steps=2", "previews=1",
    "trainer.log_every_n_steps=1",
]  # fmt: skip


def counted(found: torch.Tensor, true: torch.Tensor, spacing: tuple[float | None, ...] | None) -> dict[str, Any]:
    """Metrics of volumes (V, T, H, W)."""
    metrics = VolumeMetrics(["background", "one", "two"])
    for index in range(len(found)):
        for p, t in zip(found[index], true[index], strict=True):
            metrics.update(p[None], t[None])
            metrics.add_frame(p, t, clip=str(index), spacing=spacing)
    return metrics.compute()


def test_dice_and_hd95_agree_with_monai_over_volumes() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(2, 6, 24, 20, dtype=torch.int64)
    true[:, 1:5, 4:12, 4:14], true[0, 2:4, 14:20, 6:15] = 1, 2
    noise = torch.rand(true.shape, generator=generator)
    found = torch.where(noise < 0.02, 1, true.roll(1, dims=3))
    spacing = (5.0, 1.5, 0.8)
    result = counted(found, true, spacing)
    for label, name in ((1, "one"), (2, "two")):
        p, t = (labels[:, None] == label for labels in (found, true))
        there = t.flatten(1).any(1)
        dice = monai_metrics.compute_dice(p.float(), t.float())[there]
        assert result["dice3d"][name] == pytest.approx(dice.mean().item(), abs=1e-6)
        hd95 = monai_metrics.compute_hausdorff_distance(
            p[there].float(), t[there].float(), percentile=95, spacing=spacing
        )
        assert result["hd95_mm"][name] == pytest.approx(hd95.mean().item(), rel=1e-5)
    assert result["mean_dice3d"] == pytest.approx(sum(result["dice3d"].values()) / 2)


def test_frames_in_time_are_measured_in_their_plane() -> None:
    true = torch.zeros(1, 3, 20, 20, dtype=torch.int64)
    true[..., 5:10, 5:10] = 1
    found = true.roll(4, dims=3)
    assert counted(found, true, (None, 2.0, 0.5))["hd95_mm"]["one"] == pytest.approx(2.0)
    assert counted(found, true, None)["hd95_mm"] == {"one": None, "two": None}


def test_ignored_pixels_and_absent_structures_do_not_count() -> None:
    true = torch.full((1, 1, 8, 8), 255)
    true[..., :4] = 0
    result = counted(torch.ones_like(true).where(true == 255, 0), true, (1.0, 1.0, 1.0))
    assert result["dice3d"] == {"one": None, "two": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("medseg")
    return train.main(compose("train", [*TINY, f"data_root={folder}", f"output={folder / 'run'}"]))


def test_training_measures_volumes(run: dict[str, Any]) -> None:
    assert 0 <= run["mean_dice3d"] <= 1
    assert set(run["dice3d"]) == set(run["hd95_mm"]) == set(run["iou"]) - {"background"}
    assert Path(run["previews"][0]).is_file()


def labelled(run: dict[str, Any], source: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    settings = [f"input={source}", f"adapter_file={run['adapter_file']}", f"output={folder / 'out.nii.gz'}"]
    return predict.main(compose("predict", [*settings, "device=cpu", *overrides]))


def test_labels_lie_on_their_nifti(run: dict[str, Any], tmp_path: Path) -> None:
    affine = np.array([[0, -0.9, 0, 12], [-0.7, 0, 0.1, -30], [0, 0, 4.0, 8], [0, 0, 0, 1]])
    scan = np.random.default_rng(0).normal(40, 200, (70, 45, 5)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(scan, affine), tmp_path / "scan.nii.gz")
    result = labelled(run, tmp_path / "scan.nii.gz", tmp_path, "scale=0.0025", "offset=0.4")
    out = nibabel.load(result["map"])
    assert out.shape == scan.shape
    np.testing.assert_allclose(out.affine, affine, atol=1e-5)
    values = np.asarray(out.dataobj)
    assert values.dtype == np.uint8
    shares = np.bincount(values.ravel(), minlength=8) / values.size
    np.testing.assert_allclose(list(result["shares"].values()), shares)
    voxel = abs(np.linalg.det(affine[:3, :3])) / 1000
    assert sum(result["millilitres"].values()) == pytest.approx((values > 0).sum() * voxel, rel=0.02)
    assert Path(result["preview"]).is_file()


def test_slices_are_labelled_as_they_are_alone(run: dict[str, Any], tmp_path: Path) -> None:
    scan = np.random.default_rng(0).integers(0, 255, (3, 40, 50)).astype(np.uint8)
    np.savez(tmp_path / "all.npz", imgs=scan, spacing=[1.0, 1.0, 3.0])
    np.savez(tmp_path / "one.npz", imgs=scan[1:2], spacing=[1.0, 1.0, 3.0])
    first = np.asarray(nibabel.load(labelled(run, tmp_path / "all.npz", tmp_path / "a")["map"]).dataobj)
    alone = np.asarray(nibabel.load(labelled(run, tmp_path / "one.npz", tmp_path / "b")["map"]).dataobj)
    assert first.shape == (50, 40, 3)
    np.testing.assert_array_equal(first[:, :, 1:2], alone)


def test_labels_of_a_dicom_series_keep_the_place_of_a_missing_slice(run: dict[str, Any], tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    (tmp_path / "s").mkdir()
    series = pydicom.uid.generate_uid()
    for index, z in enumerate((0.0, 3.0, 9.0, 12.0)):  # none at 6
        data = pydicom.Dataset()
        data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
        data.SeriesInstanceUID, data.InstanceNumber = series, index + 1
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 40, 48, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [-20, -30, z], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.WindowCenter, data.WindowWidth = [0.9, 0.7], 40, 400
        data.PixelData = np.random.default_rng(index).normal(40, 150, (40, 48)).astype(np.int16).tobytes()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.save_as(tmp_path / "s" / f"{index}.dcm", enforce_file_format=True)
    out = nibabel.load(labelled(run, tmp_path / "s", tmp_path)["map"])
    assert out.shape == (48, 40, 5)
    np.testing.assert_allclose(out.affine, [[-0.7, 0, 0, 20], [0, -0.9, 0, 30], [0, 0, 3, 0], [0, 0, 0, 1]], atol=1e-5)
    assert not np.asarray(out.dataobj)[:, :, 2].any()


def test_what_is_for_rasters_is_refused(run: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", imgs=np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(UserError, match="polygons= is for rasters"):
        labelled(run, tmp_path / "a.npz", tmp_path, "polygons=gpkg")
    with pytest.raises(UserError, match=r"written as \.nii"):
        labelled(run, tmp_path / "a.npz", tmp_path, f"output={tmp_path / 'a.tif'}")
