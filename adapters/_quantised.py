"""Bottlenecks of N-bit linear layers and their packed files, shared by Bi-AdaptFormer and Bi-LoRA.

The equations are in `vfmadapt.kernels.bit_linear`. A packed file is, for each layer in the order of the blocks (down,
then up), its packed codes, then μ and σ as little-endian float32: no header, so it is read with the same settings.
"""

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import Adapter, UserError
from vfmadapt.kernels.bit_linear import bit_linear, codebook, fake_quantise, packed_size, quantise
from vfmadapt.kernels.bit_linear import pack as pack
from vfmadapt.kernels.bit_linear import unpack as unpack

PLAIN = 32
"""Bits of a layer that is not quantised."""

STATISTICS = struct.Struct("<ff")  # μ and σ


def check_settings(method: str, *, dim: int, bits: int, scale: float, dropout: float) -> None:
    """Raises UserError where a setting is out of its range."""
    if dim < 1:
        raise UserError(f"{method}: dim={dim} must be at least 1 (published: 1 and 32)")
    if bits not in (1, 2, 4, 8, PLAIN):
        raise UserError(f"{method}: bits={bits} must be 1, 2, 4 or 8, or {PLAIN} for plain weights")
    if not math.isfinite(scale) or scale == 0:
        raise UserError(f"{method}: scale={scale} must be a number other than 0 (published: 0.01 to 100 by task)")
    if not 0 <= dropout < 1:
        raise UserError(f"{method}: dropout={dropout} must be at least 0 and below 1 (published: 0.1)")


class QuantisedLinear(nn.Module):
    """y = x W_qᵀ with N-bit codes: made from the trained weight in each forward, or fixed once `fix` was called."""

    def __init__(self, in_features: int, out_features: int, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear
        self.levels: Tensor
        self.register_buffer("levels", torch.tensor(codebook(bits)), persistent=False)
        self.packed: Tensor
        self.mean: Tensor
        self.deviation: Tensor
        for name in ("packed", "mean", "deviation"):
            self.register_buffer(name, None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.weight is None:
            return bit_linear(x, self.packed, self.mean, self.deviation, self.levels, self.out_features)
        return F.linear(x, fake_quantise(self.weight, self.levels))

    @torch.no_grad()
    def packed_state(self) -> tuple[Tensor, Tensor, Tensor]:
        """The packed codes (uint8), μ () and σ ()."""
        if self.weight is None:
            return self.packed, self.mean, self.deviation
        codes, mean, deviation = quantise(self.weight, self.levels)
        return pack(codes, self.bits), mean, deviation

    def fix(self, packed: Tensor, mean: Tensor, deviation: Tensor) -> None:
        """Take packed codes in place of the trained weight, which they do not determine: nothing is left to train."""
        self.packed, self.mean, self.deviation = (t.to(self.levels.device) for t in (packed, mean, deviation))
        self.weight = None

    @property
    def codes_size(self) -> int:
        """Bytes of the packed codes."""
        return packed_size(self.in_features * self.out_features, self.bits)


class Bottleneck(nn.Module):
    """s · up(dropout(activation(down(x)))), without biases."""

    def __init__(
        self, widths: tuple[int, int], *, dim: int, bits: int, scale: float, dropout: float, activation: nn.Module
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = _linear(widths[0], dim, bits)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.up = _linear(dim, widths[1], bits)
        assert self.up.weight is not None
        if bits == PLAIN:
            nn.init.zeros_(self.up.weight)
        else:  # as published: zeros would have no deviation to divide by
            nn.init.trunc_normal_(self.up.weight, std=1e-3, a=-2e-3, b=2e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C'); s acts on the narrow activations."""
        hidden: Tensor = self.dropout(self.activation(self.down(x)))
        return self.up(self.scale * hidden)


def _linear(in_features: int, out_features: int, bits: int) -> "nn.Linear | QuantisedLinear":
    if bits == PLAIN:
        return nn.Linear(in_features, out_features, bias=False)
    return QuantisedLinear(in_features, out_features, bits)


class QuantisedAdapter(Adapter):
    """An adapter of `Bottleneck`s that can be kept as packed codes."""

    def quantised_linears(self) -> list[QuantisedLinear]:
        """Its N-bit layers in the order of a packed file; raises UserError where the weights are plain."""
        found = [m for m in self.modules() if isinstance(m, QuantisedLinear)]
        if not found:
            raise UserError(f"bits={PLAIN} has no codes to pack; keep the adapter file, or train with fewer bits")
        return found

    @property
    def trains_nothing(self) -> bool:
        """Whether packed codes have taken the place of all weights."""
        return next(self.parameters(), None) is None

    def packed_bytes(self) -> int:
        """Size of the packed file."""
        return sum(linear.codes_size + STATISTICS.size for linear in self.quantised_linears())

    def export_packed(self, path: str | Path) -> None:
        """Write the packed file; it appears complete or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_bytes(dump(self.quantised_linears()))
        temporary.replace(path)

    def load_packed(self, path: str | Path) -> None:
        """Take the codes of a packed file: the adapter acts as the exported one, and cannot be trained any more.

        Raises:
            UserError: no such file, or one of another method, other sizes or other bits.
        """
        if not Path(path).is_file():
            raise UserError(f"{path}: no such packed file; write one with export_packed")
        load(self.quantised_linears(), Path(path).read_bytes())


def dump(linears: Sequence[QuantisedLinear]) -> bytes:
    """The bytes of a packed file."""
    parts = []
    for linear in linears:
        packed, mean, deviation = linear.packed_state()
        parts += [bytes(packed.tolist()), STATISTICS.pack(float(mean), float(deviation))]
    return b"".join(parts)


def load(linears: Sequence[QuantisedLinear], data: bytes) -> None:
    """Fix layers to the bytes of a packed file; raises UserError, with nothing changed, where they do not fit."""
    size = sum(linear.codes_size + STATISTICS.size for linear in linears)
    if len(data) != size:
        raise UserError(
            f"packed weights: {len(data)} bytes, this adapter takes {size}; give it the file's dim and bits"
        )
    states, first = [], 0
    for linear in linears:
        last = first + linear.codes_size
        mean, deviation = STATISTICS.unpack_from(data, last)
        if not (0 < deviation < 1e3 and abs(mean) < 1e3):  # bytes taken for floats by mistake are rarely so near to 1
            raise UserError(
                f"packed weights: mean {mean:.3g} and deviation {deviation:.3g} at byte {last} are none of a trained "
                "layer: another layout, or another method of the same size"
            )
        codes = torch.frombuffer(bytearray(data[first:last]), dtype=torch.uint8)
        states.append((codes, torch.tensor(mean), torch.tensor(deviation)))
        first = last + STATISTICS.size
    for linear, state in zip(linears, states, strict=True):
        linear.fix(*state)
