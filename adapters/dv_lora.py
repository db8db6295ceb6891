"""DV-LoRA and convolutional necks: EndoDAC's adaptation of a trunk to endoscopic pictures.

Cui et al., "EndoDAC: Efficient Adapting Foundation Model for Self-Supervised Depth Estimation from Any Endoscopic
Camera", https://arxiv.org/abs/2405.08672, §2.2.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters._layers import evenly_spaced, resolve_layers
from vfmadapt.adapters._per_linear import PerLinear
from vfmadapt.contracts import Adapter, AfterBlock, BackboneSpec, Merger, OnLinear, Site, UserError

NARROWING = 8  # of a neck, as published


class DVLoRA(Adapter):
    """Adds (alpha / rank) v * B (u * A x) to fc1 and fc2 of every block, and a convolutional neck after some blocks.

    In a first stage the matrices A (rank, in) and B (out, rank) are trained, in a second the vectors u (rank) and v
    (out) alone; the necks in both. The identity when new: B and the necks' last scales and shifts start at zero.
    ViT-B with four necks: 1,297,920 parameters in the first stage (A and B 368,640), 46,176 in u and v.

    Not reproduced from the release (BeileiCui/EndoDAC): its optimiser is made of what the first stage trains, so that
    the vectors never change. Here it has all of them, and what a stage leaves alone gets no gradient at all, which for
    torch's optimisers means that neither momentum nor weight decay moves it. On several processes it therefore needs
    trainer.strategy=ddp_find_unused_parameters_true.

    Args:
        spec: the backbone's; blocks may differ in width.
        rank: of the matrices.
        alpha: numerator of the scale.
        first_stage: share of all steps in which A and B are trained; 1 never trains the vectors.
        necks: blocks with a neck, negative ones counted from the last; by default four evenly spaced, [] for none.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = "its necks have convolutions and GELUs; with adapter.necks=[] it merges"

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        rank: int = 4,
        alpha: float = 4.0,
        first_stage: float = 0.52,
        necks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if rank < 1 or alpha <= 0 or not 0 < first_stage <= 1:
            raise UserError(
                f"dv_lora: rank={rank} alpha={alpha} first_stage={first_stage}: rank is at least 1, alpha above 0 "
                "(published: 4 and 4), first_stage above 0 and at most 1 (published: 0.52)"
            )
        self.first_stage = first_stage
        self.in_second = torch.tensor(False)  # no buffer: it stays on the CPU, where reading it waits for no GPU
        self.updates = PerLinear(spec, ("fc1", "fc2"), partial(VectorLowRank, rank=rank, scale=alpha / rank))
        if necks is None:
            necks = evenly_spaced(spec.depth)
        elif necks:
            necks = resolve_layers(necks, spec.depth, "dv_lora: necks")
        self.necks = nn.ModuleDict({str(i): Neck(spec.dims[i]) for i in necks})
        if not necks:
            self.unmergeable = ""

    def sites(self) -> Sequence[Site]:
        """fc1 and fc2 of every block, and the output of the blocks with a neck."""
        linear = [OnLinear(role, i, partial(self.delta, pair)) for role, i, pair in self.updates.each()]
        return [*linear, *(AfterBlock(int(i), neck.forward) for i, neck in self.necks.items())]

    def delta(self, pair: "VectorLowRank", x: Tensor) -> Tensor:
        """What a layer adds for its input (..., in); in training a gradient reaches only what the stage trains."""
        matrices: tuple[Tensor, Tensor] = (pair.down, pair.up)
        vectors: tuple[Tensor, Tensor] = (pair.inner, pair.outer)
        if self.training and self.in_second:
            matrices = (pair.down.detach(), pair.up.detach())
        elif self.training:
            vectors = (pair.inner.detach(), pair.outer.detach())
        return pair.scale * vectors[1] * F.linear(vectors[0] * F.linear(x, matrices[0]), matrices[1])

    def after_step(self, step: int, total: int) -> None:
        """Begin the second stage after its share of the steps."""
        self.in_second.fill_(step >= self.first_stage * total)

    def training_state(self) -> Mapping[str, Tensor]:
        """Which stage it is."""
        return {"in_second": self.in_second}

    def merge(self, into: Merger) -> None:
        """Add the updates to the weights."""
        for role, index, pair in self.updates.each():
            into.add(role, index, pair.delta_weight())


class VectorLowRank(nn.Module):
    """The low-rank pair of a layer with a vector behind each matrix, both drawn from U(-1, 1)."""

    def __init__(self, width_in: int, width_out: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, width_in))
        self.up = nn.Parameter(torch.zeros(width_out, rank))
        self.inner = nn.Parameter(torch.empty(rank).uniform_(-1, 1))
        self.outer = nn.Parameter(torch.empty(width_out).uniform_(-1, 1))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def delta_weight(self) -> Tensor:
        """What is added to the frozen layer's weight: (out, in)."""
        return self.scale * (self.outer[:, None] * self.up) @ (self.inner[:, None] * self.down)


class Neck(nn.Module):
    """x + n(x): a 1 x 1, a 3 x 3 and a 1 x 1 convolution, a LayerNorm over channels after each, GELU between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(channels // NARROWING, 1)
        self.down = nn.Linear(channels, width, bias=False)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.up = nn.Linear(width, channels, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in (width, width, channels))
        nn.init.zeros_(self.norms[2].weight)  # type: ignore[arg-type]  # mypy takes module attributes for modules
        nn.init.zeros_(self.norms[2].bias)  # type: ignore[arg-type]

    def forward(self, grid: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        return grid + self.correction(grid)

    def correction(self, grid: Tensor) -> Tensor:
        """What is added: (B, h, w, C)."""
        narrow = F.gelu(self.norms[0](self.down(grid)))
        seen = self.conv(narrow.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        wide: Tensor = self.norms[2](self.up(F.gelu(self.norms[1](seen))))
        return wide
