"""Pictures of what a model makes of prompts for labelled objects."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vfmadapt.contracts import Sample, Samples
from vfmadapt.raster.preview import overlay, panel, quicklook
from vfmadapt.tasks.clicks import boxes_of, central_place

if TYPE_CHECKING:
    from vfmadapt.tasks.promptable import PromptableTask

_INK = (0, 0, 0)
_TITLES = {"box": "from a box", "point": "from a point", "clicks": "after {} clicks"}


def write_prompt_previews(
    task: "PromptableTask", samples: Samples, folder: Path, *, indices: Sequence[int]
) -> list[Path]:
    """Write one PNG per sample: the objects with boxes and points, and the masks found from each kind of prompt.

    Of an image larger than the task's window the upper left window is shown.

    Returns:
        The files, named by the samples' ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task.model.eval()
    written = []
    for index in indices:
        sample = samples[index]
        written.append(folder / f"{sample['id'].replace('/', '_')}.png")
        panel(_pictures(task, sample), task.model.spec.classes).save(written[-1])
    return written


@torch.inference_mode()
def _pictures(task: "PromptableTask", sample: Sample) -> list[tuple[str, NDArray[np.uint8]]]:
    device, at = next(task.model.parameters()).device, (..., slice(task.window), slice(task.window))
    image, valid, mask = (part[at][None].to(device) for part in (sample["image"], sample["valid"], sample["mask"]))
    counted = mask != task.model.spec.ignore_index
    picture = quicklook(sample["image"][at].numpy(), sample["valid"][at].numpy(), sample["bands"])
    marked = picture.copy()
    maps = {kind: np.full(mask.shape[1:], task.model.spec.ignore_index) for kind in ("truth", *_TITLES)}
    embedding = task.model.encode(image, valid)
    for objects in task.all_objects(mask[0]):
        answers = task.ask(embedding, objects, counted)
        found = {kind: answer.logits[0, :, 0] > 0 for kind, answer in answers.items()}
        for kind, masks in (found | {"truth": objects.masks[0]}).items():
            for one, value in zip(masks.cpu().numpy(), objects.classes[0].tolist(), strict=True):
                maps[kind][one] = value
        _mark(marked, boxes_of(objects.masks)[0].tolist(), central_place(objects.masks)[0].tolist())
    classes = task.model.spec.classes
    titles = {kind: title.format(1 + task.clicks) for kind, title in _TITLES.items()}
    drawn = [(title, overlay(picture, maps[kind], classes)) for kind, title in titles.items()]
    return [("prompts", marked), ("truth", overlay(picture, maps["truth"], classes)), *drawn]


def _mark(picture: NDArray[np.uint8], boxes: Any, points: Any) -> None:
    """Draw boxes (x0, y0, x1, y1) and points (x, y) into a picture (H, W, 3)."""
    for box in boxes:
        x0, y0, x1, y1 = (int(v) for v in box)
        picture[[y0, y1], x0 : x1 + 1] = _INK
        picture[y0 : y1 + 1, [x0, x1]] = _INK
    for x, y in points:
        picture[max(int(y) - 1, 0) : int(y) + 2, max(int(x) - 1, 0) : int(x) + 2] = _INK
