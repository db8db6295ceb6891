"""What all bodies share: names of structures, vessels, bowel, and growths. Sizes in mm are those of adults."""

from typing import Any

import numpy as np

from vfmadapt.datasets._anatomy import Point, Solid, lobes

NAMES = (
    "background", "lesion", "nodule", "liver", "spleen", "left kidney", "right kidney", "aorta", "left ventricle",
    "myocardium", "right ventricle", "left atrium",
)  # fmt: skip
LABEL = {name: index for index, name in enumerate(NAMES)}

THROUGH = float("inf")
"""Radius along z of what every plane cuts."""


def branches(
    rng: np.random.Generator, centre: Point, spread: Point, count: int, breath: Point, label: int | None = 0
) -> list[Solid]:
    """Vessels and strands: small rods in all directions."""
    solids = []
    for _ in range(count):
        at = tuple(float(c + rng.uniform(-1, 1) * s) for c, s in zip(centre, spread, strict=True))
        radius, lean = float(np.exp(rng.uniform(np.log(1.2), np.log(6)))), rng.normal(0, 0.7, 2)
        long = radius * float(rng.uniform(1, 3))
        solids.append(
            Solid("blood" if rng.random() < 0.4 else "vein", (at[0], at[1], at[2]),
                  (long, radius, float(rng.uniform(8, 60))), angle=float(rng.uniform(0, np.pi)),
                  lean=(float(lean[0]), float(lean[1])), breath=breath, label=label, within="inside")
        )  # fmt: skip
    return solids


def bowel(rng: np.random.Generator, centre: Point, spread: Point, loops: int, breath: Point) -> list[Solid]:
    """Tubes that meander within `spread` mm of a centre: balls along random walks, all walls before all contents."""
    walls: list[Solid] = []
    contents: list[Solid] = []
    for _ in range(loops):
        at = np.array(centre) + rng.uniform(-1, 1, 3) * spread
        step, radius = rng.normal(0, 1, 3), rng.uniform(8, 19)
        content = "content" if rng.random() < 0.5 else "bowel"
        lumpy, wall = lobes(rng, 0.25), rng.uniform(1.5, 4)
        for _ in range(int(rng.integers(4, 10))):
            step = 0.75 * step + rng.normal(0, 0.6, 3)
            at = at + step / max(float(np.linalg.norm(step)), 1e-6) * radius * 0.8
            place: Point = (float(at[0]), float(at[1]), float(at[2]))
            size = radius * rng.uniform(0.8, 1.15)
            shared: dict[str, Any] = {"lobes": lumpy, "breath": breath, "within": "inside"}
            for kept, tissue, less in ((walls, "bowel", 0.0), (contents, content, wall)):
                kept.append(Solid(tissue, place, (size - less,) * 3, texture=1.5, edge=1.5, **shared))
            if rng.random() < 0.25:
                bubble = size * rng.uniform(0.2, 0.7)
                above = (place[0], place[1] - size * 0.3, place[2])  # gas rises to the front
                contents.append(Solid("gas", above, (bubble, bubble * 0.6, bubble), **shared))
    return [*walls, *contents]


def growth(
    rng: np.random.Generator, at: Point, size: float, label: int, *, within: str | None, breath: Point
) -> list[Solid]:
    """A lobed lump of about `size` mm radius: one to three balls that have grown together, with or without a core."""
    angle, offset, texture = float(rng.uniform(0, np.pi)), float(rng.normal(0, 1.0)), float(rng.uniform(0, 1.5))
    lean = (float(rng.normal(0, 0.35)), float(rng.normal(0, 0.35)))
    depth, edge = size * float(rng.uniform(0.6, 1.8)), float(np.exp(rng.uniform(np.log(0.8), np.log(5))))
    shared: dict[str, Any] = {
        "angle": angle,
        "lean": lean,
        "breath": breath,
        "label": label,
        "within": within,
        "edge": edge,
    }
    solids = []
    for part in range(int(rng.integers(1, 4))):
        move = rng.normal(0, 0.0 if part == 0 else 0.45, 3) * size
        scale = 1.0 if part == 0 else float(rng.uniform(0.5, 0.9))
        centre = (at[0] + float(move[0]), at[1] + float(move[1]), at[2] + float(move[2]) * depth / size)
        radii = (size * scale, size * scale * float(rng.uniform(0.55, 1)), depth * scale)
        solids.append(Solid("lesion", centre, radii, lobes=lobes(rng, 0.2), offset=offset, texture=texture, **shared))
    if rng.random() < 0.4:
        core = (size * rng.uniform(0.3, 0.65), size * rng.uniform(0.2, 0.5), depth * rng.uniform(0.3, 0.7))
        shared["edge"] = edge + 3
        solids.append(
            Solid("core", at, core, lobes=lobes(rng, 0.4), texture=3.0, offset=float(rng.normal(0, 4)), **shared)
        )
    return solids


def spine(rng: np.random.Generator, back: float) -> list[Solid]:
    """Vertebrae with their discs, canal, processes and muscles, in the stencil "body" whose back lies at y = `back`."""
    size, y = rng.uniform(17, 23), back * 0.62
    pairs = [
        Solid("muscle", (side * x, down, 0), (r, r * 0.8, THROUGH), angle=side * 0.4, texture=0.5, within="body")
        for x, down, r in ((size * 1.9, y + size * 1.7, 26.0), (size * 1.75, y + size * 0.1, rng.uniform(10, 20)))
        for side in (-1, 1)
    ]
    solids = [*pairs, Solid("bone", (0, y + size * 2.1, 0), (5, 17, THROUGH), edge=2, within="body")]
    for side in (-1, 1):
        solids.append(
            Solid("bone", (side * size, y + size * 1.1, 0), (17, 5, 9), angle=side * 0.35, edge=2, within="body")
        )
    solids.append(Solid("disc", (0, y, 0), (size, size * 0.85, THROUGH), lobes=((2, 0.04, 0.0, 0.0),)))
    height = rng.uniform(24, 32)
    shape = ((2, 0.04, 0.0, 0.0), (3, 0.03, 1.6, 0.0))
    for z in np.arange(-110, 111, height):
        at = (0.0, y, float(z))
        solids.append(Solid("bone", at, (size + 1.5, size * 0.9 + 1.5, height * 0.56), lobes=shape))
        solids.append(Solid("marrow", at, (size - 1, size * 0.9 - 1, height * 0.54), lobes=shape, texture=2.0))
    return [
        *solids,
        Solid("fluid", (0, y + size * 1.35, 0), (9, 7, THROUGH)),
        Solid("muscle", (0, y + size * 1.35, 0), (5, 5, THROUGH)),
    ]  # fmt: skip
