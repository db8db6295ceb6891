"""What a map says in the end: pixels, areas, speed."""

import json
import resource
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vfmadapt.raster.io import RasterInfo
from vfmadapt.raster.job import Work, file_of
from vfmadapt.raster.merge import Collected
from vfmadapt.raster.moments import Statistics
from vfmadapt.raster.plan import Plan
from vfmadapt.raster.write import NODATA


@dataclass(frozen=True)
class PredictResult:
    """A finished map.

    `size` is (height, width); `pixels` and `area_km2` go by class name, the latter is None unless the CRS is projected
    (it is the area on that projection); `values` are statistics by name where the model gives values instead, `objects`
    is the number of objects, and `pixels` are those in "object" and in "none", where it gives objects;
    `objects_per_class` leaves out classes without any; `void` counts pixels without data; `scores` is the file of
    probabilities, entropy and disagreement, `polygons` that of the regions, if asked for; `seconds` is the time that it
    took in all, `model_seconds` in the model.
    """

    path: Path
    size: tuple[int, int]
    pixels: dict[str, int]
    void: int
    area_km2: dict[str, float] | None
    seconds: float
    scores: Path | None = None
    model_seconds: float = 0.0
    values: dict[str, Statistics] = field(default_factory=dict)
    polygons: Path | None = None
    objects: int | None = None
    objects_per_class: dict[str, int] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each class among the pixels with data, 0..1."""
        total = max(sum(self.pixels.values()), 1)
        return {name: count / total for name, count in self.pixels.items()}


def map_result(output: Path, info: RasterInfo, plan: Plan, collected: Collected, seconds: float) -> PredictResult:
    """The finished map of a plan."""
    counts = collected.counts
    names = ["none", "object"] if plan.objects else [name for name, _ in plan.classes]
    pixels = {name: int(counts[i]) for i, name in enumerate(names)}
    area, one = None, info.pixel_m2
    if one is not None and pixels:
        area = {name: count * one / 1e6 for name, count in pixels.items()}
    scores = file_of(output, "scores") if "scores" in plan.files else None
    size = (plan.window.height, plan.window.width)
    named = zip(plan.values, collected.statistics, strict=True)
    values = {name: found for (name, _), found in named} if collected.known else {}
    objects = None if collected.numbering is None else collected.numbering.count
    return PredictResult(
        output,
        size,
        pixels,
        int(counts[NODATA]),
        area,
        seconds,
        scores,
        values=values,
        objects=objects,
        objects_per_class=_per_class(plan, collected),
    )


def _per_class(plan: Plan, collected: Collected) -> dict[str, int]:
    if collected.object_classes is None:
        return {}
    labels, counts = np.unique(collected.object_classes, return_counts=True)
    return {plan.classes[label][0]: int(count) for label, count in zip(labels, counts, strict=True)}


def statistics_tags(result: PredictResult) -> dict[str, str]:
    """What the map's own tags say of its classes or objects."""
    if result.objects is not None:
        tags = {"OBJECTS": str(result.objects)}
        return tags | ({"CLASS_OBJECTS": json.dumps(result.objects_per_class)} if result.objects_per_class else {})
    if result.values:
        return {}
    tags = {
        "CLASS_PIXELS": json.dumps(result.pixels),
        "CLASS_SHARES": json.dumps({name: round(share, 6) for name, share in result.shares.items()}),
    }
    if result.area_km2 is not None:
        tags["CLASS_AREA_KM2"] = json.dumps({name: round(area, 6) for name, area in result.area_km2.items()})
    return tags


def summary(result: PredictResult, plan: Plan, work: Work, collected: Collected, info: RasterInfo) -> str:
    """The last line: size, speed, memory, share of the time in the model, tiles forwarded over tiles planned."""
    seconds, one = max(result.seconds, 1e-9), info.pixel_m2
    rate = work.pixels / seconds
    area = "" if one is None else f", {rate * one / 1e6:.3g} km²/s"
    window = plan.window
    tiles = len(plan.grid.rows_over(window.row, window.bottom)) * len(
        plan.grid.columns_over(window.column, window.right)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # Linux gives KiB
    return (
        f"{window.height} x {window.width} pixels in {seconds:.1f} s: {rate / 1e6:.2f} Mpx/s{area}, peak memory "
        f"{peak:.2f} GB, {work.model_seconds / seconds:.0%} of the time in the model, tiles forwarded / planned "
        f"{collected.forwarded / tiles:.2f}"
    )
