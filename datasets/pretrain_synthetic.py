"""The picture pool that pretraining draws from: procedural satellite scenes, medical pictures, map sheets and more."""

import json
import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError

if TYPE_CHECKING:  # processes that render do without torch
    from torch import Tensor

    from vfmadapt.contracts import DataSpec

log = logging.getLogger(__name__)

SIZE = 256
SCENES = 1_000_000_000
"""First seed of the satellite scenes; the splits of clouds_synthetic lie below."""

Picture = NDArray[np.uint8]


def render_satellite(seed: int) -> Picture:
    """A scene of the cloud generator in true colour or, one time in four, a random composite: uint8 RGB (H, W, 3)."""
    from vfmadapt.datasets.clouds_synthetic import render_scene

    rng = np.random.default_rng([seed, 0])  # 0: the stream of satellite pictures
    bands = render_scene(SCENES + seed, size=(SIZE, SIZE)).bands
    chosen = [2, 1, 0] if rng.random() < 0.75 else rng.permutation(len(bands))[:3]
    image = np.nan_to_num(bands[chosen]).transpose(1, 2, 0)
    return np.asarray(np.clip(image, 0, 1) * 255 + 0.5, dtype=np.uint8)


def render_room(seed: int) -> Picture:
    """A furnished room as a camera sees it: uint8 RGB (256, 256, 3)."""
    from vfmadapt.datasets import _rooms_scene

    return _rooms_scene.render_room(SCENES + seed, size=(SIZE, SIZE)).image


def render_lumen(seed: int) -> Picture:
    """A frame of generated endoscopy, of a camera of 70 to 120 degrees: uint8 RGB (256, 256, 3)."""
    from vfmadapt.datasets._endo_clip import render_clip

    fov = np.random.default_rng([seed, 1]).uniform(70, 120)
    return np.asarray(render_clip(SCENES + seed, frames=1, size=(SIZE, SIZE), fov=fov).image[0])


def render_aerial(seed: int) -> Picture:
    """A town or its fields from an aeroplane: uint8 RGB (256, 256, 3)."""
    from vfmadapt.datasets._aerial_scene import render_scene

    return render_scene(SCENES + seed, size=(SIZE, SIZE)).image


def render_sheet(seed: int) -> Picture:
    """A map sheet in a style that `maps_synthetic` trains with: uint8 RGB (256, 256, 3)."""
    from vfmadapt.datasets import _maps_sheet

    return _maps_sheet.render_sheet(SCENES + seed, size=(SIZE, SIZE)).image


def _medical(seed: int) -> Picture:
    from vfmadapt.datasets._medical import render_medical

    return render_medical(seed)


def _map(seed: int) -> Picture:
    from vfmadapt.datasets._maps import render_map

    return render_map(seed)


_KINDS: dict[str, Callable[[int], Picture]] = {
    "satellite": render_satellite, "medical": _medical, "map": _map, "sheet": render_sheet,
    "room": render_room, "lumen": render_lumen, "aerial": render_aerial,
}  # fmt: skip
FIRST = ("satellite", "satellite", "satellite", "medical", "map")
"""The kinds that vfm_tiny@1 saw, one picture of each in turn."""


def render_picture(seed: int, kinds: Sequence[str] = FIRST) -> Picture:
    """Picture number `seed`, the kinds taking turns: uint8 RGB (256, 256, 3)."""
    return _KINDS[kinds[seed % len(kinds)]](seed)


def fill(path: str, seeds: Sequence[int], rows: Sequence[int], kinds: Sequence[str]) -> None:
    """Render pictures `seeds` into `rows` of the array file at `path`."""
    pool = np.load(path, mmap_mode="r+")
    for seed, row in zip(seeds, rows, strict=True):
        pool[row] = render_picture(seed, kinds)
    pool.flush()


def picture_pool(
    folder: str | Path, *, images: int = 3000, seed: int = 0, kinds: Sequence[str] = FIRST, workers: int = 2
) -> Picture:
    """Pictures `seed` * 1,000,000 ... of the generator, rendered once into `folder` by `workers` processes.

    Returns:
        uint8 (images, 256, 256, 3), memory-mapped. The content depends on `images`, `seed` and `kinds` only.

    Raises:
        UserError: a kind that there is not.
    """
    if unknown := [kind for kind in kinds if kind not in _KINDS] or ([] if kinds else ["nothing"]):
        raise UserError(f"pictures_synthetic: kinds names {unknown[0]}; there are {', '.join(_KINDS)}")
    of_kinds = "" if tuple(kinds) == FIRST else f"_{zlib.crc32(' '.join(kinds).encode()):08x}"
    path = Path(folder) / f"pool_{seed}_{images}{of_kinds}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info("rendering %d pictures into %s", images, path)
        part = path.with_suffix(f".{os.getpid()}.part")
        np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(images, SIZE, SIZE, 3)).flush()
        _render(part, images, seed * 1_000_000, kinds, workers)
        part.replace(path)
    return np.asarray(np.load(path, mmap_mode="r"))


class PicturesSynthetic:
    """The pool as a source without labels; values 0..1.

    Args:
        root: folder of the pool.
        images: how many pictures.
        seed: another seed, other pictures.
        kinds: of pictures, taking turns.
        workers: processes that render them.
    """

    def __init__(
        self, *, root: str, images: int = 3000, seed: int = 0, kinds: Sequence[str] = FIRST, workers: int = 2
    ) -> None:
        self._pool = partial(picture_pool, root, images=images, seed=seed, kinds=kinds, workers=workers)

    @property
    def spec(self) -> "DataSpec":
        """Red, green and blue, and the mean and std that vfm_tiny takes for all of them."""
        from vfmadapt.contracts import DataSpec

        return DataSpec("pictures_synthetic", ("red", "green", "blue"), (), (0.3,) * 3, (0.2,) * 3)

    def prepare(self) -> None:
        """Render the pool where it is not there yet."""
        _ = self._pictures

    def require(self, side: int) -> None:
        """Raise UserError unless pictures have that many pixels per side."""
        if side > SIZE:
            raise UserError(f"pictures have {SIZE} pixels per side, a crop {side}; make the objective's crops smaller")

    def __len__(self) -> int:
        return len(self._pictures)

    def window(self, index: int, side: int, draw: np.random.Generator) -> "tuple[Tensor, Tensor]":
        """A random square of a picture, all of it valid."""
        import torch

        side = min(side, SIZE)
        top, left = (int(i) for i in draw.integers(SIZE - side + 1, size=2))
        square = self._pictures[index, top : top + side, left : left + side].transpose(2, 0, 1)
        image = torch.from_numpy(np.divide(square, 255, dtype=np.float32))
        return image, torch.ones(side, side, dtype=torch.bool)

    @cached_property
    def _pictures(self) -> Picture:
        return self._pool()


def _render(part: Path, images: int, first: int, kinds: Sequence[str], workers: int) -> None:
    # plain subprocesses for the reasons given in _tiles.py
    code = "import json, sys; from vfmadapt.datasets.pretrain_synthetic import fill; fill(*json.load(sys.stdin))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    for worker in range(workers):
        rows = list(range(worker, images, workers))
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, env=environment)
        assert process.stdin is not None
        process.stdin.write(json.dumps([str(part), [first + row for row in rows], rows, list(kinds)]))
        process.stdin.close()
        started.append(process)
    if any([process.wait() for process in started]):  # a list, so that every one is waited for
        part.unlink(missing_ok=True)
        raise RuntimeError("a process that renders pictures failed; its error stands above")
