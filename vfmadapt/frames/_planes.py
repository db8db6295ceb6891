"""DICOM headers: what each image plane says of its place in space and time, and the order that follows from it."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError

log = logging.getLogger(__name__)

_SAME = 1e-2  # mm: planes closer than this are at one place; also of direction cosines
_EVEN = 0.1  # of a step: slices further from the even grid than this are spaced unevenly
_CENTIMETRES = 3  # code of the unit in an ultrasound region

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Plane:
    """One image: its file and number in it; place and orientation in LPS+ mm and seconds, None where not told.

    `spacing`: rows, columns, in mm. `thickness`: from slice to slice where the header says it. `number`: the order
    that the header gives.
    """

    file: Path
    index: int
    size: tuple[int, int]
    number: int
    position: Vector | None
    orientation: Vector | None
    spacing: tuple[float, float] | None
    thickness: float | None
    seconds: float | None
    slope: float
    intercept: float


def planes(header: Any, file: Path) -> Iterator[Plane]:
    """The planes of one DICOM file, in the order in which it holds them."""
    shared = _first(header, "SharedFunctionalGroupsSequence")
    frames = int(header.get("NumberOfFrames") or 1)
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    step = _frame_seconds(header)
    for index in range(frames):
        groups = [g for g in ((own[index] if index < len(own) else None), shared) if g is not None]

        def find(name: str, sequence: str, groups: list[Any] = groups) -> Any:
            places = [_first(group, sequence) for group in groups]
            return next((p.get(name) for p in (*places, header) if p is not None and p.get(name) is not None), None)

        seconds = _seconds(header) if frames == 1 else None if step is None else index * step
        yield Plane(
            file=file,
            index=index,
            size=(int(header.Rows), int(header.Columns)),
            number=int(header.get("InstanceNumber") or 0) if frames == 1 else index,
            position=_vector(find("ImagePositionPatient", "PlanePositionSequence"), 3),
            orientation=_vector(find("ImageOrientationPatient", "PlaneOrientationSequence"), 6),
            spacing=_spacing(header, find("PixelSpacing", "PixelMeasuresSequence")),
            thickness=_number(
                find("SpacingBetweenSlices", "PixelMeasuresSequence") or find("SliceThickness", "PixelMeasuresSequence")
            ),
            seconds=seconds,
            slope=float(find("RescaleSlope", "PixelValueTransformationSequence") or 1),
            intercept=float(find("RescaleIntercept", "PixelValueTransformationSequence") or 0),
        )


@dataclass(frozen=True)
class Arrangement:
    """Planes in frame order; `slots`: their places on an even grid, where it has gaps. `step`: mm, None in time."""

    planes: tuple[Plane, ...]
    in_time: bool
    slots: tuple[int, ...] | None = None
    step: float | None = None

    @property
    def seconds_per_frame(self) -> float | None:
        """Median of the times between frames."""
        times = [p.seconds for p in self.planes if p.seconds is not None]
        if not self.in_time or len(times) < max(2, len(self.planes)):
            return None
        return float(np.median(np.diff(times))) or None

    @property
    def matrix(self) -> NDArray[np.float64] | None:
        """(column, row, frame, 1) -> LPS+ mm, (4, 4); None where the header does not say."""
        first, last = self.planes[0], self.planes[-1]
        if first.position is None or first.orientation is None or first.spacing is None or last.position is None:
            return None
        right, down = np.reshape(first.orientation, (2, 3))
        matrix = np.eye(4)
        matrix[:3, 0], matrix[:3, 1] = right * first.spacing[1], down * first.spacing[0]
        matrix[:3, 3] = first.position
        if self.in_time or len(self.planes) == 1:
            matrix[:3, 2] = np.cross(right, down) * (self.step or first.thickness or 1.0)
        else:
            steps = self.slots[-1] if self.slots else len(self.planes) - 1
            matrix[:3, 2] = (np.array(last.position) - np.array(first.position)) / steps
        return matrix


def arrange(found: Sequence[Plane], path: Path, *, at: int | None, time: int | None) -> Arrangement:
    """Planes of one series -> slices by position, or frames by time where all are at one place, or at none known.

    Args:
        found: the planes as the files come.
        path: for messages.
        at: of planes at several places and times, the place whose planes follow in time.
        time: of such planes, the moment whose slices are taken.

    Raises:
        UserError: no single order follows from the headers.
    """
    if any(p.position is None or p.orientation is None for p in found):
        if at is not None or time is not None:
            raise UserError(f"{path}: its files do not say where they lie; leave slice= and time= out")
        return Arrangement(tuple(sorted(found, key=lambda p: p.number)), in_time=True)
    stacks = _stacks(found, path)
    counts = {len(stack) for stack in stacks}
    if len(counts) > 1:
        raise UserError(
            f"{path}: {min(counts)} to {max(counts)} images lie at one place; wanted is one at each, or as many at "
            "each: one per moment"
        )
    moments = counts.pop()
    if at is not None or time is not None or (len(stacks) > 1 and moments > 1):
        return _chosen(stacks, path, at, time)
    return _slices([s[0] for s in stacks], found, path) if moments == 1 else Arrangement(tuple(stacks[0]), in_time=True)


def _chosen(stacks: list[list[Plane]], path: Path, at: int | None, time: int | None) -> Arrangement:
    moments = len(stacks[0])
    if (at is None) == (time is None):
        raise UserError(
            f"{path} has {len(stacks)} slices at {moments} moments; give slice=0..{len(stacks) - 1} to follow a slice "
            f"through time, or time=0..{moments - 1} for the volume of a moment; tools take reader={{slice: 0}}"
        )
    name, chosen, count = ("time", time, moments) if at is None else ("slice", at, len(stacks))
    if chosen is None or not 0 <= chosen < count:
        raise UserError(f"{path}: {name}={chosen} is not there; allowed are 0 to {count - 1}")
    if at is not None:
        return Arrangement(tuple(stacks[at]), in_time=True)
    slices = [stack[chosen] for stack in stacks]
    return _slices(slices, slices, path)


def _stacks(found: Sequence[Plane], path: Path) -> list[list[Plane]]:
    """Planes grouped by their place along the common normal, each group in the order of time."""
    orientations = np.array([p.orientation for p in found])
    if np.abs(orientations - orientations[0]).max() > _SAME:
        raise UserError(f"{path}: its images lie in different directions; put each view into a folder of its own")
    order = sorted(found, key=lambda p: (_height(p), p.seconds or 0.0, p.number))
    stacks = [[order[0]]]
    for plane in order[1:]:
        if _height(plane) - _height(stacks[-1][0]) > _SAME:
            stacks.append([plane])
        else:
            stacks[-1].append(plane)
    return [sorted(s, key=lambda p: (p.seconds or 0.0, p.number)) for s in stacks]


def _slices(order: list[Plane], found: Sequence[Plane], path: Path) -> Arrangement:
    if len(order) == 1:
        return Arrangement(tuple(order), in_time=False, step=order[0].thickness)
    listed = {id(plane): n for n, plane in enumerate(found)}
    if not (_monotone([listed[id(p)] for p in order]) and _monotone([p.number for p in order])):
        log.warning("%s: files and slices are in different orders; frames are placed by their position", path)
    heights = np.array([_height(p) for p in order])
    step = float(np.median(np.diff(heights)))
    places = (heights - heights[0]) / step
    slots = np.rint(places).astype(int)
    if np.abs(places - slots).max() > _EVEN or len(set(slots.tolist())) < len(slots):
        log.warning("%s: the slices are spaced unevenly, %.2f to %.2f mm", path, *_span(np.diff(heights)))
        return Arrangement(tuple(order), in_time=False, step=float(np.diff(heights).mean()))
    if slots[-1] == len(slots) - 1:
        return Arrangement(tuple(order), in_time=False, step=step)
    missing = sorted(set(range(slots[-1])) - set(slots.tolist()))
    log.warning(
        "%s: %d slices are missing, at %s mm along the normal; the others keep their places",
        path,
        len(missing),
        ", ".join(f"{heights[0] + m * step:g}" for m in missing[:8]),
    )
    return Arrangement(tuple(order), in_time=False, slots=tuple(slots.tolist()), step=step)


def _height(plane: Plane) -> float:
    """Millimetres along the plane's normal."""
    assert plane.position is not None
    assert plane.orientation is not None
    right, down = np.reshape(plane.orientation, (2, 3))
    return float(np.cross(right, down) @ np.array(plane.position))


def _monotone(numbers: Sequence[int]) -> bool:
    steps = np.diff(numbers)
    return bool((steps >= 0).all() or (steps <= 0).all())


def _span(values: NDArray[np.floating]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _first(item: Any, name: str) -> Any:
    sequence = item.get(name)
    return sequence[0] if sequence else None


def _vector(values: Any, length: int) -> Vector | None:
    return tuple(map(float, values)) if values is not None and len(values) == length else None


def _number(value: Any) -> float | None:
    return None if value in (None, "") else float(value)


def _spacing(header: Any, told: Any) -> tuple[float, float] | None:
    """Millimetres of rows and columns; of ultrasound from its first region that is measured in centimetres."""
    if told is None:
        told = header.get("ImagerPixelSpacing")
    if told is not None:
        return float(told[0]), float(told[1])
    for region in header.get("SequenceOfUltrasoundRegions") or []:
        if region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == _CENTIMETRES:
            return abs(float(region.PhysicalDeltaY)) * 10, abs(float(region.PhysicalDeltaX)) * 10
    return None


def _frame_seconds(header: Any) -> float | None:
    """Seconds between the frames of a file."""
    if milliseconds := _number(header.get("FrameTime")):
        return milliseconds / 1000
    if vector := header.get("FrameTimeVector"):
        return float(np.median(np.asarray(vector, dtype=float)[1:])) / 1000
    rate = _number(header.get("CineRate") or header.get("RecommendedDisplayFrameRate"))
    return 1 / rate if rate else None


def _seconds(header: Any) -> float | None:
    """When an image of its own was taken: within the beat, else by the clock."""
    if (trigger := _number(header.get("TriggerTime"))) is not None:
        return trigger / 1000
    if clock := header.get("AcquisitionTime"):
        text = str(clock)
        return int(text[:2]) * 3600 + int(text[2:4] or 0) * 60 + float(text[4:] or 0)
    return None
