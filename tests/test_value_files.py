"""Maps of values as other programs' files."""

import numpy as np
import pytest
from PIL import Image

from vfmadapt.errors import UserError
from vfmadapt.raster.colours import coloured, span_of, with_bar
from vfmadapt.value_files import write_npy, write_ply, write_png16

VALUES = np.array([[1.5, np.nan, 0.0001], [2, 60, 3]], dtype=np.float32)


def test_sixteen_bits_keep_values_and_what_is_unknown(tmp_path) -> None:
    read = np.asarray(Image.open(write_png16(tmp_path / "a.png", VALUES, scale=1000)))
    assert read.dtype == np.uint16
    assert read.tolist() == [[1500, 0, 1], [2000, 60000, 3000]]  # 1, not 0: it is known


@pytest.mark.parametrize(
    ("values", "advice"), [(VALUES * 2, "png_scale=546 or less"), (VALUES - 5, "npy or the GeoTIFF")]
)
def test_values_that_do_not_fit_are_refused(tmp_path, values, advice) -> None:
    with pytest.raises(UserError, match=advice):
        write_png16(tmp_path / "a.png", values, scale=1000)
    assert not list(tmp_path.iterdir())


def test_npy_and_points_leave_out_what_is_unknown(tmp_path) -> None:
    assert np.array_equal(np.load(write_npy(tmp_path / "a.npy", VALUES)), VALUES, equal_nan=True)
    colours = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    path = write_ply(tmp_path / "a.ply", VALUES, colours, focal=10.0)
    header, _, body = path.read_bytes().partition(b"end_header\n")
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 5\n")
    points = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    assert np.allclose(points["xyz"][-1], [0.3, 0.15, 3])  # right of the middle, below it, ahead
    assert points["rgb"][-1].tolist() == [15, 16, 17]
    with pytest.raises(UserError, match="above 0"):
        write_ply(path, VALUES, colours, focal=0.0)


def test_colours_rise_with_values_and_the_bar_shows_them() -> None:
    known = np.isfinite(VALUES)
    shown = coloured(VALUES, known, (0, 3), void=(9, 9, 9))
    assert shown[0, 1].tolist() == [9, 9, 9]
    assert np.array_equal(shown[1, 1], shown[1, 2])  # 60 is cut at 3
    assert not np.array_equal(shown[1, 0], shown[0, 0])
    assert span_of(np.zeros(0)) == (0.0, 1.0)
    low, high = span_of(np.full(9, 7.0))
    assert low < high
    from vfmadapt.contracts import ValueSpec

    sheet = with_bar(Image.new("RGB", (200, 50)), (0, 3), ValueSpec("depth", "mm"))
    assert sheet.width == 200
    wanted = coloured(np.linspace(0, 3, 164)[None], np.ones((1, 164), dtype=bool), (0, 3), void=(0, 0, 0))[0]
    assert np.abs(np.asarray(sheet)[50 + 25, 18:-18].astype(int) - wanted).max() < 9  # 25 rows below the picture
