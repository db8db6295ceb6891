"""Labels as users store them -> labels 0..K-1 and ignore; classes as users name them -> `ClassSpec`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import IGNORE_INDEX, ClassSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.io import open_raster, raster_info

logger = logging.getLogger(__name__)

COLOURS = ((34, 102, 51), (240, 240, 240), (66, 165, 245), (251, 140, 0), (142, 36, 170), (229, 57, 53), (255, 235, 59))
"""Colours of classes that come without one, in turn."""


def class_specs(classes: Sequence[str | Mapping[str, Any]] | None) -> tuple[ClassSpec, ...]:
    """Names, or mappings with `name` and perhaps `colour` and `line`, -> classes; UserError where they are none."""
    if not classes or isinstance(classes, str):
        raise UserError(
            f"data.classes={classes}: name them in the order of their labels, for instance data.classes=[other,water]"
        )
    made = []
    for i, entry in enumerate(classes):
        item = entry if isinstance(entry, Mapping) else {"name": entry}
        colour = tuple(item.get("colour") or COLOURS[i % len(COLOURS)])
        if set(item) - {"name", "colour", "line"} or "name" not in item:
            raise UserError(f"data.classes: {entry} is no class; write a name, or {{name: water, colour: [0, 0, 255]}}")
        if len(colour) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in colour):
            raise UserError(f"data.classes: {entry} has no colour of three whole numbers 0..255")
        if not isinstance(line := item.get("line", False), bool):
            raise UserError(f"data.classes: {entry}: line is true or false")
        made.append(ClassSpec(str(item["name"]), (colour[0], colour[1], colour[2]), line))
    if len({c.name for c in made}) < len(made) or not 2 <= len(made) <= IGNORE_INDEX:
        raise UserError(f"data.classes={[c.name for c in made]}: wanted are 2 to {IGNORE_INDEX} different names")
    return tuple(made)


class Labels:
    """Reads mask files; `label_map` and `ignore` as `GeotiffFolder` takes them."""

    """Values in mask files -> labels 0..K-1 and IGNORE_INDEX."""

    def __init__(self, classes: Sequence[ClassSpec], label_map: Mapping[Any, Any] | None, ignore: int | None) -> None:
        self._names = [c.name for c in classes]
        self._ignore = ignore
        self._mapped = label_map is not None
        self._table = {i: i for i in range(len(classes))} if label_map is None else self._parse(label_map)

    def _parse(self, label_map: Mapping[Any, Any]) -> dict[int, int]:
        try:
            return {int(k): self._label(v) for k, v in label_map.items()}
        except ValueError as error:
            raise UserError(
                f"data.label_map={dict(label_map)}: its keys are values in the masks, whole numbers"
            ) from error

    def _label(self, value: Any) -> int:
        if value is None:
            return IGNORE_INDEX
        label = self._names.index(value) if value in self._names else value
        if not isinstance(label, int) or not 0 <= label < len(self._names):
            raise UserError(
                f"data.label_map: no class {value!r}; allowed: {', '.join(self._names)}, their index, null (ignore)"
            )
        return label

    def read(self, path: Path) -> NDArray[np.int64]:
        """Labels (H, W) of a mask file."""
        with open_raster(path) as raster:
            raw, known = raster.read_labels()
        if raw.dtype.kind == "f":
            known &= np.isfinite(raw)
        strange = [v for v in np.unique(raw[known]).tolist() if v not in self._table and v != self._ignore]
        if strange:
            raise UserError(
                f"{path} holds the labels {strange[:8]}; allowed: {sorted(self._table)} and {self._ignore} (ignore); "
                "name more data.classes or map them with data.label_map"
            )
        labels = np.full(raw.shape, IGNORE_INDEX, dtype=np.int64)
        for value, label in self._table.items():
            labels[known & (raw == value)] = label
        return labels

    def check(self, path: Path, size: tuple[int, int]) -> set[int]:
        """Raise unless the mask fits an image of `size`; the labels that it holds, IGNORE_INDEX included."""
        info = raster_info(path)
        if (info.height, info.width) != size:
            raise UserError(
                f"{path} is {info.height} x {info.width} pixels, its image {size[0]} x {size[1]}; they must be equal"
            )
        if len(info.data_bands) != 1:
            raise UserError(
                f"{path} has {len(info.data_bands)} bands; a mask has one band of labels 0, 1, 2, ..., no colours"
            )
        if info.nodata[0] in self._table:
            logger.warning("%s: nodata is %g, which is also a label; those pixels are ignored", path, info.nodata[0])
        return set(np.unique(self.read(path)).tolist())

    def judge(self, found: set[int], root: Path) -> None:
        """Raise where the masks as a whole make no sense."""
        classes = found - {IGNORE_INDEX}
        if len(classes) < 2 and IGNORE_INDEX in found and not self._mapped:
            raise UserError(
                f"{root}: its masks hold the labels {sorted(classes)} and {self._ignore} (ignore) only; "
                f"if {self._ignore} is a class, write for instance 'data.label_map={{0: 0, {self._ignore}: 1}}'"
            )
        absent = [n for i, n in enumerate(self._names) if i not in classes]
        if absent:
            logger.warning("%s: no mask holds the class %s", root, ", ".join(absent))
