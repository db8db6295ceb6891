"""What DINOv2 is made of: projection heads, centred or balanced targets, the spread of features, block masks.

Oquab et al., "DINOv2", https://arxiv.org/abs/2304.07193; Caron et al., "DINO", https://arxiv.org/abs/2104.14294;
Zhou et al., "iBOT", https://arxiv.org/abs/2111.07832. n: class tokens or patches, K prototypes.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Standardise(nn.Module):
    """Each channel of (n, C) with mean 0 and variance 1 over the n rows; a single row is left as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Without parameters or running figures: a batch alone says what is usual in it."""
        return F.batch_norm(x, None, None, training=True) if len(x) > 1 else x


class Projection(nn.Module):
    """An MLP of three layers, its output on the unit sphere, and its cosines with K prototypes: (n, C) -> (n, K).

    Args:
        width: C.
        hidden: width of both hidden layers.
        bottleneck: width of the output that is compared with the prototypes.
        prototypes: K.
        standardise: the hidden layers' channels over the batch (DINO's batch norm in the head, an option there).
    """

    def __init__(self, width: int, *, hidden: int, bottleneck: int, prototypes: int, standardise: bool = False) -> None:
        super().__init__()
        between = [Standardise] if standardise else []
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), *(norm() for norm in between), nn.GELU(),
            nn.Linear(hidden, hidden), *(norm() for norm in between), nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, C) -> cosines (n, K)."""
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class Centring(nn.Module):
    """Targets softmax((x - c) / t), c a running mean of x over all processes: no prototype wins all."""

    def __init__(self, prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(prototypes))

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """A teacher's cosines (n, K) -> targets (n, K); c is moved after they are made."""
        targets = F.softmax((logits - self.centre) / temperature, dim=-1)
        total = _summed(torch.cat([logits.sum(0), logits.new_tensor([len(logits)])]))
        if total[-1] > 0:
            self.centre.lerp_(total[:-1] / total[-1], 1 - self.momentum)
        return targets


class SinkhornKnopp(nn.Module):
    """Targets whose prototypes are used equally often over all processes, by alternate scaling of rows and columns."""

    def __init__(self, prototypes: int, *, iterations: int = 3) -> None:
        super().__init__()
        self.prototypes, self.iterations = prototypes, iterations

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """A teacher's cosines (n, K) -> targets (n, K)."""
        share = torch.exp(logits.float() / temperature)  # of cosines: at most e^(1 / 0.04), far from overflow
        for _ in range(self.iterations):
            used = _summed(share.sum(0))
            share = share / (used.clamp(min=1e-12) * self.prototypes)
            share = share / share.sum(1, keepdim=True)
        return share.to(logits.dtype)


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Targets (..., K) and a student's cosines (..., K) -> (...)."""
    return -(targets * F.log_softmax(logits / temperature, dim=-1)).sum(-1)


def koleo(features: Tensor) -> Tensor:
    """Minus the mean log distance of each of (n, C), n > 1, to its nearest neighbour on the unit sphere (KoLeo)."""
    unit = F.normalize(features.float(), dim=-1)
    with torch.no_grad():
        nearest = (unit @ unit.mT).fill_diagonal_(-2).argmax(1)
    return -torch.log(F.pairwise_distance(unit, unit[nearest]) + 1e-8).mean()


def entropy(targets: Tensor) -> Tensor:
    """Mean entropy of targets (n, K), natural logarithm; 0 where n is 0."""
    return torch.special.entr(targets).sum(-1).sum() / max(len(targets), 1)


def block_mask(height: int, width: int, count: int, draw: np.random.Generator) -> np.ndarray:
    """A mask bool (height, width) of at most `count` cells in random rectangles, each of 4 or more (BEiT's, iBOT's)."""
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(100):
        left = count - int(mask.sum())
        if left < 4:
            break
        area, aspect = draw.uniform(4, left), math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < high <= height and 0 < wide <= width):
            continue
        top, side = draw.integers(height - high + 1), draw.integers(width - wide + 1)
        block = mask[top : top + high, side : side + wide]
        if high * wide - int(block.sum()) <= left:
            block[:] = True
    return mask


def _summed(tensor: Tensor) -> Tensor:
    """The sum over the processes of a distributed run."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
