"""SAM2's video model of any size, from a few numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vfmadapt.contracts import UserError

STAGES = 4
COARSEST = 32  # pixels per cell of the last stage
MEMORY_CHANNELS = 64  # of a memory: transformers' cross attention takes no other number


@dataclass(frozen=True)
class Trunk:
    """Hiera: `width` and `heads` of the first stage, doubled at each next one; `blocks` and window sides per stage.

    `global_blocks`: those that attend to the whole grid. `grid`: side of the learned position embedding's coarse part.
    """

    width: int
    heads: int
    blocks: Sequence[int]
    global_blocks: Sequence[int]
    windows: Sequence[int] = (8, 4, 14, 7)
    grid: int = 7

    def __post_init__(self) -> None:
        if len(self.blocks) != STAGES or len(self.windows) != STAGES:
            raise UserError(
                f"trunk: blocks={list(self.blocks)} windows={list(self.windows)}; give {STAGES} numbers each"
            )


def video_config(trunk: Trunk, *, size: int, width: int, memory_layers: int, hidden: int, decoder_hidden: int) -> Any:
    """Sam2VideoConfig for frames of `size` x `size` pixels.

    Args:
        trunk: the image encoder.
        size: a multiple of 32.
        width: channels of the decoder and of what it reads; above 64, or transformers cannot append object pointers.
        memory_layers: of the memory attention.
        hidden: of the memory attention's MLPs.
        decoder_hidden: of the mask decoder's MLPs.

    Raises:
        UserError: a size that the network cannot have.
    """
    from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VisionConfig

    if size % COARSEST or size < COARSEST * 2:
        raise UserError(f"backbone.size={size}: must be a multiple of {COARSEST}, at least {2 * COARSEST}")
    if width <= MEMORY_CHANNELS or width % MEMORY_CHANNELS:
        raise UserError(f"backbone.width={width}: must be a multiple of {MEMORY_CHANNELS} above {MEMORY_CHANNELS}")
    widths = [trunk.width << stage for stage in range(STAGES)]
    hiera = Sam2HieraDetConfig(
        hidden_size=trunk.width,
        num_attention_heads=trunk.heads,
        image_size=[size, size],
        blocks_per_stage=list(trunk.blocks),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[trunk.heads << stage for stage in range(STAGES)],
        window_size_per_stage=list(trunk.windows),
        global_attention_blocks=list(trunk.global_blocks),
        window_positional_embedding_background_size=[trunk.grid, trunk.grid],
    )
    vision = Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[size // stride] * 2 for stride in (4, 8, 16)],
        fpn_hidden_size=width,
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": width, "image_size": size},
        mask_decoder_config={"hidden_size": width, "mlp_dim": decoder_hidden},
        image_size=size,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=memory_layers,
        memory_attention_feed_forward_hidden_size=hidden,
        memory_attention_rope_feat_sizes=[size // 16, size // 16],
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=MEMORY_CHANNELS,
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=4 * width,
    )
