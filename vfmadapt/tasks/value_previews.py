"""Pictures of the values that a model gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vfmadapt.depth_metrics import aligned
from vfmadapt.model import AdaptedModel
from vfmadapt.raster.colours import coloured, span_of, with_bar
from vfmadapt.raster.preview import VOID_COLOUR, panel, quicklook
from vfmadapt.tasks.values import collate_values
from vfmadapt.tasks.windows import whole_image


def write_value_previews(
    model: AdaptedModel,
    samples: Any,
    folder: Path,
    *,
    indices: Sequence[int],
    side: int,
    truth_inverse: bool = False,
) -> list[Path]:
    """Write one PNG per sample: image, truth and prediction of the first value, in one scale of colours.

    An inverse depth is shown with the factor and summand that fit the truth best, whose own are inverse depths where
    `truth_inverse`. `side` as in `whole_image`.

    Returns:
        The files, named by the samples' ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device, value = next(model.parameters()).device, model.spec.values[0]
    written = []
    model.eval()
    for index in indices:
        sample = samples[index]
        batch = collate_values([sample])
        with torch.inference_mode():
            found = whole_image(model, batch["image"].to(device), batch["valid"].to(device), side=side)[0, 0].cpu()
        truth, known = batch["truth"][0, 0], batch["known"][0, 0]
        if value.inverse and known.any():
            truth = truth if truth_inverse else 1 / truth
            _, scale, shift = aligned(found[known].double(), truth[known].double(), "least_squares")
            found = scale * found + shift
        valid = sample["valid"].numpy()
        span = span_of(truth[known].numpy())
        shown = [coloured(v.numpy(), k, span, void=VOID_COLOUR) for v, k in ((truth, known.numpy()), (found, valid))]
        picture = quicklook(sample["image"].numpy(), valid, sample["bands"])
        sheet = panel([("image", picture), ("truth", shown[0]), ("prediction", shown[1])], [])
        written.append(folder / f"{str(sample['id']).replace('/', '_')}.png")
        with_bar(sheet, span, value).save(written[-1])
    return written
