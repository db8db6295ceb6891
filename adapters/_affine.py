"""A bottleneck without an activation, so that the linear layer before or after it can take it in."""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Merger, UserError

READERS = {"attn": ("q", "k", "v"), "fc1": ("fc1",)}
"""Linear layers that read the input of a role, and nothing but it."""


class AffineBottleneck(nn.Module):
    """x -> s (B drop(A x + a) + b), zero when new: B and b start at zero, A is Xavier-uniform.

    With `groups`, part k of the bottleneck feeds part k of the output alone, which makes B block-diagonal.

    Args:
        width_in, width_out: channels of x and of the result.
        dim: width of the bottleneck; a multiple of `groups`, as is `width_out`.
        scale: s.
        dropout: share of the bottleneck's values that training drops.
        groups: parts of B.
    """

    def __init__(
        self, width_in: int, width_out: int, dim: int, *, scale: float, dropout: float, groups: int = 1
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width_in, dim)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Parameter(torch.zeros(groups, dim // groups, width_out // groups))
        self.up_bias = nn.Parameter(torch.zeros(width_out))
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); s acts on the narrow activations."""
        hidden = self.scale * self.dropout(self.down(x))
        return F.linear(hidden, self._dense_up(), self.scale * self.up_bias)

    def residual(self, x: Tensor) -> Tensor:
        """The same with a skip: x + s (B drop(A x + a) + b)."""
        return x + self(x)

    def folded(self) -> tuple[Tensor, Tensor]:
        """M (out, in) and c (out,) of what it does in evaluation mode: x -> M x + c."""
        up = self.scale * self._dense_up()
        return up @ self.down.weight, up @ self.down.bias + self.scale * self.up_bias

    def _dense_up(self) -> Tensor:
        """B (out, dim), zeros included: multiplying them is cheaper than a product per group and copying its result."""
        return torch.block_diag(*self.up).mT


def check_bottleneck(method: str, scale: float, dropout: float) -> None:
    """Raises UserError where a setting is out of its range."""
    if not 0 < scale < float("inf"):
        raise UserError(f"{method}: scale={scale} must be above 0; 1 adds the branch as it is")
    if not 0 <= dropout < 1:
        raise UserError(f"{method}: dropout={dropout} must be at least 0 and below 1; 0 drops nothing")


def input_widths(spec: BackboneSpec, role: str) -> list[int]:
    """Channels of the input of a role of `READERS`, block by block."""
    return [width for width, _ in spec.widths(READERS[role][0])]


def each(stacks: nn.ModuleDict) -> Iterator[tuple[str, int, AffineBottleneck]]:
    """(role, block, bottleneck) of a list of bottlenecks per role, one for each block."""
    for role, stack in stacks.items():
        for index, bottleneck in enumerate(cast(nn.ModuleList, stack)):
            yield role, index, cast(AffineBottleneck, bottleneck)


def fold_before(into: Merger, role: str, index: int, bottleneck: AffineBottleneck) -> None:
    """Let what reads the input of a role of `READERS` take in the bottleneck there: W (x + M x + c) + b."""
    matrix, constant = bottleneck.folded()
    for reader in READERS[role]:
        weight, _ = _linear(into, reader, index)
        into.add(reader, index, weight @ matrix, weight @ constant)


def fold_after(into: Merger, role: str, index: int, bottleneck: AffineBottleneck) -> None:
    """Let the linear layer of a role take in the bottleneck on its output: z + M z + c with z = W x + b."""
    matrix, constant = bottleneck.folded()
    weight, bias = _linear(into, role, index)
    into.add(role, index, matrix @ weight, constant if bias is None else matrix @ bias + constant)


def _linear(into: Merger, role: str, index: int) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out,) of a role, only its rows where it shares a layer."""
    place = into.place(role, index)
    rows = slice(*place.rows) if place.rows is not None else slice(None)
    weight, bias = cast(Tensor, place.module.weight), cast("Tensor | None", place.module.bias)
    return weight[rows], None if bias is None else bias[rows]
