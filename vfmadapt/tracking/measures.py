"""What tracked masks say in numbers: a table per frame, and the heart's ejection fraction."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vfmadapt.errors import UserError
from vfmadapt.files import atomic_path
from vfmadapt.frames import ClipInfo
from vfmadapt.tracking.tracked import Tracked
from vfmadapt.tracking_metrics import Mask, centroid

_DISCS = 20  # of Simpson's rule in echocardiography (Lang et al. 2015)
COLUMNS = (
    "frame", "time_s", "structure", "label", "present", "score", "area_px", "area_mm2", "centroid_x", "centroid_y",
    "shift_x_mm", "shift_y_mm", "displacement_mm",
)  # fmt: skip


def write_table(path: str | Path, tracked: Tracked) -> Path:
    """Write a CSV with a line for each frame and structure, `COLUMNS` in the first.

    Areas in pixels and mm²; the centre of mass in pixels, x to the right and y down; its shift since the frame that
    was prompted, in mm along x and y and as a length. A cell is empty where the value is unknown: without spacing, in
    frames without the structure, and the time in a volume.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_rows(tracked))
    return Path(path)


def _rows(tracked: Tracked) -> Iterator[dict[str, Any]]:
    starts = [_centre(tracked.mask(prompt, k)) for k, prompt in enumerate(tracked.prompts)]
    seconds = tracked.info.seconds_per_frame
    for frame in range(tracked.info.frames):
        for k, name in enumerate(tracked.names):
            yield {
                "frame": frame,
                "time_s": None if seconds is None else f"{frame * seconds:.4f}",
                "structure": name,
                "label": tracked.objects[k],
                "present": int(tracked.present[frame, k]),
                "score": f"{tracked.scores[frame, k]:.4f}",
                **_measured(tracked.mask(frame, k), starts[k], tracked.info),
            }


def _measured(mask: Mask, start: tuple[float, float] | None, info: ClipInfo) -> dict[str, Any]:
    pixels = int(mask.sum())
    row: dict[str, Any] = {"area_px": pixels}
    if info.pixel_area is not None:
        row["area_mm2"] = f"{pixels * info.pixel_area:.3f}"
    at = _centre(mask)
    if at is None:
        return row
    row |= {"centroid_y": f"{at[0]:.3f}", "centroid_x": f"{at[1]:.3f}"}
    _, tall, wide = info.spacing
    if start is not None and tall is not None and wide is not None:
        down, right = (at[0] - start[0]) * tall, (at[1] - start[1]) * wide
        row |= {"shift_x_mm": f"{right:.3f}", "shift_y_mm": f"{down:.3f}"}
        row["displacement_mm"] = f"{math.hypot(down, right):.3f}"
    return row


def _centre(mask: Mask) -> tuple[float, float] | None:
    return centroid(mask) if mask.any() else None


@dataclass(frozen=True)
class EjectionFraction:
    """The share of its blood that the left ventricle ejects, and the frames of its greatest and least volume.

    Volumes in ml, None where the spacing is unknown: the fraction does without it.
    """

    fraction: float
    end_diastole: int
    end_systole: int
    end_diastolic_ml: float | None
    end_systolic_ml: float | None


def ejection_fraction(tracked: Tracked, name: str) -> EjectionFraction:
    """Ejection fraction from the masks of the left ventricle in one long-axis view, over all frames.

    (EDV - ESV) / EDV, with the greatest and the least volume by Simpson's rule in a single plane (`disc_volume`).
    Without spacing, pixels are taken as square. Frames without the structure do not count.

    Raises:
        UserError: no structure of that name, a clip that is no video, or fewer than two frames with the structure.
    """
    check_ventricle(name, tracked.names, tracked.info)
    k = tracked.names.index(name)
    _, row, column = tracked.info.spacing
    spacing = (1.0, 1.0) if row is None or column is None else (row, column)
    masks = ((i, tracked.mask(i, k)) for i in range(tracked.info.frames))
    volumes = {i: disc_volume(mask, spacing) for i, mask in masks if mask.any()}
    if len(volumes) < 2:
        raise UserError(f"ejection_fraction={name}: it was found in {len(volumes)} frames; two are needed at least")
    full, empty = max(volumes, key=volumes.__getitem__), min(volumes, key=volumes.__getitem__)
    ml = None if tracked.info.pixel_area is None else 1e-3
    return EjectionFraction(
        fraction=1 - volumes[empty] / volumes[full],
        end_diastole=full,
        end_systole=empty,
        end_diastolic_ml=ml and volumes[full] * ml,
        end_systolic_ml=ml and volumes[empty] * ml,
    )


def check_ventricle(name: str, names: Sequence[str], info: ClipInfo) -> None:
    """Raise UserError unless the structure is among `names` and the clip runs in time."""
    if name not in names:
        raise UserError(f"ejection_fraction={name}: no such structure; prompted are: {', '.join(names)}")
    if info.kind != "video":
        hint = "" if info.sources else "; if its frames follow one another in time, write reader={kind: video}"
        raise UserError(f"ejection_fraction={name}: {info.path} is a volume; the beat needs a video{hint}")


def disc_volume(mask: Mask, spacing: Sequence[float]) -> float:
    """Volume of a mask (H, W) turned about its long axis: Simpson's rule, V = Σ π/4 dᵢ² L/20.

    The long axis (of length L) is the mask's principal axis, and dᵢ the mean width of the mask in the i-th of 20 equal
    parts of it (Lang et al. 2015, "Recommendations for Cardiac Chamber Quantification", there of two planes).
    """
    points = np.argwhere(mask) * np.asarray(spacing, dtype=np.float64)
    centred = points - points.mean(0)
    axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    along = centred @ axis
    half = float(np.abs(axis) @ spacing) / 2  # the pixels' own extent
    counts, edges = np.histogram(along, _DISCS, (along.min() - half, along.max() + half))
    thickness = float(edges[1] - edges[0])
    widths = counts * math.prod(spacing) / thickness
    return float(np.pi / 4 * (widths**2).sum() * thickness)
