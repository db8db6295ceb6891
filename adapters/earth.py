"""Earth-Adapter: a frequency-guided mixture of bottleneck adapters after the blocks of a frozen ViT.

Hu et al., "Earth-Adapter: Bridge the Geospatial Domain Gaps with Mixture of Frequency Adaptation", https://arxiv.org/abs/2504.06220.
The equations are in `vfmadapt.kernels.bottleneck_mixture`; prefix tokens (class, registers) pass untouched.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters._layers import resolve_layers
from vfmadapt.contracts import Adapter, AfterBlock, BackboneSpec, Site, UserError
from vfmadapt.kernels.bottleneck_mixture import bottleneck_mixture, bottleneck_mixture_direct

INITIAL_SCALE = 0.1  # as published: small, but the adapter is not the identity at the start


class Earth(Adapter):
    """A residual bottleneck after each of `layers`; in `fft_layers` three of them on grid, low and high frequencies.

    Not the identity when new: the published initialisation changes white noise by about 1.5 %. Only what runs is built:
    3,974,049 parameters for DINOv2-L with the published P2V settings (dim 64, fft_layers 0-2).

    Args:
        spec: the backbone's; layers may differ in width.
        dim: width d of each bottleneck (published: 16 to 64).
        cutoff_ratio: share of the shorter side's frequencies that the low-pass square keeps, above 0 and at most 1.
        layers: blocks with an adapter, negative ones counted from the last; all by default.
        fft_layers: those with the frequency mixture (published: the first or last 3 or 6); the last three by default.

    Raises:
        UserError: a setting out of its range.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        dim: int = 64,
        cutoff_ratio: float = 0.3,
        layers: Sequence[int] | None = None,
        fft_layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise UserError(f"earth: dim={dim} must be at least 1 (published: 16 to 64)")
        if not 0 < cutoff_ratio <= 1:
            raise UserError(f"earth: cutoff_ratio={cutoff_ratio} must be above 0, at most 1 (published: 0.2 and 0.3)")
        used = resolve_layers(layers, spec.depth, "earth: layers")
        mixed = used[-3:] if fft_layers is None else []
        if fft_layers:
            mixed = resolve_layers(fft_layers, spec.depth, "earth: fft_layers")
        if outside := sorted(set(mixed) - set(used)):
            raise UserError(f"earth: fft_layers {outside} are not among layers {used}; add them there or take them out")
        self.layers = nn.ModuleDict()
        for i in used:
            channels = spec.dims[i]
            layer = FrequencyMixture(channels, dim, cutoff_ratio) if i in mixed else Bottleneck(channels, dim)
            self.layers[str(i)] = layer

    def sites(self) -> Sequence[Site]:
        """One per layer, on the output of its block."""
        return [AfterBlock(int(i), layer.forward) for i, layer in self.layers.items()]


class Bottleneck(nn.Module):
    """x + s (U ReLU(D x + b) + c): one plain layer."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, dim)
        self.up = nn.Linear(dim, channels)
        self.scale = nn.Parameter(torch.tensor(INITIAL_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C); s acts on the narrow activations instead of all C channels."""
        hidden = self.scale * F.relu(self.down(x))
        return x + F.linear(hidden, self.up.weight, self.scale * self.up.bias)


class FrequencyMixture(nn.Module):
    """The frequency mixture of one layer; the tensors are laid out as `bottleneck_mixture` takes them."""

    def __init__(self, channels: int, dim: int, cutoff_ratio: float) -> None:
        super().__init__()
        self.cutoff_ratio = cutoff_ratio
        self.down = nn.Parameter(_uniform((3 * dim + 3, channels), channels))
        self.down_bias = nn.Parameter(_uniform((3 * dim + 3,), channels))
        self.up = nn.Parameter(_uniform((3 * dim, channels), dim))
        self.up_bias = nn.Parameter(_uniform((3, channels), dim))
        self.scale = nn.Parameter(torch.tensor(INITIAL_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        return bottleneck_mixture(
            x, self.down, self.down_bias, self.up, self.up_bias, self.scale, self.cutoff(x.shape[1], x.shape[2])
        )

    def cutoff(self, height: int, width: int) -> int:
        """The q for a grid of height x width cells: the shorter side sets it for both axes, as published."""
        return int(min(height, width) * self.cutoff_ratio // 2)


def benchmark_pair(
    adapter: Earth, batch: int, grid: tuple[int, int]
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]:
    """What tools/benchmark.py times: the fast layer, its direct form, and random inputs for both."""
    mixtures = [m for m in adapter.layers.values() if isinstance(m, FrequencyMixture)]
    if not mixtures:
        raise UserError(
            "earth: without fft_layers there is no frequency mixture to time; leave adapter.fft_layers at null"
        )
    layer = mixtures[0]
    x = torch.randn(batch, *grid, layer.down.shape[1], requires_grad=True)
    cutoff = layer.cutoff(*grid)
    fast = partial(bottleneck_mixture, cutoff=cutoff)
    direct = partial(bottleneck_mixture_direct, cutoff=cutoff)
    return fast, direct, (x, layer.down, layer.down_bias, layer.up, layer.up_bias, layer.scale)


def _uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Draw as nn.Linear does: Kaiming-uniform with a = sqrt(5) is uniform within ±1/sqrt(fan_in); so are biases."""
    return torch.empty(shape).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
