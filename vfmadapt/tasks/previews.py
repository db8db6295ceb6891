"""Pictures of what a model makes of labelled samples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vfmadapt.contracts import Samples
from vfmadapt.model import AdaptedModel
from vfmadapt.raster.preview import overlay, panel, quicklook
from vfmadapt.tasks.windows import whole_image


def evenly(samples: Samples, count: int) -> list[int]:
    """Indices of `count` samples, evenly spaced."""
    return [int(i) for i in np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int))]


def write_previews(
    model: AdaptedModel, samples: Samples, folder: Path, *, indices: Sequence[int], side: int
) -> list[Path]:
    """Write one PNG per sample: image, truth and prediction side by side; `side` as in `whole_image`.

    Returns:
        The files, named by the samples' ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    classes = model.spec.classes
    written = []
    model.eval()
    for index in indices:
        sample = samples[index]
        with torch.inference_mode():
            logits = whole_image(model, sample["image"][None].to(device), sample["valid"][None].to(device), side=side)
        valid = sample["valid"].numpy()
        found = np.where(valid, logits[0].argmax(0).cpu().numpy(), model.spec.ignore_index)
        picture = quicklook(sample["image"].numpy(), valid, sample["bands"])
        sheet = panel(
            [
                ("image", picture),
                ("truth", overlay(picture, sample["mask"].numpy(), classes)),
                ("prediction", overlay(picture, found, classes)),
            ],
            classes,
        )
        written.append(folder / f"{sample['id'].replace('/', '_')}.png")
        sheet.save(written[-1])
    return written
