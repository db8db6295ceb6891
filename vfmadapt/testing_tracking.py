"""A tiny tracking model with weights by rule and a clip by rule: the same numbers wherever they are made."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfmadapt.build import build_tracker, entry
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.testing import BACKBONES
from vfmadapt.tracking.model import TrackingModel
from vfmadapt.tracking.prompts import Prompt

SPEC = DataSpec("tiny", ("grey",), (ClassSpec("object", (255, 0, 0)),), (0.0,), (1.0,))

TINY: dict[str, Any] = {
    "_target_": "vfmadapt.backbones.sam2_video.sam2_video",
    "name": "sam2_video",
    "pretrained": False,
    **BACKBONES["sam2_video"][1],
}

SCENES: dict[str, Sequence[Prompt]] = {
    "forward": (
        Prompt(0, 1, points=((20.0, 24.0),)),
        Prompt(0, 2, box=(8.0, 10.0, 40.0, 44.0)),
        Prompt(0, 3, mask=np.pad(np.ones((20, 16), bool), ((30, 14), (12, 36)))),
    ),
    "both_ways": (
        Prompt(5, 1, points=((40.0, 22.0), (4.0, 60.0)), labels=(1, 0), box=(30.0, 12.0, 52.0, 36.0)),
        Prompt(5, 2, points=((30.0, 30.0),)),
        Prompt(12, 2, mask=np.pad(np.ones((12, 24), bool), ((8, 44), (20, 20)))),
    ),
    "corrected": (
        Prompt(0, 1, points=((20.0, 24.0),)),
        Prompt(6, 1, points=((30.0, 22.0), (6.0, 50.0)), labels=(1, 0)),
    ),
}
"""Prompts of the golden file; of "corrected", the second comes when its frame was tracked."""


def tiny_tracker(adapter: str = "frozen", **backbone: Any) -> TrackingModel:
    """A model for 64 px with 1.5 M parameters by rule; its objects always count as present."""
    model = build_tracker({"backbone": TINY | backbone, "adapter": entry("adapter", adapter)}, SPEC)
    fill_by_rule(model.net)
    return TrackingModel(model.backbone, spec=model.spec).eval()  # again: it keeps what follows from the weights


@torch.no_grad()
def fill_by_rule(net: Any) -> None:
    """Fill SAM2's video model with numbers that follow from its tensors' names and shapes."""
    for name, tensor in net.state_dict().items():
        name = name.replace("shared_image_embedding", "prompt_encoder.shared_embedding")  # one matrix, held twice
        draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.shape)
        if "norm" in name or name.endswith(("bias", "scale")):
            values = 0.1 * draw + (0 if name.endswith("bias") else 1)
        elif name.endswith("weight") and not name.endswith(("embed.weight", "token.weight", "tokens.weight")):
            values = 0.9 * draw * np.prod(tensor.shape[1:]) ** -0.5
        else:
            values = 0.5 * draw
        tensor.copy_(torch.from_numpy(values))
    decoder = net.mask_decoder
    decoder.conv_s0.weight.mul_(2)  # masks follow the picture
    for mlp in decoder.output_hypernetworks_mlps:  # and have no level of their own
        last = mlp.proj_out
        last.weight.sub_(last.weight.mean(0))
        last.bias.zero_()
    decoder.pred_obj_score_head.proj_out.bias.fill_(10)


def moving_frames(count: int, size: tuple[int, int] = (64, 64)) -> Tensor:
    """A bright disc that crosses noisy frames, (T, 3, H, W) from 0 to 1, in steps of 1/255."""
    rng, (height, width) = np.random.default_rng(7), size
    y, x = np.mgrid[:height, :width]
    ground = rng.uniform(0.1, 0.4, (3, height, width))
    frames = []
    for t in range(count):
        at = width * (0.3 + 0.4 * t / max(count - 1, 1)), height * (0.4 + 0.1 * np.sin(t / 3))
        disc = ((x - at[0]) / width) ** 2 + ((y - at[1]) / height) ** 2 < 0.03
        frames.append(np.where(disc, [[[0.9]], [[0.7]], [[0.6]]], ground + rng.uniform(0, 0.1, ground.shape)))
    return torch.from_numpy(np.round(np.stack(frames) * 255) / 255).float()
