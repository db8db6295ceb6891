"""DICOM segmentations as label maps of the images that they were drawn on."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import SegmentationStorage

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip, ClipInfo

_KINDS = (SegmentationStorage, "1.2.840.10008.5.1.4.1.1.66.7")  # the latter: Label Map Segmentation Storage


class SegmentationClip(Clip):
    """Segments by their numbers, in the frames of the DICOM clip whose images the segmentation (highdicom) refers to.

    Frames that it leaves out are empty.

    Args:
        path: the file.
        info: of that clip.

    Raises:
        UserError: another clip, segments that overlap, a file that cannot be read.
    """

    def __init__(self, path: Path, info: ClipInfo | None) -> None:
        from highdicom.seg import segread

        if info is None or not info.sources:
            belongs = "" if info is None else f", {info.path} is not"
            raise UserError(f"{path}: a DICOM segmentation belongs to DICOM images{belongs}; give its masks as NIfTI")
        try:
            self._made: Any = segread(path)
        except (ValueError, AttributeError, TypeError, OSError, InvalidDicomError) as error:
            raise UserError(f"{path} is not a readable DICOM segmentation ({_line(error)})") from error
        headers = (dcmread(file, stop_before_pixels=True, specific_tags=["SOPInstanceUID"]) for file in info.sources)
        self._images = [str(header.SOPInstanceUID) for header in headers]
        self._frames = info.source_frames
        known = {str(uid) for _, _, uid in self._made.get_source_image_uids()}
        if known.isdisjoint(self._images) or (self._frames is not None and len(self._images) > 1):
            raise UserError(f"{path} was drawn on other images than {info.path}; give the series that it refers to")
        self.info = ClipInfo(
            path=str(path),
            kind=info.kind,
            frames=info.frames,
            height=int(self._made.Rows),
            width=int(self._made.Columns),
            channels=1,
        )
        if self.info.size != info.size:
            raise UserError(f"{path} has masks of {self.info.size}, {info.path} frames of {info.size} pixels")

    def _read(self, index: int) -> NDArray[np.generic]:
        asked = {"combine_segments": True, "assert_missing_frames_are_empty": True}
        try:
            if self._frames is None:
                found = self._made.get_pixels_by_source_instance([self._images[index]], **asked)
            else:
                found = self._made.get_pixels_by_source_frame(self._images[0], [self._frames[index] + 1], **asked)
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.info.path}: its segments cannot be laid into one map of labels ({_line(error)}); give masks "
                "that do not overlap, as NIfTI for instance"
            ) from error
        return np.asarray(found)


def is_segmentation(path: Path) -> bool:
    """Whether a DICOM file holds a segmentation."""
    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID"])
    except (InvalidDicomError, OSError, EOFError, ValueError):
        return False
    return header.get("SOPClassUID") in _KINDS


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
