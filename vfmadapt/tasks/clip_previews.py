"""Pictures of what is tracked in labelled clips."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vfmadapt.contracts import ClassSpec
from vfmadapt.raster.preview import overlay, panel

_SHOWN = 6  # frames of a clip
_COLOURS = ((230, 60, 60), (60, 160, 255), (250, 200, 40), (80, 200, 120), (200, 90, 220), (255, 140, 60))


def write_clip_previews(
    follow: Callable[[Any], tuple[Tensor, Tensor, Tensor]], clips: Any, folder: Path, *, indices: Sequence[int]
) -> list[Path]:
    """Write one PNG per clip: evenly spaced frames, the truth above what `follow` found.

    Returns:
        The files, named by the clips' ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index in indices:
        sample = clips[index]
        found, truth, _ = follow(sample)
        classes = [ClassSpec(f"structure {i + 1}", _COLOURS[i % len(_COLOURS)]) for i in range(len(truth))]
        chosen = np.unique(np.linspace(0, len(sample["image"]) - 1, _SHOWN).astype(int))
        pictures = [
            (f"{t}: truth, found", _column(sample["image"][t], (truth[:, t], found[:, t]), classes)) for t in chosen
        ]
        written.append(folder / f"{sample['id'].replace('/', '_')}.png")
        panel(pictures, classes).save(written[-1])
    return written


def _column(image: Tensor, rows: Sequence[Tensor], classes: Sequence[ClassSpec]) -> NDArray[np.uint8]:
    """The frame (C, H, W) once for every row, with the row's masks (O, H, W) laid over it."""
    grey = (image.numpy().clip(0, 1) * 255).astype(np.uint8)
    picture = np.ascontiguousarray(np.broadcast_to(grey, (3, *grey.shape[1:])).transpose(1, 2, 0))
    shown = []
    for masks in rows:
        labels = np.full(picture.shape[:2], -1)
        for number, mask in enumerate(masks):
            labels[mask.numpy()] = number
        shown.append(overlay(picture, labels, classes))
    return np.concatenate(shown)
