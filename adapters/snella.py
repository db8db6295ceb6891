"""SNELLA and SNELL: sparse updates of frozen linear layers from a kernel between low-rank points.

Shen et al., "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
https://arxiv.org/abs/2510.24037 (SNELLA); "Expanding Sparse Tuning for Low Memory Usage",
https://arxiv.org/abs/2411.01800 (SNELL).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vfmadapt.adapters._per_linear import PerLinear
from vfmadapt.contracts import Adapter, BackboneSpec, Merger, OnLinear, Site, UserError

MODES = ("snella", "snell")
KERNEL_SCALE = 0.1  # as published: a fixed factor on the difference of distances
MEMORY = 0.85  # as published, both moving averages of the scores
UPDATES = 100  # allocations in a training run: published is one an epoch, for 100 epochs
LEAST_SHARE = 1e-3  # of an even share, added to every score: a layer without entries would never get a gradient again


class Snella(Adapter):
    """y + drop_path(dropout(x) D) at linear layers, D (in, out) sparse, of high rank and made anew in every forward.

    D0[j, k] = 0.1 (|A_0j - B_0k| - |A_1j - B_1k|) with trained points A_g (in, rank / 2) and B_g (out, rank / 2). Mode
    snella mixes kernels: D0 <- D0 + alpha softmax(D0 / gamma, over the outputs) + beta. D = D0 |D0| where |D0| is
    above its quantile, else 0; the factor |D0| and the quantile count as constants in the gradient.

    Mode snell: every layer drops the share `sparsity` from the start. Mode snella starts dense and lets the layers
    compete: over training the entries of all layers together fall to the share 1 - sparsity on a cubic curve, and are
    shared out in proportion to each layer's mean sensitivity times uncertainty, moving averages some seven steps long.

    Not the identity when new, as published: with A and B at zero no gradient would pass, so they start as small random
    points (mean |D| 4e-7 for 768 x 768 in mode snell). rank (in + out) parameters a layer, and 3 more in mode snella:
    5,308,416 for ViT-B with rank 32 in mode snell. Costs the compute of a dense update, but not its memory: backward
    computes D once more instead of keeping it.

    Args:
        spec: the backbone's.
        mode: snella, or snell for neither mixed kernel nor allocation.
        roles: linear layers that are adapted, in every block.
        rank: length of both groups' points together, even (published: 8, 16 and 32).
        sparsity: share of the entries that are 0, at the end in mode snella (published: 0.3).
        dropout: share of the update's input that is dropped in training (published: 0.1).
        drop_path: share of the updates that are dropped in training, by image or window (published: 0.1).

    Raises:
        UserError: a setting out of its range, or a role that the backbone lacks.
    """

    unmergeable = ""

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        mode: str = "snella",
        roles: Sequence[str] = ("q", "k", "v", "proj", "fc1", "fc2"),
        rank: int = 32,
        sparsity: float = 0.3,
        dropout: float = 0.1,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise UserError(f"snella: mode={mode} is unknown; allowed are {', '.join(MODES)}")
        if rank < 2 or rank % 2:
            raise UserError(f"snella: rank={rank} must be even and at least 2 (published: 8, 16 and 32)")
        for name, share, default in (
            ("sparsity", sparsity, 0.3),
            ("dropout", dropout, 0.1),
            ("drop_path", drop_path, 0.1),
        ):
            if not 0 <= share < 1:
                raise UserError(f"snella: {name}={share} must be from 0 to below 1 (published: {default})")
        self.sparsity, self.competing = sparsity, mode == "snella"
        make = partial(KernelUpdate, rank=rank, mixed=self.competing, dropout=dropout, drop_path=drop_path)
        self.layers = PerLinear(spec, roles, make)
        if not self.competing:
            for _, _, layer in self.layers.each():
                layer.sparsity.fill_(sparsity)

    def sites(self) -> Sequence[Site]:
        """Every adapted layer."""
        return [OnLinear(role, index, layer.forward) for role, index, layer in self.layers.each()]

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Follow the layers' scores; a hundred times in training, share the entries out anew."""
        if not self.competing:
            return
        layers = [layer for _, _, layer in self.layers.each()]
        for layer in layers:
            layer.track()
        if step * UPDATES // total == (step - 1) * UPDATES // total:
            return
        kept = 1 - self.sparsity * (1 - (1 - step / total) ** 3)
        sizes = [layer.entries for layer in layers]
        given = share_out(kept * sum(sizes), [layer.score() for layer in layers], sizes)
        for layer, entries, size in zip(layers, given, sizes, strict=True):
            layer.sparsity.fill_(1 - entries / size)

    def training_state(self) -> Mapping[str, Tensor]:
        """The moving averages of the scores."""
        if not self.competing:
            return {}
        return {
            f"{index}.{role}.{name}": layer.get_buffer(name)
            for role, index, layer in self.layers.each()
            for name in ("sensitivity", "uncertainty")
        }

    def merge(self, into: Merger) -> None:
        """Add every layer's update to its weight."""
        for role, index, layer in self.layers.each():
            into.add(role, index, layer.delta().T)


class KernelUpdate(nn.Module):
    """x -> x D for one linear layer; dense until its `sparsity` is set.

    Args:
        width_in, width_out: of the frozen layer.
        rank: length of both groups' points together, even.
        mixed: add the softmax of the kernel.
        dropout, drop_path: see `Snella`.
    """

    sparsity: Tensor
    sensitivity: Tensor
    uncertainty: Tensor

    def __init__(
        self, width_in: int, width_out: int, *, rank: int, mixed: bool, dropout: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.entries, self.mixed, self.drop_path = width_in * width_out, mixed, drop_path
        self.dropout = nn.Dropout(dropout)
        self.inputs = nn.Parameter(torch.empty(2, width_in, rank // 2))
        self.outputs = nn.Parameter(torch.empty(2, width_out, rank // 2))
        for points in (self.inputs, self.outputs):
            nn.init.kaiming_uniform_(points, a=math.sqrt(5))
        self.register_buffer("sparsity", torch.zeros(()))
        if mixed:
            self.alpha = nn.Parameter(torch.ones(1))
            self.beta = nn.Parameter(torch.zeros(1))
            self.gamma = nn.Parameter(torch.ones(1))
            scored = torch.zeros(rank * (width_in + width_out))
            self.register_buffer("sensitivity", scored, persistent=False)
            self.register_buffer("uncertainty", scored.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the frozen layer's output: (..., in) -> (..., out)."""
        if not torch.is_grad_enabled():
            return self._branch(x)
        y: Tensor = checkpoint(self._branch, x, use_reentrant=False)
        return y

    def delta(self) -> Tensor:
        """The update D: (in, out)."""
        first, second = torch.cdist(self.inputs, self.outputs)
        kernel = KERNEL_SCALE * (first - second)
        if self.mixed:
            kernel = kernel + self.alpha * F.softmax(kernel / self.gamma, dim=-1) + self.beta
        size = kernel.detach().abs()
        # above the entry below the quantile or above the quantile between two entries: the same survive
        cut = torch.quantile(size.flatten(), self.sparsity, interpolation="lower")
        return kernel * torch.where(size > cut, size, 0)

    def track(self) -> None:
        """Follow the sensitivity |parameter x gradient| and how much it varies; nothing without a gradient."""
        if self.inputs.grad is None or self.outputs.grad is None:
            return
        pairs = ((self.inputs, self.inputs.grad), (self.outputs, self.outputs.grad))
        now = torch.cat([(points * grad).abs().flatten() for points, grad in pairs])
        self.sensitivity.lerp_(now, 1 - MEMORY)
        self.uncertainty.lerp_((now - self.sensitivity).abs(), 1 - MEMORY)

    def score(self) -> float:
        """What the layer competes with: mean of sensitivity times uncertainty."""
        return float((self.sensitivity * self.uncertainty).mean())

    def _branch(self, x: Tensor) -> Tensor:
        y = self.dropout(x) @ self.delta()
        if self.training and self.drop_path:
            kept = torch.rand(len(y), *(1,) * (y.ndim - 1), device=y.device) >= self.drop_path
            y = y * kept / (1 - self.drop_path)
        return y


def share_out(budget: float, scores: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Entries of each layer in proportion to its score, at most its size: what one cannot hold goes to the others."""
    least = LEAST_SHARE * (sum(scores) or 1.0) / len(scores)
    weights = {i: score + least for i, score in enumerate(scores)}
    given = [0.0] * len(scores)
    while weights:
        each = budget / sum(weights.values())
        full = [i for i, weight in weights.items() if each * weight >= sizes[i]]
        for i in full or weights:
            given[i] = min(each * weights[i], sizes[i])
        for i in full:
            budget -= sizes[i]
            del weights[i]
        if not full:
            break
    return given
