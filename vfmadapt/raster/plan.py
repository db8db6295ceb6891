"""The plan of a map: what is computed, how, and in which blocks. It is written as JSON beside the output.

Blocks are squares of the raster, anchored at its pixel (0, 0) whatever the window; so are the tiles. What a block
holds depends on the plan and the block's index only.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from vfmadapt.errors import UserError
from vfmadapt.raster.blocks import SIDE
from vfmadapt.raster.tiling import Area, TileGrid

LAYERS = ("class", "probabilities", "entropy", "disagreement")


@dataclass(frozen=True)
class Plan:
    """All that decides what the map's bytes are.

    `source` is the raster's path, `source_hash` and `model_hash` tell whether it or the model has changed; `height` and
    `width` are the raster's; `window` is the part that is mapped; `block` a multiple of `SIDE`; `mix` is
    what is made of the `bands` (see `vfmadapt.raster.reduction`), None where they are the model's; `classes` are (name,
    (red, green, blue)), or `values` are (name, unit) where the model gives those instead; where it gives `objects`,
    `classes` are theirs, or none; `layers` are of `LAYERS`; `compute` says device type, dtype, kernels and versions.
    """

    source: str
    source_hash: str
    model_hash: str
    height: int
    width: int
    window: Area
    tile: int
    overlap: int
    block: int
    batch: int
    bands: tuple[int, ...]
    mix: tuple[tuple[float, ...], ...] | None
    scale: float | None
    offset: float | None
    classes: tuple[tuple[str, tuple[int, int, int]], ...]
    values: tuple[tuple[str, str], ...]
    objects: bool
    layers: tuple[str, ...]
    compute: dict[str, str]

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"batch={self.batch} is no number of tiles; allowed: 1 and more")
        if self.block < SIDE or self.block % SIDE:
            raise UserError(f"block={self.block}: allowed are multiples of {SIDE}, the map's inner tiles")
        for key, allowed in (("tta", ("none", "d4")), ("dtype", ("float32", "bfloat16"))):
            if self.compute[key] not in allowed:
                raise UserError(f"{key}={self.compute[key]}: allowed are {', '.join(allowed)}")
        if unknown := [name for name in self.layers if name not in LAYERS]:
            raise UserError(f"layers: no such layer {unknown[0]!r}; allowed: {', '.join(LAYERS[1:])}")
        if self.values and self.layers:
            raise UserError(f"layers={list(self.layers)} are scores of classes, the model gives values; leave it out")
        if self.objects and (self.layers or self.compute["tta"] != "none" or not self.overlap):
            raise UserError(
                f"layers={list(self.layers)} tta={self.compute['tta']} overlap={self.overlap}: objects have no scores "
                "and no mean, and are put together where tiles overlap; leave all three out"
            )
        inside = self.window.cut(Area(0, 0, self.height, self.width))
        if min(inside.height, inside.width) < 1 or inside != self.window:
            given = [self.window.row, self.window.column, self.window.height, self.window.width]
            raise UserError(
                f"window={given} does not lie inside {self.source}, {self.height} rows x {self.width} columns; "
                "give [row,column,height,width]"
            )

    @property
    def grid(self) -> TileGrid:
        """The tiles."""
        return TileGrid(self.height, self.width, self.tile, self.overlap)

    @property
    def canvas(self) -> Area:
        """The window, grown to whole output tiles of the raster's grid; over the raster's edge if need be."""
        row, column = self.window.row // SIDE * SIDE, self.window.column // SIDE * SIDE
        bottom, right = -(-self.window.bottom // SIDE) * SIDE, -(-self.window.right // SIDE) * SIDE
        return Area(row, column, bottom - row, right - column)

    @property
    def inputs(self) -> int:
        """Bands that the model is given."""
        return len(self.bands if self.mix is None else self.mix)

    @property
    def blocks(self) -> "Blocks":
        """Indices of the blocks that the window touches, row by row."""
        return Blocks(self)

    def area(self, index: int) -> Area:
        """The part of the canvas that a block fills, in whole output tiles."""
        row, column = divmod(index, -(-self.width // self.block))
        return Area(row * self.block, column * self.block, self.block, self.block).cut(self.canvas)

    @property
    def files(self) -> dict[str, int]:
        """What is written, and its bands: "class", "value" or "object", the map, and "scores" where asked for."""
        if self.objects:
            return {"object": 1}
        if self.values:
            return {"value": len(self.values)}
        scores = len(self.classes) * ("probabilities" in self.layers) + sum(n in self.layers for n in LAYERS[2:])
        return {"class": 1} | ({"scores": scores} if scores else {})

    @property
    def outputs(self) -> int:
        """Channels that the model gives."""
        return 1 if self.objects else len(self.classes) + len(self.values)

    @property
    def key(self) -> str:
        """Hash of the plan; every block carries it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The manifest."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`; raises ValueError, KeyError or TypeError for other text."""
        values = json.loads(text)
        values["window"] = Area(**values["window"])
        values["classes"] = tuple((name, tuple(colour)) for name, colour in values["classes"])
        values["values"] = tuple(map(tuple, values["values"]))
        values["mix"] = None if values["mix"] is None else tuple(map(tuple, values["mix"]))
        return cls(**values | {name: tuple(values[name]) for name in ("bands", "layers")})

    def differences(self, other: "Plan") -> list[str]:
        """Names of what differs, as the user knows them."""
        names = {
            "source_hash": "input",
            "source": "input",
            "model_hash": "adapter",
            "height": "input",
            "width": "input",
            "mix": "bands",
        }
        found = [names.get(f.name, f.name) for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if "compute" in found:
            found.remove("compute")
            keys = {**self.compute, **other.compute}
            found += [key for key in keys if self.compute.get(key) != other.compute.get(key)]
        return list(dict.fromkeys(found))


class Blocks:
    """Indices of blocks, computed when asked for: a raster of a million pixels per side has tens of thousands."""

    def __init__(self, plan: Plan) -> None:
        window, block = plan.window, plan.block
        self._rows = range(window.row // block, -(-window.bottom // block))
        self._columns = range(window.column // block, -(-window.right // block))
        self._per_row = -(-plan.width // block)

    def __len__(self) -> int:
        return len(self._rows) * len(self._columns)

    def __iter__(self) -> Iterator[int]:
        return (row * self._per_row + column for row in self._rows for column in self._columns)

    def __contains__(self, index: Any) -> bool:
        row, column = divmod(index, self._per_row)
        return row in self._rows and column in self._columns
