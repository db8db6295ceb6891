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
