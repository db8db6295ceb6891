"""The sam2 package's video predictor with the weights and the size of a model of ours, to compare with.

sam2 1.1.0 (https://github.com/facebookresearch/sam2) belongs into an environment of its own: importing it starts Hydra,
and it brings a top-level package `training`. Install it beside this project with
`SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2==1.1.0`.
"""

from importlib import resources
from typing import Any

import torch
from torch import Tensor

from vfmadapt.backbones._sam2_weights import canonical
from vfmadapt.errors import UserError
from vfmadapt.tracking.model import TrackingModel


def predictor(model: TrackingModel) -> Any:
    """sam2's `SAM2VideoPredictor` with the frozen weights of a model; as built by sam2, but that no holes are filled.

    Raises:
        UserError: there is no sam2 in this Python.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    try:
        root = resources.files("sam2")
    except ModuleNotFoundError as error:
        raise UserError(
            "there is no sam2 in this Python; in an environment of its own, type: SAM2_BUILD_CUDA=0 pip install "
            "--no-build-isolation sam2==1.1.0"
        ) from error
    cfg: Any = OmegaConf.create((root / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml").read_text()).model
    cfg._target_ = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    cfg.binarize_mask_from_pts_for_mem_enc = True
    cfg.sam_mask_decoder_extra_args = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    _resize(cfg, model.net.config)
    made = instantiate(cfg, _recursive_=True)
    _fill(made, model.net.state_dict())
    return made.to(model.mean.device).eval()


def start(made: Any, frames: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """The predictor's state for normalised frames (T, 3, S, S) of a video of `size` (H, W)."""
    from unittest.mock import patch

    with patch("sam2.sam2_video_predictor.load_video_frames", return_value=(frames, *size)):
        state: dict[str, Any] = made.init_state("")
    return state


def _resize(cfg: Any, ours: Any) -> None:
    """Write the sizes of transformers' configuration into that of sam2."""
    hiera, width, cells = ours.vision_config.backbone_config, ours.memory_attention_hidden_size, ours.image_size // 16
    cfg.image_size = ours.image_size
    trunk, neck = cfg.image_encoder.trunk, cfg.image_encoder.neck
    trunk.embed_dim, trunk.num_heads = hiera.hidden_size, hiera.num_attention_heads_per_stage[0]
    trunk.stages, trunk.global_att_blocks = hiera.blocks_per_stage, hiera.global_attention_blocks
    trunk.window_spec = hiera.window_size_per_stage
    trunk.window_pos_embed_bkg_spatial_size = hiera.window_positional_embedding_background_size
    neck.d_model = neck.position_encoding.num_pos_feats = width
    neck.backbone_channel_list = ours.vision_config.backbone_channel_list
    attention, encoder = cfg.memory_attention, cfg.memory_encoder
    attention.d_model = attention.layer.d_model = width
    attention.num_layers = ours.memory_attention_num_layers
    attention.layer.dim_feedforward = ours.memory_attention_feed_forward_hidden_size
    for part in (attention.layer.self_attention, attention.layer.cross_attention):
        part.embedding_dim, part.feat_sizes = width, [cells, cells]
    encoder.in_dim = encoder.mask_downsampler.embed_dim = encoder.fuser.layer.dim = width


@torch.no_grad()
def _fill(made: Any, state: dict[str, Tensor]) -> None:
    """Copy tensors in transformers' layout into sam2's model, in place."""
    theirs = made.state_dict()
    for name, tensor in canonical(theirs).items():  # but for the points, the tensors of sam2 themselves
        tensor.copy_(state[name])
    for label, point in enumerate(state["prompt_encoder.point_embed.weight"]):
        theirs[f"sam_prompt_encoder.point_embeddings.{label}.weight"].copy_(point[None])
