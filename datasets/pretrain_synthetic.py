"""The picture pool that pretraining draws from: procedural satellite scenes, medical pictures and map sheets."""

import json
import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

SIZE = 256
SCENES = 1_000_000_000
"""First seed of the satellite scenes; the splits of clouds_synthetic lie below."""

Picture = NDArray[np.uint8]


def render_satellite(seed: int) -> Picture:
    """A scene of the cloud generator in true colour or, one time in four, in a random composite: uint8 RGB (H, W, 3)."""
    from vfmadapt.datasets.clouds_synthetic import render_scene

    rng = np.random.default_rng([seed, 0])  # 0: the stream of satellite pictures
    bands = render_scene(SCENES + seed, size=(SIZE, SIZE)).bands
    chosen = [2, 1, 0] if rng.random() < 0.75 else rng.permutation(len(bands))[:3]
    image = np.nan_to_num(bands[chosen]).transpose(1, 2, 0)
    return np.asarray(np.clip(image, 0, 1) * 255 + 0.5, dtype=np.uint8)


def render_picture(seed: int) -> Picture:
    """Picture number `seed`: of five, three are satellite scenes, one is medical and one a map; uint8 RGB (256, 256, 3)."""
    from vfmadapt.datasets._maps import render_map
    from vfmadapt.datasets._medical import render_medical

    if seed % 5 < 3:
        return render_satellite(seed)
    return render_medical(seed) if seed % 5 == 3 else render_map(seed)


def _fill(path: Path, first: int, seeds: list[int]) -> None:
    pool = np.load(path, mmap_mode="r+")
    for seed in seeds:
        pool[seed - first] = render_picture(seed)
    pool.flush()


def picture_pool(folder: str | Path, *, images: int = 3000, seed: int = 0, workers: int = 2) -> Picture:
    """Pictures `seed` * 1,000,000 ... of the generator, rendered once into `folder` by `workers` processes.

    Returns:
        uint8 (images, 256, 256, 3), memory-mapped. The content depends on `images` and `seed` only.
    """
    path = Path(folder) / f"pool_{seed}_{images}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info("rendering %d pictures into %s", images, path)
        part = path.with_suffix(f".{os.getpid()}.part")
        np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(images, SIZE, SIZE, 3)).flush()
        first = seed * 1_000_000
        seeds = range(first, first + images)
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            with context.Pool(workers) as processes:
                processes.starmap(_fill, [(part, first, list(seeds[i : i + 20])) for i in range(0, images, 20)], chunksize=1)
        else:
            _fill(part, first, list(seeds))
        part.replace(path)
    return np.asarray(np.load(path, mmap_mode="r"))
