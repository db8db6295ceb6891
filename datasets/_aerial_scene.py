"""A procedural aerial photograph from a seed: plan, ground, streets, solids, camera. Needs numpy, scipy and pillow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfmadapt.datasets import _aerial_built as built
from vfmadapt.datasets import _aerial_open as unbuilt
from vfmadapt.datasets._aerial_camera import TEST_CAMERA, TRAIN_CAMERA, photograph
from vfmadapt.datasets._aerial_canvas import NAMES, Canvas, floats
from vfmadapt.datasets._aerial_plan import Plan, draw_plan
from vfmadapt.datasets._aerial_regions import TEST_REGION, TRAIN_REGIONS, Region, material
from vfmadapt.datasets._aerial_site import Site, Solids
from vfmadapt.datasets._aerial_solids import draw_solids
from vfmadapt.datasets._aerial_streets import PAVEMENT, draw_river, draw_streets
from vfmadapt.datasets._clouds_surface import Sun
from vfmadapt.datasets._procedural import Size

__all__ = ["NAMES", "TEST_REGION", "TRAIN_REGIONS", "VERSION", "AerialScene", "render_scene"]

VERSION = 1
"""Version of the generator: another number, other pixels."""


@dataclass(frozen=True)
class Setting:
    """A kind of place.

    Args:
        share: of all scenes.
        block: about the longest side of a block, metres.
        widths: of the streets of the first cuts; 0 is a mere boundary.
        paved: streets have pavements.
        bent: share of the scenes whose streets are no straight lines.
        uses: how often a block is put to which use.
    """

    share: float
    block: float
    widths: tuple[float, ...]
    paved: bool
    bent: float
    uses: Mapping[str, float]


_USES: Mapping[str, Callable[[Site], Solids]] = {
    **{use.__name__: use for use in (built.houses, built.perimeter, built.towers, built.halls, built.car_park)},
    **{use.__name__: use for use in (unbuilt.park, unbuilt.crops, unbuilt.wood, unbuilt.bare)},
}

_SETTINGS = (
    Setting(0.28, 75, (9, 6.5, 5.5), True, 0.7, {"houses": 8, "park": 1, "bare": 0.6, "wood": 0.5, "car_park": 0.4}),
    Setting(0.14, 62, (11, 8, 5.5), True, 0.5, {"perimeter": 8, "park": 1, "car_park": 0.8, "towers": 0.7}),
    Setting(0.12, 110, (14, 9, 6), True, 0.3, {"towers": 5, "park": 1.5, "car_park": 1.2, "bare": 1, "wood": 0.4}),
    Setting(0.13, 105, (12, 8), True, 0.2, {"halls": 5, "car_park": 1.8, "bare": 1.2, "park": 0.5, "crops": 0.6}),
    Setting(0.16, 80, (6.5, 3.2, 0), False, 0.8, {"houses": 2.2, "crops": 3, "wood": 1.5, "park": 0.8, "bare": 0.8}),
    Setting(0.17, 95, (6, 3, 0), False, 0.6, {"crops": 6, "wood": 2.2, "bare": 1.2, "houses": 0.25, "park": 0.3}),
)


@dataclass(frozen=True)
class AerialScene:
    """A labelled aerial photograph.

    Args:
        image: uint8 RGB (H, W, 3).
        labels: uint8 (H, W), indices into `NAMES`. Roads go on under cars and crowns; car parks, yards and gardens
            are background; a single tree has the label of the ground that it stands on.
        region: name of the region.
        pixel: metres.
        heights: float32 (H, W), metres above the ground of the roof or crown that a pixel shows; 0 elsewhere.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    region: str
    pixel: float
    heights: NDArray[np.float32]


def render_scene(seed: int, *, size: Size = (256, 256), test: bool = False) -> AerialScene:
    """Render the scene of a seed: the same arguments give the same pixels.

    Args:
        seed: any number >= 0.
        size: (H, W) in pixels.
        test: region and camera are those of the test scenes, not of the training scenes.
    """
    rng = np.random.default_rng([VERSION, seed])
    region = TEST_REGION if test else TRAIN_REGIONS[rng.integers(len(TRAIN_REGIONS))]
    pixel = float(np.exp(rng.uniform(np.log(0.35), np.log(0.9))))  # metres, as in collections from many sources
    sun = Sun(rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(36, 70)))
    tilt, towards = rng.uniform(0, 0.25), rng.uniform(0, 2 * np.pi)
    lean = floats([tilt * np.cos(towards), tilt * np.sin(towards)])
    canvas = Canvas(rng, size, pixel, sun, lean)
    shares = np.asarray([s.share for s in _SETTINGS])
    setting = _SETTINGS[rng.choice(len(_SETTINGS), p=shares / shares.sum())]
    _build(canvas, region, setting)
    image = photograph(rng, TEST_CAMERA if test else TRAIN_CAMERA, canvas.lit())
    return AerialScene(image, canvas.labels, region.name, pixel, canvas.heights)


def _build(canvas: Canvas, region: Region, setting: Setting) -> None:
    """Everything in the order in which it covers what lies below."""
    rng = canvas.rng
    straight = bool(rng.random() >= setting.bent)
    plan = draw_plan(rng, canvas.reach, block=setting.block, widths=setting.widths, straight=straight)
    solids = [s for site in _sites(canvas, region, setting, plan) for s in _use(site, setting)]
    if rng.random() < 0.3:
        draw_river(canvas, material(rng, region.waters), material(rng, (*region.lawns, *region.soils)))
    solids += draw_streets(canvas, plan, region, paved=setting.paved, parked=rng.uniform(0.05, 0.6))
    draw_solids(canvas, solids)


def _sites(canvas: Canvas, region: Region, setting: Setting, plan: Plan) -> list[Site]:
    """The blocks that may be seen, less their pavements."""
    inset = PAVEMENT if setting.paved else 0.0
    sites = [Site(canvas, plan, region, block.shrunk(inset)) for block in plan.blocks]
    return [s for s in sites if min(s.block.width, s.block.height) > 6 and canvas.window(s.ground(s.block)) is not None]


def _use(site: Site, setting: Setting) -> Solids:
    """Put a block to a use."""
    weights = np.asarray(list(setting.uses.values()))
    use = list(setting.uses)[site.canvas.rng.choice(len(weights), p=weights / weights.sum())]
    return _USES[use](site)
