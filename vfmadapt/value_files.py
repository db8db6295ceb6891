"""Maps of values as files that other programs read: NPY, PNG of 16 bits, and depth as points in PLY."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.files import atomic_path

FORMATS = ("npy", "png", "ply")

_MOST = 65_535  # of 16 bits
_RGB = ("red", "green", "blue")


def write_npy(path: str | Path, values: NDArray[np.float32]) -> Path:
    """Write values as NPY, float32, NaN where unknown."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, values.astype(np.float32))
    return Path(path)


def write_png16(path: str | Path, values: NDArray[np.float32], *, scale: float) -> Path:
    """Write values (H, W) as one grey band of 16 bits: value x scale, rounded, at least 1; 0 where unknown.

    Raises:
        UserError: a value below 0, or one that does not fit; it says which scale does.
    """
    from PIL import Image

    known = np.isfinite(values)
    least, most = (float(f(values[known])) if known.any() else 0.0 for f in (np.min, np.max))
    if least < 0 or most * scale > _MOST:
        fits = f"png_scale={_MOST / most:.3g} or less" if least >= 0 else "npy or the GeoTIFF"
        raise UserError(
            f"{path}: values from {least:.4g} to {most:.4g} times png_scale={scale:g} do not fit into 16 bits without "
            f"sign; take {fits}"
        )
    numbers = np.where(known, np.maximum(np.rint(np.nan_to_num(values) * scale), 1), 0).astype(np.uint16)
    with atomic_path(path) as temporary:
        Image.fromarray(numbers).save(temporary, format="PNG")
    return Path(path)


def write_ply(path: str | Path, depth: NDArray[np.float32], colours: NDArray[np.uint8], *, focal: float) -> Path:
    """Write depth (H, W) as coloured points (binary PLY): x to the right, y down, z ahead, in the depth's unit.

    A pinhole camera of `focal` pixels that looks through the middle of the image; `colours` uint8 (H, W, 3). Pixels
    whose depth is unknown or not above 0 are left out.

    Raises:
        UserError: a focal length that is not above 0.
    """
    if not focal > 0:
        raise UserError(f"focal={focal}: a focal length in pixels is above 0")
    height, width = depth.shape
    with np.errstate(invalid="ignore"):
        known = np.isfinite(depth) & (depth > 0)
    row, column = np.nonzero(known)
    z = depth[known]
    points = np.empty(len(z), dtype=[*((axis, "<f4") for axis in "xyz"), *((band, "u1") for band in _RGB)])
    points["x"] = (column - (width - 1) / 2) * z / focal
    points["y"] = (row - (height - 1) / 2) * z / focal
    points["z"] = z
    for i, band in enumerate(_RGB):
        points[band] = colours[known][:, i]
    fields = [f"property {'float' if name in 'xyz' else 'uchar'} {name}" for name in points.dtype.names or ()]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(z)}", *fields, "end_header", ""]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write("\n".join(header).encode())
        file.write(points.tobytes())
    return Path(path)
