"""Shared fixtures.

`python -m pytest` puts the checkout's root on sys.path, where datasets/ and kernels/ would hide the PyPI packages of
those names.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not torch.cuda.is_available():  # before anything imports Triton: its kernels are tested in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; so do the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real files; the test is skipped where it is not set."""
    where = os.environ.get("VFMADAPT_REAL_DATA")
    if not where:
        pytest.skip("set VFMADAPT_REAL_DATA to the folder of real files to run this test")
    return Path(where)


def _write_tiff(path: Path, values: np.ndarray, *, mask: np.ndarray | None = None, **profile: Any) -> Path:
    import rasterio  # most tests do without
    from rasterio.transform import from_origin

    after = {k: profile.pop(k) for k in ("gcps", "scales", "offsets", "descriptions", "colorinterp") if k in profile}
    if "gcps" not in after:
        profile = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_300_000, 10, 10)} | profile
    count, height, width = values.shape
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **profile) as dst:
        dst.write(values)
        for name, value in after.items():
            setattr(dst, name, value)
        if mask is not None:
            dst.write_mask(mask)
    return path


@pytest.fixture(scope="session")
def write_tiff() -> Callable[..., Path]:
    """`write_tiff(path, values (C, H, W), **profile)` writes a GeoTIFF, in UTM unless it is told otherwise.

    `gcps`, `scales`, `offsets`, `descriptions`, `colorinterp` and `mask` are set as rasterio names them.
    """
    return _write_tiff


@pytest.fixture
def dicom_series(tmp_path: Path) -> Path:
    """The folder of a CT series: slices of -1000, -900, ... HU, its files named and numbered against their order."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    (tmp_path / "series").mkdir()
    common = {k: generate_uid() for k in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    for i in range(5):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.Modality, ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = "CT", "1", "A^B", "", "O"
        ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.StudyID = ds.ReferringPhysicianName = ""
        ds.SeriesNumber, ds.InstanceNumber = 1, 5 - i
        for key, uid in common.items():
            setattr(ds, key, uid)
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2.5 * i], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [0.9, 0.7], 2.5
        ds.Rows, ds.Columns = 41, 33
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleIntercept, ds.RescaleSlope = -1000, 1
        ds.PixelData = np.full((41, 33), 100 * i, dtype=np.int16).tobytes()
        ds.save_as(tmp_path / "series" / f"{5 - i}.dcm", enforce_file_format=True)
    return tmp_path / "series"
