"""Names of the tensors of SAM's and SAM2's image encoders, from their published checkpoints to timm's."""

from collections.abc import Mapping

from torch import Tensor

_PREFIXES = (
    "image_encoder.trunk.",  # SAM2 and SAM2.1, sam2*_hiera_*.pt
    "vision_encoder.backbone.",  # the same in transformers' model.safetensors
    "image_encoder.",  # SAM, sam_vit_*.pth
    "vision_encoder.",  # the same in transformers' model.safetensors
)
_NAMES = {
    "neck.conv1.": "neck.0.",
    "neck.layer_norm1.": "neck.1.",
    "neck.conv2.": "neck.2.",
    "neck.layer_norm2.": "neck.3.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "mlp.lin1.": "mlp.fc1.",
    "mlp.lin2.": "mlp.fc2.",
    "mlp.layers.0.": "mlp.fc1.",
    "mlp.layers.1.": "mlp.fc2.",
    "mlp.proj_in.": "mlp.fc1.",
    "mlp.proj_out.": "mlp.fc2.",
    "patch_embed.projection.": "patch_embed.proj.",
}


def encoder_of(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The image encoder of a whole SAM or SAM2 under timm's names; None where `state` is no such checkpoint.

    Of SAM the neck belongs to it, of SAM2 only the trunk.
    """
    for prefix in _PREFIXES:
        if found := {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}:
            return {_timm_name(key): value for key, value in found.items()}
    return None


def _timm_name(key: str) -> str:
    if key.startswith("layers."):
        key = f"blocks.{key.removeprefix('layers.')}"
    for theirs, ours in _NAMES.items():
        key = key.replace(theirs, ours)
    return key
