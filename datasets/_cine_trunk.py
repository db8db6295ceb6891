"""A trunk cut across its length: x runs to the patient's left, y to the back. Sizes in mm are those of adults."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vfmadapt.datasets._anatomy import Point, Solid, lobes
from vfmadapt.datasets._cine_parts import LABEL, THROUGH, bowel, branches, growth, spine


def trunk(rng: np.random.Generator) -> list[Solid]:
    """Abdomen, or a chest in two of five, 180 mm of it around z = 0, where a lesion is."""
    return _body(rng, chest=rng.random() < 0.4)


def abdomen(rng: np.random.Generator) -> list[Solid]:
    """Abdomen, 180 mm of it around z = 0: liver and spleen down to the kidneys, growths anywhere in it."""
    return _body(rng, chest=False, level=(5, 35), growths=(("nodule", 75), ("nodule", 75), ("lesion", 75)))


def _body(
    rng: np.random.Generator,
    *,
    chest: bool,
    level: tuple[float, float] = (-60, 10),
    growths: tuple[tuple[str, float], ...] = (("nodule", 30), ("lesion", 0)),
) -> list[Solid]:
    """`level`: of the gallbladder, as z; `growths`: names, and how far from z = 0 they lie at most."""
    wide, deep = rng.uniform(145, 195), rng.uniform(95, 130)
    fat, muscle = rng.uniform(8, 38), rng.uniform(9, 16)
    shape = lobes(rng, 0.05, orders=(2, 3), twist=0.004)
    inside = (wide - fat - muscle, deep - fat * 0.8 - muscle)
    solids = [
        Solid("skin", (0, 0, 0), (wide, deep, THROUGH), lobes=shape),
        Solid("fat", (0, 0, 0), (wide - 2, deep - 2, THROUGH), lobes=shape, texture=0.3, stencil="body"),
        Solid("muscle", (0, 0, 0), (wide - fat, deep - fat * 0.8, THROUGH), texture=0.5),
        Solid("fat", (0, 0, 0), (*inside, THROUGH), stencil="inside", texture=0.6),
    ]  # fmt: skip
    solids += _ribs(rng, (wide - fat - muscle / 2, deep - fat * 0.8 - muscle / 2))
    solids += _chest(rng, inside) if chest else _abdomen(rng, inside, level)
    solids += [*spine(rng, inside[1]), *_great_vessels(rng, inside[1])]
    return [*solids, *_growths(rng, inside, growths)]


def _ribs(rng: np.random.Generator, wall: tuple[float, float]) -> list[Solid]:
    """Cuts of ribs in the wall, which they cross aslant, so that they wander from plane to plane."""
    solids = []
    for z in np.arange(-90, 100, rng.uniform(22, 32)):
        for side in (-1, 1):
            for turn in rng.uniform(-0.9, 0.9, 2):
                x, y = side * wall[0] * np.cos(turn), wall[1] * np.sin(turn)
                along = float(np.arctan2(wall[1] * np.cos(turn), -side * wall[0] * np.sin(turn)))
                long, thick = rng.uniform(12, 22), rng.uniform(4, 6)
                lean = (float(rng.normal(0, 0.3)), float(rng.normal(0.8, 0.3)))
                at = (float(x), float(y), float(z + rng.normal(0, 3)))
                for tissue, less in (("bone", 0.0), ("marrow", 1.8)):
                    radii = (long - less, thick - less, 12 - less)
                    solids.append(Solid(tissue, at, radii, angle=along, lean=lean))
    return solids


def _great_vessels(rng: np.random.Generator, back: float) -> list[Solid]:
    y = back * 0.62 - 30
    lean = (float(rng.normal(0, 0.08)), float(rng.normal(0, 0.05)))
    radius = rng.uniform(9, 14)
    at = (rng.uniform(4, 12), y + rng.uniform(-2, 6), 0.0)
    vein = (-rng.uniform(16, 24), y + rng.uniform(-4, 8), 0.0)
    return [
        Solid("vein", vein, (rng.uniform(9, 14), rng.uniform(7, 11), THROUGH), lean=lean, within="inside"),
        Solid("blood", at, (radius, radius, THROUGH), lean=lean, label=LABEL["aorta"], within="inside"),
    ]  # fmt: skip


def _abdomen(rng: np.random.Generator, inside: tuple[float, float], level: tuple[float, float]) -> list[Solid]:
    wide, deep = inside
    breath = (0.0, 0.0, float(rng.uniform(8, 18)))  # organs slide through the planes
    kidney = deep * 0.35
    low = rng.uniform(*level)
    solids = bowel(rng, (0, -deep * 0.3, 10), (wide * 0.82, deep * 0.6, 80), int(rng.integers(20, 36)), (0, 0, 0))
    solids += [
        Solid("liver", (-wide * 0.52, -deep * 0.1, low - 60), (wide * 0.5, deep * 0.8, 90), angle=0.3,
              lobes=lobes(rng, 0.12), breath=breath, label=LABEL["liver"], within="inside", texture=0.4, edge=1.5),
        *branches(rng, (-wide * 0.5, -deep * 0.1, low - 60), (wide * 0.32, deep * 0.5, 70.0), 9, breath, label=None),
        Solid("fluid", (-wide * 0.36, -deep * 0.35, low), (14, 11, 26), lobes=lobes(rng, 0.08), breath=breath,
              within="inside"),
        Solid("stomach", (wide * 0.4, -deep * 0.35, low - 70), (46, 34, 60), angle=-0.5, lobes=lobes(rng, 0.15),
              breath=breath, within="inside", texture=2.0),
        Solid("spleen", (wide * 0.76, deep * 0.25, low - 60), (26, 44, 52), angle=0.3, lobes=lobes(rng, 0.1),
              breath=breath, label=LABEL["spleen"], within="inside", texture=0.4),
    ]  # fmt: skip
    for side, name in ((1, "left kidney"), (-1, "right kidney")):
        at = (side * wide * 0.5, kidney, low + rng.normal(0, 12) + 20)
        lean = (side * 0.12, 0.05)
        size = rng.uniform(24, 31)
        shape: dict[str, Any] = {"angle": side * 0.9, "lean": lean, "breath": breath, "within": "inside"}
        ruffled, label = lobes(rng, 0.07), LABEL[name]
        solids += [
            Solid("kidney", at, (size, size * 0.78, 56), lobes=ruffled, label=label, **shape),
            Solid("medulla", at, (size * 0.72, size * 0.5, 42), lobes=lobes(rng, 0.3), edge=6, label=label, **shape),
            Solid("fat", (at[0] - side * size * 0.5, at[1] - 2, at[2]), (size * 0.55, size * 0.22, 26),
                  lobes=lobes(rng, 0.2), **shape),
        ]  # fmt: skip
    return [*solids, *branches(rng, (0, -deep * 0.1, 0), (wide * 0.6, deep * 0.6, 80.0), 55, (0, 0, 0))]


def _chest(rng: np.random.Generator, inside: tuple[float, float]) -> list[Solid]:
    wide, deep = inside
    solids = []
    for side in (-1, 1):
        at = (side * wide * 0.54, 0.0, -20.0)
        radii = (wide * 0.44, deep * 0.9, 160.0)
        solids.append(Solid("lung", at, radii, lobes=lobes(rng, 0.08), within="inside", texture=2.0, edge=1.5))
        solids += branches(rng, at, (radii[0] * 0.7, radii[1] * 0.7, 90), 40, (0, 0, 0))
    heart: Point = (wide * 0.14, -deep * 0.25, 60.0)
    solids += [
        Solid("muscle", heart, (wide * 0.36, deep * 0.5, 62), lobes=lobes(rng, 0.1), within="inside"),
        Solid("blood", (heart[0] + 18, heart[1] + 4, heart[2]), (wide * 0.17, deep * 0.26, 44), lobes=lobes(rng, 0.1),
              within="inside"),
        Solid("blood", (heart[0] - 26, heart[1] - 8, heart[2]), (wide * 0.15, deep * 0.3, 44), lobes=lobes(rng, 0.15),
              within="inside"),
        Solid("blood", (-8, -deep * 0.12, -30), (rng.uniform(15, 19), 16, 45), lean=(0.1, 0.05), within="inside"),
        Solid("blood", (10, -deep * 0.02, -14), (rng.uniform(20, 40), 11, 14), angle=0.3, within="inside"),
        Solid("gas", (-4, deep * 0.2, -60), (9, 8, 50), within="inside"),
    ]  # fmt: skip
    return solids


def _growths(rng: np.random.Generator, inside: tuple[float, float], named: Sequence[tuple[str, float]]) -> list[Solid]:
    """Lesions and nodules, at most so many mm from z = 0, with or without a core, and lymph nodes without a label."""
    wide, deep = inside
    solids = []
    for _ in range(int(rng.integers(2, 12))):
        at = (rng.uniform(-0.6, 0.6) * wide, rng.uniform(-0.5, 0.4) * deep, rng.uniform(-90, 90))
        radius = float(rng.uniform(3, 9))
        solids.append(Solid("node", at, (radius, radius * rng.uniform(0.5, 1), radius * rng.uniform(1, 2)),
                            angle=float(rng.uniform(0, 3)), within="inside"))  # fmt: skip
    for name, far in named:
        size = float(np.exp(rng.uniform(np.log(5), np.log(32 if name == "lesion" else 14))))
        at = (
            rng.uniform(-0.65, 0.65) * wide,
            rng.uniform(-0.6, 0.35) * deep,
            rng.uniform(-far, far) if far else 0.0,
        )
        solids += growth(rng, at, size, LABEL[name], within="inside", breath=(0, 0, 0))
    return solids
