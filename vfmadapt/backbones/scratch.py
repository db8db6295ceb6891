"""Weights that masked autoencoders start from (He et al. 2022, https://arxiv.org/abs/2111.06377)."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Sine-cosine embedding of a grid's cells -> (height * width, dim); `dim` is a multiple of 4."""
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (rows, columns)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


@torch.no_grad()
def start_from_scratch(net: Any, *, seed: int) -> None:
    """Give a timm ViT Xavier weights and, where positions are learned, sine-cosine ones (0 for prefix tokens)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.xavier_uniform_(net.patch_embed.proj.weight.view(net.embed_dim, -1))
    if net.pos_embed is not None:
        height, width = net.patch_embed.grid_size
        net.pos_embed.zero_()
        net.pos_embed[0, -height * width :] = sincos_positions(height, width, net.embed_dim)
