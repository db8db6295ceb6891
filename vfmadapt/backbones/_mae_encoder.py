"""A timm ViT that encodes only the visible patches of an image (masked-image modelling, He et al. 2022)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Sine-cosine embedding of a grid's cells -> (height * width, dim); `dim` is a multiple of 4."""
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (rows, columns)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


def patchify(image: Tensor, patch: int) -> Tensor:
    """Image (B, C, H, W) -> patches (B, N, C * patch * patch) in the order of a patch embedding's weight."""
    return F.unfold(image, patch, stride=patch).transpose(1, 2)


class MaskedViT(nn.Module):
    """A plain timm VisionTransformer with one class token and its forward over a subset of patches.

    Initialises `net`: Xavier weights, the position embedding sine-cosine on its own grid. For other grids it is resized
    as timm does at inference.
    """

    vit: Any  # timm's modules are not typed

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.vit = net
        self.patch_size, self.embed_dim = int(self.vit.patch_embed.patch_size[0]), int(self.vit.embed_dim)
        with torch.no_grad():
            self.vit.pos_embed.zero_()  # the class token's stays 0
            height, width = self.vit.patch_embed.grid_size
            self.vit.pos_embed[0, 1:] = sincos_positions(height, width, self.embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.xavier_uniform_(self.vit.patch_embed.proj.weight.view(self.embed_dim, -1))

    def forward(self, image: Tensor, keep: Tensor) -> Tensor:
        """Normalised image (B, 3, H, W), patch indices (B, n) -> normed tokens (B, 1 + n, C), the class token first."""
        from timm.layers import resample_abs_pos_embed

        vit = self.vit
        grid = [image.shape[2] // self.patch_size, image.shape[3] // self.patch_size]
        position = resample_abs_pos_embed(vit.pos_embed, new_size=grid, num_prefix_tokens=1)
        patches = patchify(image, self.patch_size)
        visible = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        tokens = F.linear(visible, vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias)
        tokens = tokens + position[0, 1:][keep]
        prefix = (vit.cls_token + position[:, :1]).expand(len(image), -1, -1)
        return vit.norm(vit.blocks(torch.cat([prefix, tokens], dim=1)))

    def weights(self) -> Mapping[str, Tensor]:
        """The ViT's state under timm's own names."""
        return self.vit.state_dict()
