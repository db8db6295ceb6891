"""Procedural scenes as GeoTIFF files: image and label tiles, written atomically, by several processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vfmadapt.datasets._clouds_scene import VERSION, Scene, render_scene
from vfmadapt.datasets._clouds_sensor import TEST_PRESET

SCALE = 1e-4
"""Reflectance of one digital number, the scale of Sentinel-2 products."""
NODATA = 0
SPLITS = ("train", "val", "test")
COLOURS = {0: (34, 102, 51), 1: (255, 255, 255), 2: (126, 190, 240), 3: (94, 54, 130)}
"""Colours of clear, thick cloud, thin cloud and shadow."""

_SPLIT_SEEDS = 1_000_000  # seeds of a split lie in their own range, so no scene of one split is in another
_INLINE = 12  # fewer tiles than this are not worth the start of a process


@dataclass(frozen=True)
class Job:
    """A set of tiles: where they go and what they are."""

    folder: Path
    seed: int
    size: int
    counts: Mapping[str, int]

    def tiles(self) -> list[tuple[str, int]]:
        """Every (split, index)."""
        return [(split, index) for split in SPLITS for index in range(self.counts[split])]

    def image(self, split: str, index: int) -> Path:
        """Path of an image tile."""
        return self.folder / split / f"image_{index:05d}.tif"

    def label(self, split: str, index: int) -> Path:
        """Path of a label tile."""
        return self.folder / split / f"label_{index:05d}.tif"


def scene_of(split: str, index: int, *, seed: int = 0, size: int = 256) -> Scene:
    """The scene of a tile: training and validation draw a training sensor each, test scenes have the test sensor."""
    number = (seed * len(SPLITS) + SPLITS.index(split)) * _SPLIT_SEEDS + index
    return render_scene(number, size=(size, size), preset=TEST_PRESET if split == "test" else None)


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    with _atomic(Path(path)) as temporary, rasterio.open(temporary, "w", **profile, **bands) as file:
        file.write(numbers)
        file.scales = (SCALE,) * len(numbers)
        file.descriptions = scene.names
        file.update_tags(**tags)
    if label is not None:
        one = {"count": 1, "dtype": "uint8", "nodata": 255}
        with _atomic(Path(label)) as temporary, rasterio.open(temporary, "w", **profile, **one) as file:
            file.write(scene.label, 1)
            file.write_colormap(1, COLOURS)
            file.update_tags(**tags)


def write_tile(job: Job, split: str, index: int) -> None:
    """Render and write one tile; tiles of a set lie in several UTM zones, side by side."""
    scene = scene_of(split, index, seed=job.seed, size=job.size)
    crs = f"EPSG:{32601 + (7 * index + 13 * SPLITS.index(split)) % 60}"
    origin = (4e5 + 1e4 * (index % 20), 4e6 + 1e4 * (index // 20))
    write_scene(job.image(split, index), scene, label=job.label(split, index), crs=crs, origin=origin)


def write_share(text: str) -> None:
    """What a worker process does: JSON of (folder, seed, size, counts, tiles) -> files."""
    folder, seed, size, counts, tiles = json.loads(text)
    job = Job(Path(folder), seed, size, counts)
    for split, index in tiles:
        write_tile(job, split, index)


def write_missing(job: Job, workers: int) -> int:
    """Write the tiles that are not there yet, and a marker when all are; returns how many were written.

    Raises:
        RuntimeError: a worker process failed.
    """
    marker = job.folder / "done.json"
    counts = dict(job.counts)
    if marker.exists():
        done = json.loads(marker.read_text())
        if all(done.get(split, 0) >= count for split, count in counts.items()):
            return 0
        counts = {split: max(count, done.get(split, 0)) for split, count in counts.items()}
    missing = [tile for tile in job.tiles() if not (job.image(*tile).exists() and job.label(*tile).exists())]
    if len(missing) <= _INLINE or workers <= 1:
        for tile in missing:
            write_tile(job, *tile)
    else:
        _write_in_processes(job, missing, workers)
    with _atomic(marker) as temporary:
        temporary.write_text(json.dumps(counts))
    return len(missing)


def _write_in_processes(job: Job, missing: Sequence[tuple[str, int]], workers: int) -> None:
    # Plain subprocesses and not multiprocessing: "fork" is unsafe beside torch's threads, and "spawn" runs the caller's
    # script again, which a script without a main guard does not survive.
    code = "import sys; from vfmadapt.datasets._clouds_files import write_share; write_share(sys.stdin.read())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    for worker in range(workers):
        text = json.dumps([str(job.folder), job.seed, job.size, dict(job.counts), missing[worker::workers]])
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        started.append(process)
    errors = [process.stderr.read() if process.stderr is not None else "" for process in started]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(
            f"a process that renders scenes failed: {next(e for e, c in zip(errors, codes, strict=True) if c)}"
        )
