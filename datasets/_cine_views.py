"""Bodies in motion: a trunk cut along its length, a heart cut across, and a heart seen from its apex by ultrasound."""

from dataclasses import replace
from typing import Any

import numpy as np

from vfmadapt.datasets._anatomy import Point, Solid, lobes
from vfmadapt.datasets._cine_parts import LABEL, THROUGH, bowel, branches, growth, spine


def lengthwise(rng: np.random.Generator) -> list[Solid]:
    """Trunk cut along its length, y to the feet: lungs over a dome of liver and spleen that breath moves by 8-25 mm."""
    wide, travel = rng.uniform(130, 180), rng.uniform(8, 25)
    dome, fat = rng.uniform(-35, 15), rng.uniform(8, 25)
    down: Point = (float(rng.normal(0, 2)), travel, float(rng.normal(0, 6)))
    half: Point = (down[0] / 2, down[1] / 2, down[2] / 2)
    shape = ((2, 0.04, float(rng.uniform(0, 6)), 0.0),)
    liver: Point = (-wide * 0.4, dome + 62, 0.0)
    return [
        Solid("fat", (0, 0, 0), (wide, 330, THROUGH), lobes=shape, texture=0.4),
        Solid("muscle", (0, 0, 0), (wide - fat, 325, THROUGH), lobes=shape, texture=0.6),
        Solid("fat", (0, 0, 0), (wide - fat - 12, 320, THROUGH), stencil="inside", texture=0.6),
        *_long_chest(rng, wide, dome, fat, half),
        *bowel(rng, (0, dome + 150, 0), (wide * 0.75, 90, 15), 24, half),
        *_long_belly(rng, wide, dome, liver, down),
        Solid("blood", (rng.uniform(6, 14), 60, 0), (rng.uniform(8, 12), 260, 30), label=LABEL["aorta"],
              within="inside"),
        *_long_growths(rng, [(liver, down), ((wide * 0.4, dome - 90, 0.0), half)], (wide * 0.25, 40, 5)),
    ]  # fmt: skip


def _long_chest(rng: np.random.Generator, wide: float, dome: float, fat: float, breath: Point) -> list[Solid]:
    """Ribs, lungs with their vessels, and the heart."""
    solids = []
    for row in np.arange(-170, 60, rng.uniform(24, 32)):
        for side in (-1, 1):
            at = (side * (wide - fat - 7), float(row), 0.0)
            solids.append(Solid("bone", at, (6, 9, THROUGH), breath=(side * 2.0, -2.0, 0)))  # breath lifts them
    for side in (-1, 1):
        at = (side * wide * 0.42, dome - 130, 0.0)
        solids.append(Solid("lung", at, (wide * 0.42, 150, THROUGH), lobes=lobes(rng, 0.05),
                            breath=(0, breath[1] * 0.8, 0), within="inside", texture=0.5))  # fmt: skip
        solids += branches(rng, at, (wide * 0.28, 90, 30), 30, breath)
    return [
        *solids,
        Solid("heart", (wide * 0.16, dome - 22, 0), (wide * 0.36, 48, 70), lobes=lobes(rng, 0.1), breath=breath,
              squeeze=0.06, within="inside", texture=1.0),
        Solid("blood", (wide * 0.2, dome - 24, 0), (wide * 0.17, 26, 40), lobes=lobes(rng, 0.15), breath=breath,
              squeeze=0.2, within="inside"),
    ]  # fmt: skip


def _long_belly(rng: np.random.Generator, wide: float, dome: float, liver: Point, down: Point) -> list[Solid]:
    """Liver, stomach, spleen and kidneys."""
    solids = [
        Solid("liver", liver, (wide * 0.52, 74, 90), lobes=lobes(rng, 0.1), breath=down, label=LABEL["liver"],
              within="inside", texture=0.5),
        *branches(rng, liver, (wide * 0.35, 48, 40), 14, down, label=None),
        Solid("stomach", (wide * 0.34, dome + 40, 0), (40, 36, 60), lobes=lobes(rng, 0.15), breath=down,
              within="inside", texture=2.0),
        Solid("spleen", (wide * 0.68, dome + 52, 0), (26, 44, 60), angle=-0.3, lobes=lobes(rng, 0.1), breath=down,
              label=LABEL["spleen"], within="inside", texture=0.4),
    ]  # fmt: skip
    for side, name in ((1, "left kidney"), (-1, "right kidney")):
        at = (side * wide * 0.4, dome + 130 + rng.normal(0, 8), 0.0)
        kidney = (rng.uniform(22, 28), rng.uniform(46, 56), 35.0)
        own: dict[str, Any] = {"angle": side * -0.2, "breath": (down[0], down[1] * 0.7, down[2]), "within": "inside"}
        solids.append(Solid("kidney", at, kidney, lobes=lobes(rng, 0.06), label=LABEL[name], **own))
        solids.append(Solid("medulla", at, (kidney[0] * 0.55, kidney[1] * 0.7, 25), lobes=lobes(rng, 0.25), edge=5,
                            label=LABEL[name], **own))  # fmt: skip
    return solids


def _long_growths(rng: np.random.Generator, hosts: list[tuple[Point, Point]], spread: Point) -> list[Solid]:
    """A nodule and a lesion, each within `spread` mm of one of the hosts (centre, breath), whose breath it shares."""
    solids = []
    for name, largest in (("nodule", 12), ("lesion", 22)):
        centre, breath = hosts[int(rng.integers(len(hosts)))]
        x, y, z = (float(c + rng.uniform(-1, 1) * s) for c, s in zip(centre, spread, strict=True))
        size = float(rng.uniform(6, largest))
        solids += growth(rng, (x, y, z), size, LABEL[name], within="inside", breath=breath)
    return solids


def short_axis(rng: np.random.Generator) -> list[Solid]:
    """Heart cut across its long axis, in a chest: left ventricle in its ring of muscle, right ventricle around it."""
    wide = rng.uniform(120, 160)
    breath: Point = (float(rng.normal(0, 2)), float(rng.normal(4, 2)), float(rng.normal(0, 3)))
    shape_of_body = lobes(rng, 0.05, orders=(2, 3))
    outer, wall, cavity = rng.uniform(31, 40), rng.uniform(8, 13), rng.uniform(0.2, 0.42)
    at: Point = (float(rng.normal(16, 5)), float(rng.normal(0, 5)), 0.0)
    crescent = (at[0] - outer * 0.95, at[1] - rng.uniform(-4, 10), 0.0)
    sac = ((at[0] + crescent[0]) / 2, at[1] - 3, 0.0)
    solids = [
        Solid("fat", (0, 0, 0), (wide, wide * 0.72, THROUGH), lobes=shape_of_body, texture=0.4,
              stencil="body"),
        Solid("muscle", (0, 0, 0), (wide - 16, wide * 0.72 - 16, THROUGH), lobes=shape_of_body, texture=0.6),
        Solid("lung", (0, 0, 0), (wide - 28, wide * 0.72 - 28, THROUGH), stencil="inside", texture=0.7),
        *branches(rng, (0, 0, 0), (wide * 0.8, wide * 0.5, 40), 24, breath),
        Solid("liver", (-wide * 0.5, wide * 0.5, 0), (wide * 0.36, wide * 0.26, 60), breath=(0, 10, 0),
              within="inside", label=LABEL["liver"], texture=0.4),
        Solid("fat", sac, (outer * 1.62 + 6, outer * 1.2 + 6, 80), lobes=lobes(rng, 0.08), breath=breath,
              within="inside"),
    ]  # fmt: skip
    shape: dict[str, Any] = {
        "breath": breath,
        "beat": (float(rng.normal(-2, 1)), float(rng.normal(0, 1))),
        "within": "inside",
    }
    ring, cavity_lobes = lobes(rng, 0.04), lobes(rng, 0.05)
    left, right, wall_label = LABEL["left ventricle"], LABEL["right ventricle"], LABEL["myocardium"]
    solids += [
        Solid("muscle", crescent, (outer * 0.95 + 4, outer * 1.02 + 4, 90), lobes=lobes(rng, 0.06), squeeze=0.12,
              **shape),
        Solid("blood", crescent, (outer * 0.95, outer * 1.02, 86), lobes=lobes(rng, 0.08), squeeze=0.17, label=right,
              texture=1.0, **shape),
        Solid("heart", at, (outer, outer * 0.97, 95), lobes=ring, squeeze=0.07, label=wall_label, texture=0.5, **shape),
        Solid("blood", at, (outer - wall, outer * 0.97 - wall, 85), lobes=cavity_lobes, squeeze=float(cavity),
              label=left, texture=0.8, **shape),
    ]  # fmt: skip
    for turn in (0.9, 2.9):  # papillary muscles belong to the cavity, as readers draw it
        reach = (outer - wall) * 0.6
        papillary = (at[0] + reach * np.cos(turn), at[1] + reach * np.sin(turn), 0.0)
        inward = {**shape, "beat": (-reach * 0.3 * float(np.cos(turn)), -reach * 0.3 * float(np.sin(turn)))}
        solids.append(Solid("heart", papillary, (rng.uniform(4, 6), rng.uniform(3.5, 5), 40), label=None, **inward))
    return [
        *solids,
        *spine(rng, wide * 0.72 - 12),
        Solid("blood", (16, wide * 0.33, 0), (11, 11, THROUGH), label=LABEL["aorta"]),
    ]  # fmt: skip


def perfused(rng: np.random.Generator) -> list[Solid]:
    """The same; the blood of the right ventricle, which contrast agent reaches first, is a tissue of its own."""
    right = LABEL["right ventricle"]
    return [replace(solid, tissue="right") if solid.label == right else solid for solid in short_axis(rng)]


def apical(rng: np.random.Generator) -> list[Solid]:
    """Heart seen by ultrasound from its apex (y away from the probe): four chambers and the valves between them."""
    tilt = float(rng.normal(0, 0.12))
    long, wide, wall = rng.uniform(76, 98), rng.uniform(38, 52), rng.uniform(8, 12)
    apex = rng.uniform(14, 26)
    centre: Point = (float(rng.normal(8, 8)), apex + long / 2 + wall, 0.0)
    drift: Point = (float(rng.normal(0, 3)), float(rng.normal(0, 3)), float(rng.normal(0, 10)))
    shape: dict[str, Any] = {"angle": tilt, "breath": drift, "beat": (0.0, float(rng.uniform(3, 7)))}
    floor = centre[1] + long / 2 + 8
    atrium: Point = (centre[0] + tilt * -60, floor + rng.uniform(20, 28), 0.0)
    right: Point = (centre[0] - wide * 0.98, centre[1] + 12, 0.0)
    squeeze = float(rng.uniform(0.16, 0.34))
    left = LABEL["left ventricle"]
    solids = [
        Solid("muscle", (0, 80, 0), (150, 150, THROUGH), texture=0.5),
        Solid("lung", (centre[0] + wide * 1.7, 90, 0), (wide * 0.8, 120, THROUGH), lobes=lobes(rng, 0.1), edge=12),
        Solid("sac", centre, (wide / 2 + wall + 3, long / 2 + wall + 3, 95), squeeze=0.05, texture=3.0, edge=3,
              **shape),
        Solid("sac", (right[0] + 4, right[1], 0), (wide * 0.5 + 11, long * 0.46 + 9, 85), squeeze=0.05, texture=3.0,
              edge=3, **shape),
        Solid("heart", (right[0] + 4, right[1], 0), (wide * 0.5 + 8, long * 0.46 + 6, 80), squeeze=0.05, texture=1.0,
              **shape),
        Solid("heart", centre, (wide / 2 + wall, long / 2 + wall, 90), lobes=((3, 0.03, 4.7, 0.0),), squeeze=0.05,
              label=LABEL["myocardium"], texture=1.0, edge=3, **shape),
        Solid("heart", (atrium[0] - wide * 0.45, atrium[1], 0), (wide * 0.95, 32, 80), texture=1.0, **shape),
        Solid("blood", right, (wide * 0.42, long * 0.4, 70), lobes=lobes(rng, 0.08), squeeze=squeeze * 0.7,
              label=LABEL["right ventricle"], edge=2, **shape),
        Solid("blood", (atrium[0] - wide * 0.98, atrium[1], 0), (wide * 0.4, 23, 60), lobes=lobes(rng, 0.06),
              squeeze=-0.1, edge=2, **shape),
        Solid("blood", atrium, (wide * 0.44, rng.uniform(20, 28), 60), lobes=lobes(rng, 0.06), squeeze=-0.14,
              label=LABEL["left atrium"], edge=2, **shape),
        Solid("blood", centre, (wide / 2, long / 2 + 2, 80), lobes=((3, 0.06, 4.7, 0.0), *lobes(rng, 0.03)),
              squeeze=squeeze, label=left, edge=2.5, **shape),
    ]  # fmt: skip
    for side in (-1, 1):  # leaflets hang into the ventricle, and close when it empties
        at = (centre[0] + side * wide * 0.22, floor - 8, 0.0)
        swing = (-side * wide * 0.1, 7.0)
        solids.append(Solid("valve", at, (wide * 0.2, 1.6, 30), angle=side * -0.7, beat=swing, edge=1.5, label=None))
    return solids
