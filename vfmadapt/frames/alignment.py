"""Masks in the frames of their clip, wherever both files say how they lie in the patient."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip, ClipInfo

log = logging.getLogger(__name__)

Matrix = NDArray[np.float64]

_OFF = 0.5  # of a voxel: up to there the nearest voxel of one grid is the same voxel of the other
_APART = 1.0  # mm: planes closer than that are one, since headers round; neighbouring slices lie further apart
_MOST = 255  # structures that a label map of 8 bits tells apart


@dataclass(frozen=True)
class _Turn:
    """Which axes of the masks, by (column, row, frame), the clip's own are, and which of these run backwards."""

    axes: tuple[int, int, int] = (0, 1, 2)
    back: tuple[bool, bool, bool] = (False, False, False)


def aligned(masks: Clip, info: ClipInfo) -> Clip:
    """Masks as they belong to the frames of a clip.

    Where both files say how they lie in the patient, masks of the same grid that are stored along other axes, as
    dcm2niix stores those of a DICOM series, are turned. Otherwise the sizes alone must agree. Of clips in time, and of
    a single mask, which may be for any frame, only the axes in the plane are compared. There may be masks for slices
    that are missing between those of the clip.

    Args:
        masks: one for each frame, or a single one.
        info: of the clip.

    Raises:
        UserError: masks of another number or size, or that lie elsewhere.
    """
    turn, theirs = _turn(masks.info, info), masks.info
    if turn is None:
        raise UserError(
            f"{theirs.path} does not lie on the voxels of {info.path}, in whatever order; resample the masks onto that "
            "grid, or, if only their header is wrong, give them the affine of the clip"
        )
    width, height, frames = ((theirs.width, theirs.height, theirs.frames)[axis] for axis in turn.axes)
    if (height, width) != info.size or frames not in (1, info.frames, _places(info)):
        raise UserError(
            f"{theirs.path}: {theirs.frames} masks of {theirs.height} x {theirs.width} pixels for {info.frames} frames "
            f"of {info.height} x {info.width}; give a mask for each frame"
        )
    slots = info.slots if frames not in (1, info.frames) else None
    if turn == _Turn() and slots is None:
        return masks
    if turn != _Turn():
        log.info("%s: turned, it is stored along other axes than %s", theirs.path, info.path)
    return _Turned(masks, turn, slots or range(frames), info)


def _places(info: ClipInfo) -> int:
    """Slices along the axis of a clip, with those that are missing."""
    return info.frames if info.slots is None else max(info.slots) + 1


def _turn(theirs: ClipInfo, ours: ClipInfo) -> _Turn | None:
    """What lays masks onto a clip, no turn at all where either file does not say; None where nothing does."""
    flat = "video" in (theirs.kind, ours.kind) or theirs.frames == 1
    our_matrix, their_matrix = _matrix(ours, flat=flat), _matrix(theirs, flat=flat)
    if our_matrix is None or their_matrix is None:
        return _Turn()
    inner = np.linalg.solve(their_matrix, our_matrix)  # our voxels -> theirs
    axes = np.rint(inner[:3, :3])
    if not np.array_equal(np.abs(axes) @ np.abs(axes).T, np.eye(3)):
        return None
    order = np.abs(axes).argmax(0)
    back = np.take_along_axis(axes, order[None], 0)[0] < 0
    turn = _Turn((int(order[0]), int(order[1]), int(order[2])), (bool(back[0]), bool(back[1]), bool(back[2])))
    if flat:  # the normal is turned round by any mirroring
        turn = replace(turn, back=(*turn.back[:2], False))
    if theirs.slots not in (None, ours.slots) or (theirs.slots and turn != _Turn()) or (flat and order[2] != 2):
        return None
    sizes = [np.array([i.width, i.height, 1 if flat else _places(i)]) for i in (ours, theirs)]
    if not np.array_equal(sizes[1][order], sizes[0]):
        return turn  # the sizes are what is wrong
    placed = not flat or (theirs.frames > 1 and all(i.dims == 4 or i.sources for i in (ours, theirs)))
    begin = np.where(axes.sum(1) < 0, sizes[1] - 1, 0)  # where our first voxel lies, if both have the same ones
    off = np.array([*product(*((0, n - 1) for n in sizes[0]))]) @ (inner[:3, :3] - axes).T
    off += inner[:3, 3] - begin if placed else 0
    return turn if (np.abs(off).max(0) < (_OFF, _OFF, _APART if flat else _OFF)).all() else None


def _matrix(info: ClipInfo, *, flat: bool) -> Matrix | None:
    """(column, row, frame, 1) -> mm, (4, 4), `flat` with the plane's normal of 1 mm as frame; None where unknown."""
    if info.affine is None or info.assumed:
        return None
    matrix = np.array(info.affine)
    if flat:
        normal = np.cross(matrix[:3, 0], matrix[:3, 1])
        matrix[:3, 2] = normal / max(float(np.linalg.norm(normal)), 1e-12)
    return matrix if np.linalg.det(matrix) else None


class _Turned(Clip):
    """Masks along the axes of the clip `info`; its frames lie at `places` along the last of them."""

    def __init__(self, masks: Clip, turn: _Turn, places: Sequence[int], info: ClipInfo) -> None:
        self._masks, self._turn, self._places = masks, turn, tuple(places)
        self._stored: NDArray[np.uint8] | None = None
        self.info = replace(info, path=masks.info.path, frames=len(places), channels=1, window=None)

    def close(self) -> None:
        """Close the masks."""
        self._masks.close()

    def _read(self, index: int) -> NDArray[np.generic]:
        (column, row, along), back = self._turn.axes, self._turn.back
        place = -1 - self._places[index] if back[2] else self._places[index]
        if along == 2:  # frame by frame
            plane = self._masks.frame(range(len(self._masks))[place])[0].T.transpose(column, row)
        else:
            plane = self._whole().transpose(column, row, along)[..., place]
        return plane[:: -1 if back[0] else 1, :: -1 if back[1] else 1].T[None]

    def _whole(self) -> NDArray[np.uint8]:
        """All masks (column, row, frame), on disk, as their frames run across the clip's."""
        if self._stored is None:
            shape = (len(self._masks), *self._masks.info.size)
            with TemporaryFile() as file:  # the mapping keeps it until the array is gone
                stored: NDArray[np.uint8] = np.memmap(file, np.uint8, "w+", shape=shape)
            for index in range(len(self._masks)):
                stored[index] = label_map(self._masks, index)
            self._stored = stored.transpose(2, 1, 0)
        return self._stored


def label_map(masks: Clip, index: int) -> NDArray[np.uint8]:
    """Labels (H, W) of frame `index`, 0 where there is nothing; raises UserError unless they are 0..255."""
    values = masks.frame(index)[0]
    with np.errstate(invalid="ignore"):  # what does not fit is told below
        labels = values.astype(np.uint8)
    if not np.array_equal(labels, values):
        odd = values[labels != values][0]
        raise UserError(f"{masks.info.path}: frame {index} holds {odd:g}; labels are whole numbers from 0 to {_MOST}")
    return labels
