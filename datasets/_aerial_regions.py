"""Materials of aerial scenes, and the regions that differ in which of them are common."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vfmadapt.datasets._aerial_canvas import Colour
from vfmadapt.datasets._clouds_spectra import SPECTRA

# Typical surface reflectance of red, green and blue, beside those that satellites see, too.
_MATERIALS: Mapping[str, tuple[float, float, float]] = {
    **{name: (bands[2], bands[1], bands[0]) for name, bands in SPECTRA.items()},
    "terracotta": (0.32, 0.17, 0.11),
    "brown_tile": (0.19, 0.125, 0.095),
    "slate": (0.10, 0.105, 0.115),
    "bitumen": (0.075, 0.075, 0.075),
    "gravel_roof": (0.27, 0.26, 0.245),
    "white_roof": (0.56, 0.56, 0.55),
    "green_metal": (0.14, 0.21, 0.17),
    "blue_metal": (0.13, 0.22, 0.38),
    "zinc": (0.31, 0.33, 0.35),
    "rust": (0.27, 0.16, 0.11),
    "worn_asphalt": (0.155, 0.15, 0.14),
    "paving": (0.27, 0.25, 0.225),
    "red_paving": (0.26, 0.18, 0.145),
    "lawn": (0.075, 0.115, 0.045),
    "dry_lawn": (0.16, 0.15, 0.085),
    "leaves": (0.042, 0.070, 0.028),
    "young_leaves": (0.075, 0.110, 0.038),
    "needles": (0.026, 0.043, 0.026),
    "autumn_leaves": (0.15, 0.105, 0.04),
    "wheat": (0.29, 0.23, 0.12),
    "maize": (0.05, 0.095, 0.035),
    "rape": (0.33, 0.31, 0.05),
    "ploughed": (0.17, 0.125, 0.09),
    "dry_soil": (0.30, 0.235, 0.17),
    "white_paint": (0.55, 0.55, 0.53),
    "pool": (0.16, 0.36, 0.42),
}


@dataclass(frozen=True)
class Region:
    """Which materials a region builds with and what grows there; of each tuple one is drawn, repeats are likelier.

    Args:
        name: of the region.
        roofs: of pitched roofs.
        flat_roofs: of flat ones.
        halls: of halls.
        walls: of facades.
        roads: of carriageways.
        pavements: of pavements and yards.
        lawns: of what is green between houses.
        trees: of crowns.
        crops: of fields.
        soils: of bare ground and tracks.
        waters: of rivers and ponds.
        hipped: share of the pitched roofs that slope to all four sides.
    """

    name: str
    roofs: tuple[str, ...]
    flat_roofs: tuple[str, ...]
    halls: tuple[str, ...]
    walls: tuple[str, ...]
    roads: tuple[str, ...]
    pavements: tuple[str, ...]
    lawns: tuple[str, ...]
    trees: tuple[str, ...]
    crops: tuple[str, ...]
    soils: tuple[str, ...]
    waters: tuple[str, ...]
    hipped: float


TRAIN_REGIONS = (
    Region(
        "south",
        roofs=("terracotta", "terracotta", "terracotta", "brown_tile", "paving"),
        flat_roofs=("gravel_roof", "concrete", "terracotta", "white_roof"),
        halls=("gravel_roof", "zinc", "rust", "white_roof"),
        walls=("pale_sand", "sand", "white_paint"),
        roads=("worn_asphalt", "asphalt"),
        pavements=("paving", "concrete", "pale_sand"),
        lawns=("dry_lawn", "dry_grass", "lawn"),
        trees=("leaves", "needles", "dry_grass"),
        crops=("wheat", "stubble", "ploughed", "crop", "dry_grass"),
        soils=("dry_soil", "red_soil", "sand"),
        waters=("green_water", "turbid_water", "water"),
        hipped=0.5,
    ),
    Region(
        "north",
        roofs=("slate", "slate", "brown_tile", "red_roof", "terracotta"),
        flat_roofs=("bitumen", "gravel_roof", "zinc", "grass"),
        halls=("zinc", "bitumen", "gravel_roof", "blue_metal"),
        walls=("red_roof", "concrete", "white_paint"),
        roads=("asphalt", "asphalt", "worn_asphalt"),
        pavements=("concrete", "paving", "red_paving"),
        lawns=("lawn", "lawn", "grass"),
        trees=("leaves", "leaves", "young_leaves", "needles"),
        crops=("crop", "wheat", "rape", "young_crop", "ploughed"),
        soils=("soil", "wet_soil", "gravel"),
        waters=("water", "deep_water", "turbid_water"),
        hipped=0.25,
    ),
    Region(
        "east",
        roofs=("slate", "blue_metal", "brown_tile", "zinc", "red_roof"),
        flat_roofs=("concrete", "gravel_roof", "bitumen", "green_metal", "worn_asphalt"),
        halls=("blue_metal", "blue_metal", "white_roof", "zinc", "red_roof"),
        walls=("concrete", "white_paint", "paving"),
        roads=("worn_asphalt", "concrete", "asphalt"),
        pavements=("concrete", "concrete", "paving"),
        lawns=("grass", "lawn", "soil"),
        trees=("leaves", "leaves", "marsh"),
        crops=("maize", "young_crop", "crop", "wet_soil", "green_water"),
        soils=("soil", "dry_soil", "concrete"),
        waters=("turbid_water", "green_water", "green_water"),
        hipped=0.35,
    ),
    Region(
        "plains",
        roofs=("gravel", "bitumen", "brown_tile", "slate", "zinc", "paving"),
        flat_roofs=("white_roof", "gravel_roof", "bitumen"),
        halls=("white_roof", "white_roof", "gravel_roof", "bitumen"),
        walls=("concrete", "pale_sand", "white_paint"),
        roads=("asphalt", "worn_asphalt", "concrete"),
        pavements=("concrete", "pale_sand"),
        lawns=("lawn", "grass", "dry_lawn"),
        trees=("leaves", "young_leaves", "autumn_leaves"),
        crops=("maize", "stubble", "wheat", "ploughed", "crop"),
        soils=("soil", "red_soil", "gravel", "dry_soil"),
        waters=("turbid_water", "water", "deep_water"),
        hipped=0.7,
    ),
)
"""Regions of the training and validation scenes."""

TEST_REGION = Region(
    "coast",
    roofs=("red_roof", "brown_tile", "rust", "green_metal", "gravel_roof"),
    flat_roofs=("zinc", "slate", "paving", "gravel_roof"),
    halls=("green_metal", "rust", "concrete", "zinc"),
    walls=("white_paint", "gravel", "red_paving"),
    roads=("worn_asphalt", "asphalt", "gravel"),
    pavements=("red_paving", "paving", "concrete"),
    lawns=("young_crop", "lawn", "dry_lawn"),
    trees=("needles", "leaves", "autumn_leaves"),
    crops=("rape", "crop", "ploughed", "maize", "stubble"),
    soils=("sand", "soil", "dry_soil"),
    waters=("green_water", "water", "deep_water"),
    hipped=0.45,
)
"""Region of the test scenes only."""


def material(rng: np.random.Generator, names: tuple[str, ...], spread: float = 0.1) -> Colour:
    """The reflectance of one of the named materials, varied by `spread` in brightness and half as much in hue."""
    base = np.asarray(_MATERIALS[names[rng.integers(len(names))]], dtype=np.float32)
    varied = base * np.exp(rng.normal(0, spread)) * np.exp(rng.normal(0, spread / 2, 3))
    return np.asarray(varied, dtype=np.float32)
