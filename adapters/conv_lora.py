"""Conv-LoRA: LoRA on the fused query, key and value, with a convolution at one of several scales in its bottleneck.

Zhong et al., "Convolution Meets LoRA: Parameter Efficient Finetuning for Segment Anything Model",
https://arxiv.org/abs/2401.17868.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters._lora import LowRank
from vfmadapt.contracts import Adapter, BackboneSpec, OnLinear, Site, UserError

BALANCE_WEIGHT = 0.01  # of the balance loss, and ...
LEAST_NOISE = 0.01  # ... the least standard deviation of the gate's noise, both as published


class ConvLoRA(Adapter):
    """y + (alpha / rank) B (z + v) at every fused qkv, z = A x and v = g_i · down_i(GELU(conv_i(up_i(z)))).

    Expert i works at i times the grid's size (bicubic up and down). A gate on z's mean over the grid chooses one expert
    for each element of the batch: an image, or a window where attention is windowed. Its value is 1:
    g_i = 1 + p_i - stop(p_i), p the softmax over all experts, so that the task's loss reaches the gate, and only it.
    Training adds noise to the gate's logits and a loss that keeps the experts equally busy. B and the gate start at
    zero: nothing changes until it is trained. Prefix tokens, which are on no grid, get plain LoRA.

    SAM's ViT-H with rank 3 and 8 experts: 514,560 parameters. In evaluation nothing trains the noise's weights.

    Not reproduced: a gate that only the balance loss trains, its value being left out, and experts' outputs that pass
    through exp and log, an overflow from 88 on (both AutoGluon's, and here with `published`); square grids only
    (AutoGluon's `int(math.sqrt(L))`).

    Args:
        spec: the backbone's; blocks may differ in width.
        rank: channels of the bottleneck (published: 3).
        alpha: numerator of the scale (published: 32).
        experts: number of scales, at least 2 (published: 8).
        published: gate and combination as AutoGluon has them, for comparison.

    Raises:
        UserError: a setting out of its range, or a backbone without a fused qkv.
    """

    unmergeable = "a gate, convolutions and a GELU act in its bottleneck"

    def __init__(
        self, spec: BackboneSpec, *, rank: int = 3, alpha: float = 32.0, experts: int = 8, published: bool = False
    ) -> None:
        super().__init__()
        if rank < 1 or alpha <= 0:
            raise UserError(f"conv_lora: rank={rank} must be at least 1, alpha={alpha} above 0 (published: 3 and 32)")
        if experts < 2:
            raise UserError(f"conv_lora: experts={experts} must be at least 2 (published: 8); one needs no gate")
        self.layers = nn.ModuleList(
            ConvLowRank(LowRank(*widths, rank, scale=alpha / rank), experts, published=published)
            for widths in spec.widths("qkv")
        )

    def sites(self) -> Sequence[Site]:
        """One per block."""
        found: list[Site] = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, ConvLowRank)
            found.append(OnLinear("qkv", i, layer.forward, spatial=True, prefix_fn=layer.pair.forward, loss=True))
        return found


class ConvLowRank(nn.Module):
    """A low-rank pair with the gated convolutions between its two matrices."""

    def __init__(self, pair: LowRank, experts: int, *, published: bool) -> None:
        super().__init__()
        rank = pair.down.shape[0]
        self.pair, self.published = pair, published
        self.gate = Gate(rank, experts, published=published)
        self.experts = nn.ModuleList(Expert(rank, ratio + 1) for ratio in range(experts))

    def forward(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, in) -> what is added to the output (B, h, w, out), and the balance loss ()."""
        narrow = self.narrow(grid)
        gates, loss = self.gate(narrow.mean((2, 3)))
        narrow = narrow + self.mixture(narrow, gates)
        return F.linear(self.pair.scale * narrow.permute(0, 2, 3, 1), self.pair.up), loss

    def narrow(self, grid: Tensor) -> Tensor:
        """z: (B, h, w, in) -> (B, rank, h, w)."""
        return F.linear(grid, self.pair.down).permute(0, 3, 1, 2)

    def mixture(self, narrow: Tensor, gates: Tensor) -> Tensor:
        """v: (B, rank, h, w) and gates (B, M) -> (B, rank, h, w).

        Experts that nobody chose run on no rows: distributed training wants a gradient, be it zero, of every parameter.
        """
        mixed, every = torch.zeros_like(narrow), torch.arange(len(narrow), device=narrow.device)
        for expert, gate in zip(self.experts, gates.unbind(1), strict=True):
            # compilers cannot trace sizes that depend on values: they get every row, most of them times 0
            rows = every if torch.compiler.is_compiling() else gate.nonzero()[:, 0]
            found = expert(narrow[rows])
            if self.published:
                found = found.exp().log()
            mixed = mixed.index_add(0, rows, (gate[rows, None, None, None] * found).to(mixed.dtype))
        return mixed


class Gate(nn.Module):
    """Chooses one of M experts for each element of a batch, and says how unequally busy they are."""

    def __init__(self, rank: int, experts: int, *, published: bool) -> None:
        super().__init__()
        self.published = published
        self.weight = nn.Parameter(torch.zeros(rank, experts))
        self.noise = nn.Parameter(torch.zeros(rank, experts))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Means over the grid (B, rank) -> gates (B, M), one 1 to a row, and the balance loss ()."""
        drawn = torch.randn if self.training else torch.zeros
        noise = drawn(len(pooled), self.weight.shape[1], device=pooled.device)
        clean, spread, noisy = self._logits(pooled, noise)
        chosen = F.one_hot(noisy.argmax(1), noisy.shape[1]).float()
        load = _chances(clean, spread, noisy) if self.training else chosen
        loss = BALANCE_WEIGHT * (_unevenness(chosen) + _unevenness(load))
        if self.published:
            return chosen, loss
        share = self._logits(pooled.detach(), noise)[-1].softmax(1)
        return chosen * (1 + share - share.detach()), loss

    def _logits(self, pooled: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits without noise, its standard deviation, logits with it: (B, M) each, in full precision."""
        clean = (pooled @ self.weight).float()
        spread = F.softplus((pooled @ self.noise).float()) + LEAST_NOISE
        return clean, spread, clean + noise * spread


class Expert(nn.Module):
    """GELU of a 3 x 3 convolution on the grid at `ratio` times its size."""

    def __init__(self, rank: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(rank, rank, 3, padding=1)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]  # there is one

    def forward(self, x: Tensor) -> Tensor:
        """(B, rank, h, w) -> (B, rank, h, w)."""
        if self.ratio == 1:
            return F.gelu(self.conv(x))
        larger = F.interpolate(x, scale_factor=self.ratio, mode="bicubic")
        return F.interpolate(F.gelu(self.conv(larger)), size=x.shape[-2:], mode="bicubic")


def _chances(clean: Tensor, spread: Tensor, noisy: Tensor) -> Tensor:
    """Probability that each expert wins if its own noise is drawn again, the others' kept: (B, M)."""
    first, second = noisy.topk(2, 1).values.split(1, 1)
    rival = torch.where(noisy > second, second, first)
    return torch.special.ndtr((clean - rival) / spread)


def _unevenness(share: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' totals; (B, M) -> ()."""
    total = share.sum(0)
    return total.var() / (total.mean().square() + 1e-10)
