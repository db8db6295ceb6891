"""Procedural scenes as GeoTIFF files: image and label tiles, written atomically."""

from pathlib import Path
from typing import Any

import numpy as np

from vfmadapt.datasets._clouds_scene import VERSION, Scene, render_scene
from vfmadapt.datasets._clouds_sensor import TEST_PRESET
from vfmadapt.datasets._tiles import SPLITS, Job, atomic, tile_seed

SCALE = 1e-4
"""Reflectance of one digital number, the scale of Sentinel-2 products."""
NODATA = 0
COLOURS = {0: (34, 102, 51), 1: (255, 255, 255), 2: (126, 190, 240), 3: (94, 54, 130)}
"""Colours of clear, thick cloud, thin cloud and shadow."""


def scene_of(split: str, index: int, *, seed: int = 0, size: int = 256) -> Scene:
    """The scene of a tile: training and validation draw a training sensor each, test scenes have the test sensor."""
    return render_scene(
        tile_seed(split, index, seed), size=(size, size), preset=TEST_PRESET if split == "test" else None
    )


def write_scene(
    path: str | Path,
    scene: Scene,
    *,
    label: str | Path | None = None,
    crs: str = "EPSG:32633",
    origin: tuple[float, float] = (5e5, 5e6),
) -> None:
    """Write a scene as a GeoTIFF of uint16 reflectance x 10000 with scale, band names and nodata; its labels beside it.

    Args:
        path: of the image.
        scene: what to write.
        label: path of the label GeoTIFF (uint8, 255 is ignore, with a colour table); by default none is written.
        crs: of the pixel grid.
        origin: (easting, northing) of the upper left corner, metres.
    """
    import rasterio
    from rasterio.transform import from_origin

    height, width = scene.label.shape
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": height, "width": width, "crs": crs, "compress": "deflate", "zlevel": 1,
        "transform": from_origin(*origin, scene.pixel_size, scene.pixel_size),
    }  # fmt: skip
    if max(height, width) > 512:
        profile |= {"tiled": True, "blockxsize": 256, "blockysize": 256}
    numbers = np.clip(np.round(scene.bands / np.float32(SCALE)), 1, 65535).astype(np.uint16)
    numbers[:, ~scene.valid] = NODATA
    tags = {
        "GENERATOR": f"clouds_synthetic {VERSION}",
        "SENSOR": scene.preset,
        "SUN_AZIMUTH": f"{np.rad2deg(scene.sun.azimuth):.2f}",
        "SUN_ELEVATION": f"{np.rad2deg(scene.sun.elevation):.2f}",
    }
    bands = {"count": len(numbers), "dtype": "uint16", "nodata": NODATA, "interleave": "band"}
    with atomic(Path(path)) as temporary, rasterio.open(temporary, "w", **profile, **bands) as file:
        file.write(numbers)
        file.scales = (SCALE,) * len(numbers)
        file.descriptions = scene.names
        file.update_tags(**tags)
    if label is not None:
        one = {"count": 1, "dtype": "uint8", "nodata": 255}
        with atomic(Path(label)) as temporary, rasterio.open(temporary, "w", **profile, **one) as file:
            file.write(scene.label, 1)
            file.write_colormap(1, COLOURS)
            file.update_tags(**tags)


def write_tile(job: Job, split: str, index: int) -> None:
    """Render and write one tile; tiles of a set lie in several UTM zones, side by side."""
    scene = scene_of(split, index, seed=job.seed, size=job.size)
    crs = f"EPSG:{32601 + (7 * index + 13 * SPLITS.index(split)) % 60}"
    origin = (4e5 + 1e4 * (index % 20), 4e6 + 1e4 * (index // 20))
    write_scene(job.image(split, index), scene, label=job.label(split, index), crs=crs, origin=origin)
