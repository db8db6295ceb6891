"""A block of an aerial scene's plan, and what is put on it."""

from dataclasses import dataclass

import numpy as np

from vfmadapt.datasets._aerial_canvas import Canvas, Colour, Points, floats
from vfmadapt.datasets._aerial_plan import Block, Plan
from vfmadapt.datasets._aerial_regions import Region, material
from vfmadapt.datasets._aerial_solids import Building, Tree
from vfmadapt.datasets._aerial_streets import make_tree, rows_of

Solids = list[Building | Tree]


@dataclass(frozen=True)
class Site:
    """A block of the plan on the canvas."""

    canvas: Canvas
    plan: Plan
    region: Region
    block: Block

    def place(self, u: float, v: float) -> Points:
        """Where a point of the plan comes to lie."""
        return self.plan.place(floats([u, v]))

    def ground(self, block: Block) -> list[Points]:
        """Outline of a part of the plan, as it comes to lie."""
        return [self.plan.place(block.outline())]

    def of(self, kind: str, spread: float = 0.1) -> Colour:
        """One of the region's materials of a kind."""
        return material(self.canvas.rng, getattr(self.region, kind), spread)

    def points(self, apart: float, block: Block | None = None) -> list[Points]:
        """Points of the plan spread over the block, about so far apart."""
        rng, block = self.canvas.rng, block or self.block
        if min(block.width, block.height) <= 0:
            return []
        found = [
            floats([u, v]) + rng.uniform(-0.4, 0.4, 2).astype(np.float32) * np.float32(apart)
            for u in (block.left + block.right) / 2 + floats(rows_of(block.width, apart))
            for v in (block.top + block.bottom) / 2 + floats(rows_of(block.height, apart))
        ]
        return found

    def trees(self, apart: float, share: float, radius: tuple[float, float], block: Block | None = None) -> Solids:
        """Single trees spread over the block."""
        rng, kind = self.canvas.rng, self.of("trees")
        chosen = [p for p in self.points(apart, block) if rng.random() < share]
        return [make_tree(rng, self.plan.place(p), rng.uniform(*radius), kind) for p in chosen]

    def building(
        self, u: float, v: float, size: tuple[float, float], along: float, height: float, roof: str
    ) -> Building:
        """A building at a point of the plan, its ridge along u (0) or v (π / 2)."""
        kinds = {"flat": "flat_roofs", "ribbed": "halls"}
        rng = self.canvas.rng
        return Building(
            centre=self.place(u, v),
            length=size[0],
            width=size[1],
            angle=self.plan.heading(floats([u, v]), along),
            height=height,
            roof=roof,
            pitch=float(np.deg2rad(rng.uniform(18, 45))),
            colour=self.of(kinds.get(roof, "roofs"), 0.14),
            wall=self.of("walls"),
        )
