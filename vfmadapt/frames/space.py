"""Patient space: affines between voxels and millimetres."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vfmadapt.frames.clip import Affine


def as_affine(matrix: ArrayLike) -> Affine:
    """A 4 x 4 array as `ClipInfo.affine` holds it."""
    a, b, c, d = (tuple(float(v) for v in row) for row in np.asarray(matrix, dtype=np.float64))
    return (a, b, c, d)  # type: ignore[return-value]


def lps_to_ras(matrix: NDArray[np.floating]) -> Affine:
    """A voxel-to-millimetre matrix (4, 4) of DICOM and ITK, whose x and y run the other way, for NIfTI's axes."""
    return as_affine(np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix)
