"""Names of the tensors of Depth Anything's head, versions 1 and 2, and how a DPT head is filled with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vfmadapt.contracts import UserError
from vfmadapt.heads._checkpoint import copy_strictly, read_checkpoint

if TYPE_CHECKING:
    from vfmadapt.heads.dpt import DPTHead

_HEAD, _NORM = "depth_head.", "pretrained.norm."
_UNUSED = "scratch.refinenet4.resConfUnit1."  # the coarsest map is joined with none, but its file has the layers
_OUTPUT = "scratch.output_conv"
_PARTS = {
    "mix.": "out_conv.",
    "join.": "resConfUnit1.",
    "refine.": "resConfUnit2.",
    "first.": "conv1.",
    "second.": "conv2.",
}


def load_depth_anything(head: "DPTHead", path: str | Path, *, output: bool = True) -> None:
    """Fill a DPT head from a checkpoint of Depth Anything (the release's layout, v1 or v2: .pth, .safetensors).

    Its trunk has one final norm, which becomes that of each block.

    Args:
        head: of the same sizes.
        path: the file that backbone.weights names, too.
        output: the last convolutions, from features to one value, too.

    Raises:
        UserError: no such file, not such a checkpoint, or a tensor that is missing, left over or of another shape.
    """
    state = read_checkpoint(path)
    found = {k.removeprefix(_HEAD): v for k, v in state.items() if k.startswith(_HEAD)}
    if not found:
        raise UserError(
            f"head.weights={path} is no checkpoint of Depth Anything: no tensor begins with {_HEAD!r}; give the "
            "release's file (depth_anything_v2_vitb.pth), not one of transformers"
        )
    found = {k: v for k, v in found.items() if not k.startswith(_UNUSED) and (output or not k.startswith(_OUTPUT))}
    norm = {k: v for k, v in state.items() if k.startswith(_NORM)}
    wanted = "the file of the trunk's size, with head.width and head.stages of that size"
    own = dict(_named(head))
    copy_strictly({k: v for k, v in own.items() if output or not k.startswith(_OUTPUT)}, found, path, wanted)
    for layer in head.norms:
        copy_strictly({f"{_NORM}{key}": tensor for key, tensor in layer.state_dict().items()}, norm, path, wanted)


def _named(head: "DPTHead") -> Iterator[tuple[str, Tensor]]:
    """Our tensors under their published names."""
    modules: dict[str, nn.Module] = {f"{_OUTPUT}1": head.shrink, f"{_OUTPUT}2": head.values}
    for i, (reassemble, project, fusion) in enumerate(zip(head.reassemble, head.project, head.fusion, strict=True)):
        modules |= {f"projects.{i}": reassemble.get_submodule("0"), f"resize_layers.{i}": reassemble.get_submodule("1")}
        modules |= {f"scratch.layer{i + 1}_rn": project, f"scratch.refinenet{i + 1}": fusion}
    for prefix, module in modules.items():
        for key, tensor in module.state_dict().items():
            for ours, theirs in _PARTS.items():
                key = key.replace(ours, theirs)
            yield f"{prefix}.{key}", tensor
