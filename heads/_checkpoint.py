"""Reading published checkpoints."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vfmadapt.contracts import UserError


def read_checkpoint(path: str | Path) -> Mapping[str, Tensor]:
    """Tensors by name of a file (.pth, .safetensors), unpickled without running code.

    Raises:
        UserError: no such file, or it cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"head.weights={path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt, or pickled code
        raise UserError(f"head.weights={path} cannot be read: {' '.join(str(error).split())[:160]}") from error
    return state


def copy_strictly(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path, wanted: str) -> None:
    """Copy `state` into the tensors `own`.

    Args:
        own: by the published names.
        state: as read.
        path: of the file, and
        wanted: what it should be, for the message.

    Raises:
        UserError: a tensor that is missing, left over or of another shape.
    """
    for key in sorted(own.keys() | state.keys()):
        if key not in state or key not in own:
            reason = f"{key} is {'missing' if key in own else 'left over'}"
        elif own[key].shape != state[key].shape:
            reason = f"{key} is {tuple(state[key].shape)}, needed {tuple(own[key].shape)}"
        else:
            continue
        raise UserError(f"head.weights={path} does not fit: {reason}; give {wanted}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])
