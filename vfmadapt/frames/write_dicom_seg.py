"""Label maps as DICOM segmentations that refer to the images that they were drawn on."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.files import atomic_path
from vfmadapt.frames.clip import ClipInfo
from vfmadapt.frames.frame_file import LabelFrames

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription


def write_dicom_seg(path: str | Path, labels: LabelFrames, names: Mapping[int, str], info: ClipInfo) -> Path:
    """Write labels (T, H, W) as a binary DICOM segmentation (highdicom) with a segment for each of `names`.

    Segments are numbered in the order of `names`, by label, as DICOM wants it: 1, 2, ... Their category and type are
    SNOMED's "Tissue", because no name says which tissue. Memory holds all frames: highdicom takes them at once.

    Raises:
        UserError: the clip is no volume read from DICOM (highdicom wants each frame at a place of its own), or its
            files lack tags that a segmentation refers to.
    """
    from pydicom import dcmread

    check_sources(path, info)
    images = [dcmread(file, stop_before_pixels=True) for file in info.sources]
    numbered = _numbered(labels, list(names))
    if info.source_frames is not None:
        stored = np.zeros((int(images[0].NumberOfFrames), *info.size), dtype=np.uint8)
        stored[list(info.source_frames)] = numbered
        numbered = stored
    try:
        made = _segmentation(images, numbered, list(names.values()))
    except (ValueError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: {info.path} cannot carry a segmentation ({reason}); write .nii.gz instead") from error
    with atomic_path(path) as temporary:
        made.save_as(temporary)
    return Path(path)


def check_sources(path: str | Path, info: ClipInfo) -> None:
    """Raise UserError unless the clip is a volume read from DICOM, whose slices a segmentation can refer to."""
    if not info.sources or info.kind == "video":
        raise UserError(
            f"{path}: a DICOM segmentation refers to the slices of a DICOM volume, and {info.path} is none; "
            "write .nii.gz instead"
        )


def _numbered(labels: LabelFrames, objects: Sequence[int]) -> NDArray[np.uint8]:
    numbers = np.zeros(256, dtype=np.uint8)
    numbers[objects] = range(1, len(objects) + 1)
    return np.stack([numbers[frame] for frame in labels])


def _segmentation(images: Sequence[Any], numbered: NDArray[np.uint8], names: Sequence[str]) -> Any:
    import highdicom
    from highdicom.seg import Segmentation, SegmentationTypeValues

    return Segmentation(
        source_images=images,
        pixel_array=numbered,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(number, name) for number, name in enumerate(names, start=1)],
        series_instance_uid=highdicom.UID(),
        series_number=100,  # beyond what a scanner counts to in a study
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="vfmadapt",
        manufacturer_model_name="vfmadapt",
        software_versions=version("vfmadapt"),
        device_serial_number="0",
        series_description="Tracked structures",
    )


def _segment(number: int, name: str) -> "SegmentDescription":
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes

    return SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type=SegmentAlgorithmTypeValues.SEMIAUTOMATIC,  # somebody placed the prompt
        algorithm_identification=AlgorithmIdentificationSequence(
            name="vfmadapt", version=version("vfmadapt"), family=codes.DCM.ArtificialIntelligence
        ),
    )
