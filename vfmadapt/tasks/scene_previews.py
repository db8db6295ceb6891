"""Pictures of the depth, and of several things at once, that a model makes of a scene."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vfmadapt.contracts import ValueSpec
from vfmadapt.depth_metrics import aligned
from vfmadapt.model import AdaptedModel
from vfmadapt.raster.colours import coloured, span_of, with_bar
from vfmadapt.raster.preview import VOID_COLOUR, overlay, panel, quicklook
from vfmadapt.scene_targets import edges, normals
from vfmadapt.tasks.scenes import collate

Picture = NDArray[np.uint8]


def write_depth_previews(model: AdaptedModel, samples: Any, folder: Path, *, indices: Sequence[int]) -> list[Path]:
    """Write one PNG per sample: frame, true depth, and the model's brought to its median, in one scale of colours.

    Returns:
        The files, named by the samples' ids.
    """
    written = []
    for sample, batch in _each(model, samples, indices):
        with torch.inference_mode():
            found = model(batch["image"])[0, 0].cpu()
        truth = sample["depth"]
        known = truth.isfinite() & (truth > 0)
        _, scale, _ = aligned(found[known].double(), truth[known].double(), "median")
        span = span_of(truth[known].numpy())
        pictures = [("frame", _picture(model, sample)), ("truth", _depth(truth, known, span))]
        sheet = panel([*pictures, ("prediction", _depth(found * scale, torch.ones_like(known), span))], [])
        written.append(_path(folder, sample))
        with_bar(sheet, span, ValueSpec("depth, brought to the true median")).save(written[-1])
    return written


def write_multitask_previews(
    outputs: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    model: AdaptedModel,
    samples: Any,
    folder: Path,
    *,
    indices: Sequence[int],
) -> list[Path]:
    """Write one PNG per sample: the image, and of each task truth and prediction side by side.

    Args:
        outputs: image (B, C, H, W) and valid (B, H, W) -> {task: values}.
        model: whose bands and classes these are.
        samples: with depth, mask and intrinsics.
        folder: where to.
        indices: of the samples.

    Returns:
        The files, named by the samples' ids.
    """
    written = []
    for sample, batch in _each(model, samples, indices):
        with torch.inference_mode():
            found = {task: values[0].cpu() for task, values in outputs(batch["image"], batch["valid"]).items()}
        picture = _picture(model, sample)
        pictures = [("image", picture)]
        for task, values in found.items():
            truth, guess = _SHOWN[task](model, sample, values, picture)
            pictures += [(f"{task}, true", truth), (f"{task}, found", guess)]
        written.append(_path(folder, sample))
        panel(pictures, model.spec.classes if "segmentation" in found else []).save(written[-1])
    return written


def _each(model: AdaptedModel, samples: Any, indices: Sequence[int]) -> Any:
    """Samples, and each as a batch of one on the model's device."""
    device = next(model.parameters()).device
    model.eval()
    for index in indices:
        sample = samples[index]
        yield sample, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate([sample]).items()}


def _path(folder: Path, sample: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{str(sample['id']).replace('/', '_')}.png"


def _picture(model: AdaptedModel, sample: Mapping[str, Any]) -> Picture:
    image = sample["image"].numpy()
    return quicklook(image, np.ones(image.shape[1:], dtype=bool), model.spec.bands)


def _depth(depth: Tensor, known: Tensor, span: tuple[float, float]) -> Picture:
    return coloured(depth.numpy(), known.numpy(), span, void=VOID_COLOUR)


def _labels(model: AdaptedModel, sample: Any, found: Tensor, picture: Picture) -> tuple[Picture, Picture]:
    classes = model.spec.classes
    return overlay(picture, sample["mask"].numpy(), classes), overlay(picture, found.argmax(0).numpy(), classes)


def _depths(_model: AdaptedModel, sample: Any, found: Tensor, _picture: Picture) -> tuple[Picture, Picture]:
    truth = sample["depth"]
    span, known = span_of(truth.numpy()), torch.ones_like(truth, dtype=torch.bool)
    return _depth(truth, known, span), _depth(found[0], known, span)


def _normals(_model: AdaptedModel, sample: Any, found: Tensor, _picture: Picture) -> tuple[Picture, Picture]:
    """The usual colours: x red, y green, z blue, from -1 to 1."""
    truth = normals(sample["depth"][None], sample["intrinsics"][None])[0]
    one, two = (((v + 1) * 127.5).byte().permute(1, 2, 0).numpy() for v in (truth, F.normalize(found, dim=0)))
    return one, two


def _edges(_model: AdaptedModel, sample: Any, found: Tensor, _picture: Picture) -> tuple[Picture, Picture]:
    pair = (edges(sample["depth"][None])[0].float(), found[0].sigmoid())
    one, two = ((255 * x).byte()[..., None].expand(-1, -1, 3).numpy() for x in pair)
    return one, two


_SHOWN = {"segmentation": _labels, "depth": _depths, "normals": _normals, "edges": _edges}
