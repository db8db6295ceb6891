"""SAM2's checkpoints: the published layout (`.pt`, also MedSAM2's) under the names that transformers gives.

The canonical layout, of which hashes are taken, is the state dict of transformers' `Sam2VideoModel`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmadapt.contracts import UserError

_RENAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
        (r"^sam_mask_decoder\.", "mask_decoder."),
        (r"^sam_prompt_encoder\.", "prompt_encoder."),
        (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
        (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
        (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
        (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
        (r"^no_mem_embed$", "no_memory_embedding"),
        (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
        (r"^no_obj_ptr$", "no_object_pointer"),
        (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
        (r"^obj_ptr_proj\.", "object_pointer_proj."),
        (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
        (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
        (r"\.gamma$", ".scale"),
        (r"\.norm(\d?)\.", r".layer_norm\1."),
        (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
        (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
        (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
        (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
        (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
        (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
        # MLPs of two layers, then those of three
        (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
        (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
        (r"((?:_mlps\.\d|_head|_pointer_proj))\.layers\.0\.", r"\1.proj_in."),
        (r"((?:_mlps\.\d|_head|_pointer_proj))\.layers\.1\.", r"\1.layers.0."),
        (r"((?:_mlps\.\d|_head|_pointer_proj))\.layers\.2\.", r"\1.proj_out."),
    )
)
_DOWNSAMPLER = re.compile(r"\.mask_downsampler\.encoder\.(\d+)\.")
_POINT = "prompt_encoder.point_embeddings.{}.weight"
_SHARED = "shared_image_embedding.positional_embedding"  # transformers holds the prompt encoder's matrix twice


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the layout of the sam2 package -> that of transformers; one in the latter stays as it is."""
    if not any(key.startswith("image_encoder.trunk.") for key in state):
        return dict(state)
    layers = {int(m[1]) for key in state if (m := _DOWNSAMPLER.search(key))}
    named = {_rename(key, last=max(layers, default=0)): tensor for key, tensor in state.items()}
    if len(points := [named.pop(_POINT.format(i)) for i in range(4) if _POINT.format(i) in named]) == 4:
        named["prompt_encoder.point_embed.weight"] = torch.cat(points)
    if (matrix := named.get("prompt_encoder.shared_embedding.positional_embedding")) is not None:
        named[_SHARED] = matrix
    return named


def _rename(key: str, *, last: int) -> str:
    """The new name; `last` is the number of the mask downsampler's last module."""
    if match := _DOWNSAMPLER.search(key):
        number = int(match[1])  # convolution, norm, activation, and so on; one more convolution at the end
        part = "conv" if number % 3 == 0 else "layer_norm"
        new = "final_conv" if number == last else f"layers.{number // 3}.{part}"
        key = key.replace(match[0], f".mask_downsampler.{new}.")
    for pattern, new in _RENAMES:
        key = pattern.sub(new, key)
    return key


def load_video_weights(net: nn.Module, path: Path, name: str) -> None:
    """Load a checkpoint of the sam2 package, of MedSAM2 or of transformers into a `Sam2VideoModel`.

    Raises:
        UserError: not a file of plain tensors, or not exactly the tensors of this size.
    """
    try:
        state = canonical(_tensors(path))
    except Exception as error:  # torch and safetensors raise many kinds
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"backbone.weights={path} is no checkpoint of tensors ({reason}); give SAM2's .pt") from error
    own = net.state_dict()
    if wrong := sorted(own.keys() ^ state.keys()):
        raise UserError(
            f"backbone.weights={path} does not fit {name}: {len(own.keys() - state.keys())} of {len(own)} tensors are "
            f"missing, {len(state.keys() - own.keys())} unknown, first {wrong[0]}; choose the backbone of its size"
        )
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise UserError(
                f"backbone.weights={path} does not fit {name}: {key} is {tuple(state[key].shape)}, needed "
                f"{tuple(tensor.shape)}; choose the backbone of its size"
            )
    net.load_state_dict(state)


def _tensors(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    read: Any = torch.load(path, map_location="cpu", weights_only=True)
    state: Mapping[str, Tensor] = read.get("model", read)
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError("it holds more than tensors")
    return state
