"""SAM2's video model as a frozen backbone: its image encoder behind the contract, all the rest beside it.

SAM2: https://arxiv.org/abs/2408.00714; the network is transformers' `Sam2VideoModel`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmadapt.backbones._roles import Net
from vfmadapt.backbones._sam2_config import Trunk, video_config
from vfmadapt.backbones._sam2_weights import load_video_weights
from vfmadapt.backbones._weights import RGB, find_weights
from vfmadapt.backbones.timm_grid import GridBackbone
from vfmadapt.contracts import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pictures from 0 to 1
DECODER = "decoder"  # role of the mask decoder's tensors
TRUNK = "vision_encoder.backbone"
SAME_PLACE = 4.0  # five sixths of a random net's attention to a memory stay in the cell
SHIPPED = Path(__file__).parent / "weights"


def shipped(name: str) -> Path | None:
    """The weights that lie in the package for a model of this name, None where there are none."""
    path = SHIPPED / f"{name}.safetensors"
    return path if path.is_file() else None


def sam2_video(
    name: str,
    *,
    trunk: Mapping[str, Any],
    size: int,
    width: int = 256,
    memory_layers: int = 4,
    hidden: int = 2048,
    decoder_hidden: int = 2048,
    pretrained: bool | None = None,
    weights: str | None = None,
    seed: int = 0,
    bands: int | Sequence[str] = RGB,
    gradient_checkpointing: bool = False,
) -> "Sam2VideoBackbone":
    """Build SAM2's video model of any size, frozen.

    Args:
        name: what adapter files call it.
        trunk: settings of `Trunk`.
        size: side of the frames in pixels; a multiple of 32.
        width: channels of the decoder; see `video_config`, also for the next three.
        memory_layers: of the memory attention.
        hidden: of its MLPs.
        decoder_hidden: of the mask decoder's MLPs.
        pretrained: False asks for random weights; else those of the package, where it has any for `name`.
        weights: a file, or a folder that holds one: SAM2.1's or MedSAM2's .pt, or transformers' .safetensors.
        seed: of random weights.
        bands: red, green and blue; the model takes no others.
        gradient_checkpointing: recompute the trunk's blocks in the backward pass.

    Raises:
        UserError: impossible sizes, no weights asked for, weights that do not fit, other bands.
    """
    from transformers import Sam2VideoModel

    path = find_weights(weights) if weights is not None else None if pretrained is False else shipped(name)
    if path is None and pretrained is not False:
        raise UserError(
            f"backbone {name} has no weights: pass backbone.weights=FILE or FOLDER, "
            "or backbone.pretrained=false (random weights)"
        )
    if tuple(bands) != RGB if not isinstance(bands, int) else bands != len(RGB):
        raise UserError(
            f"backbone {name} takes red, green and blue (grey frames are shown to it as these), got {bands}"
        )
    config = video_config(
        Trunk(**trunk),
        size=size,
        width=width,
        memory_layers=memory_layers,
        hidden=hidden,
        decoder_hidden=decoder_hidden,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Sam2VideoModel(config)
        _spread(net)
    one, other = net.prompt_encoder.shared_embedding, net.shared_image_embedding  # SAM2 has one: points on its grid
    other.positional_embedding.copy_(one.positional_embedding)
    if path is not None:
        load_video_weights(net, path, name)
    return Sam2VideoBackbone(net, name=name, gradient_checkpointing=gradient_checkpointing)


@torch.no_grad()
def _spread(net: nn.Module) -> None:
    """Random weights from which a net this narrow learns to follow structures within minutes.

    Of variance 1 / inputs (transformers' 0.02 makes next to nothing of a frame), embeddings of variance 1 as SAM's.
    Memories hold more of the mask than of the picture, and are read where they were made: a mask that stays where it is
    comes out at once, and what moves is learnt from there.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weight = module.weight
            inputs = len(weight) if isinstance(module, nn.ConvTranspose2d) else weight[0].numel()
            weight.normal_(0, inputs**-0.5)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_()
    net.get_parameter("memory_encoder.feature_projection.weight").mul_(0.1)
    for layer in net.get_submodule("memory_attention.layers").children():
        for name in ("q_proj", "k_proj"):
            projection = layer.get_submodule(f"cross_attn_image.{name}")
            projection.get_parameter("weight").mul_(0.1)
            projection.get_parameter("bias").fill_(
                SAME_PLACE
            )  # a constant vector, turned by its place, fits best to itself


class Sam2VideoBackbone(GridBackbone):
    """The trunk of a `Sam2VideoModel` as a frozen backbone; name, hash and tensors are those of the whole model.

    Args:
        net: the model; the object itself is used and frozen.
        name: what adapter files call it.
        settings: further ones of `GridBackbone`.
    """

    def __init__(self, net: Net, *, name: str, **settings: Any) -> None:
        from vfmadapt.backbones._sam2_attention import HieraAttention

        for block in net.get_submodule(TRUNK).blocks:
            block.attn.__class__ = HieraAttention
        super().__init__(net, name=name, mean=MEAN, std=STD, licence="apache-2.0", trunk=TRUNK, **settings)

    def tensors(self, role: str) -> Iterable[str]:
        """As every backbone's, of the trunk; but "all" are those of the whole model, "decoder" of its mask decoder."""
        if role in ("all", DECODER):
            prefix = "net." if role == "all" else "net.mask_decoder."
            return [name for name, _ in self.named_parameters() if name.startswith(prefix)]
        return super().tensors(role)

    def _position_tile(self) -> int:
        return self.trunk.pos_embed_window.shape[-1]

    def _embed(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.trunk.patch_embed(image)
        return tokens + self.trunk._get_pos_embed(tokens.shape[1:3])
