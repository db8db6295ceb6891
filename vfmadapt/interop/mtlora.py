"""MTLoRA's published numbers (https://arxiv.org/abs/2403.20320)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.adapters.mtlora import TaskLowRank
from vfmadapt.check_golden import Golden
from vfmadapt.interop.endodac import fill, gradients


def replay_mtlora_matrix(golden: Golden) -> dict[str, Tensor]:
    """A linear layer before the streams part: every task reads the shared input."""
    return _replay(golden, "matrix")


def replay_mtlora_matrix_streams(golden: Golden) -> dict[str, Tensor]:
    """A linear layer with an input for each task."""
    return _replay(golden, "matrix")


def replay_mtlora_matrixv2_streams(golden: Golden) -> dict[str, Tensor]:
    """The same with the shared update in the tasks' streams."""
    return _replay(golden, "matrixv2")


def _replay(golden: Golden, mode: str) -> dict[str, Tensor]:
    settings, params, inputs = golden.settings, golden.params, golden.inputs
    tasks, ranks = settings["tasks"], settings["r"]
    widths = settings["in_features"], settings["out_features"]
    layer = TaskLowRank(*widths, len(tasks), ranks["shared"], 1, settings["shared_scale"], mode)
    ours = {"lora_shared_A": layer.shared.down, "lora_shared_B": layer.shared.up}
    for i, task in enumerate(tasks):  # whose ranks and scales differ here
        own = TaskLowRank(*widths, 1, 1, ranks[task], settings["task_scale"][task], mode).own[0]
        layer.own[i] = own
        ours |= {f"lora_tasks_{name}.{task}": own.get_parameter(key) for name, key in (("A", "down"), ("B", "up"))}
    fill(ours, params)
    x = inputs["x"]
    streams = torch.stack([x, *(inputs.get(f"x_{task}", x) for task in tasks)])
    y = F.linear(x, params["linear.weight"], params["linear.bias"]) + layer(streams)
    golden.backward(y)
    return {"output/y": y, **gradients(inputs, ours, params)}
