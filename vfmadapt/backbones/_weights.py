"""Weights of timm networks: where they are, how they are loaded, widened to other bands, and hashed."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vfmadapt.backbones._roles import Net
from vfmadapt.backbones._sam_weights import encoder_of
from vfmadapt.contracts import UserError

RGB = ("red", "green", "blue")
_TRUNK = "pretrained."
"""Beginning of the names of DINOv2's tensors in Depth Anything's checkpoints."""


def widen_patch_embed(net: Net, bands: Sequence[str]) -> None:
    """Give the first layer one filter per band, in place.

    Rule: a band named red, green or blue keeps the pretrained filter of that colour; any other band gets the mean of
    the three; then all are scaled by 3 / N, so that a picture with the same value in every band gives the response of
    a grey RGB picture. One unnamed band therefore gets the sum of the three filters. Three bands in the order red,
    green, blue stay as they are.
    """
    if tuple(bands) == RGB:
        return
    old = net.patch_embed.proj
    mean = old.weight.mean(1)
    filters = [old.weight[:, RGB.index(b)] if b in RGB else mean for b in bands]
    new = nn.Conv2d(len(bands), old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    with torch.no_grad():
        new.weight.copy_(torch.stack(filters, 1) * (3 / len(bands)))
        if new.bias is not None:
            new.bias.copy_(old.bias)
    net.patch_embed.proj = new.to(old.weight)


def weights_hash(net: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 bytes of a module's persistent state, in order of name.

    "meta" for a module without real weights.
    """
    if any(tensor.is_meta for tensor in net.state_dict().values()):
        return "meta"
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_weights(path: str | Path) -> Path:
    """A weights file, or the one weights file in a folder."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in {".safetensors", ".pth", ".pt", ".bin"})
        if len(found) != 1:
            raise UserError(f"backbone.weights={path}: the folder holds {len(found)} weights files; name one of them")
        return found[0]
    if not path.is_file():
        raise UserError(f"backbone.weights={path}: no such file or folder")
    return path


def load_weights(net: Net, path: Path, name: str) -> None:
    """Load a file into a timm model.

    It must hold every tensor that features come from. Others (a classifier, SAM's decoder) are left over, but of an
    image encoder of SAM or SAM2, and of the trunk of Depth Anything, all must be used.
    """
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), weights_only=True)
        encoder = encoder_of(state)
        trunk = {k.removeprefix(_TRUNK): v for k, v in state.items() if k.startswith(_TRUNK)}
        state = trunk or state
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        if encoder is None and convert:
            state = convert(state, net)
        result = net.load_state_dict(state if encoder is None else encoder, strict=False)
    except Exception as error:  # corrupt, pickled or of other shapes
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"backbone.weights={path} does not fit {name}: {reason}") from error
    missing = [key for key in result.missing_keys if encoder is None or not key.startswith("head.")]
    if missing:
        raise UserError(
            f"backbone.weights={path} does not fit {name}: {len(missing)} of {len(net.state_dict())} tensors are "
            f"missing, first {missing[0]}"
        )
    if (whole := encoder or trunk) and result.unexpected_keys:
        raise UserError(
            f"backbone.weights={path} does not fit {name}: {len(result.unexpected_keys)} of {len(whole)} tensors are "
            f"left over, first {result.unexpected_keys[0]}"
        )
