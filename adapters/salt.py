"""SALT, S-SAM and SVFit: the singular values of frozen linear layers, trained.

SALT: Elsayed et al., "SALT: Singular Value Adaptation with Low-Rank Transformation", https://arxiv.org/abs/2503.16055.
SVFit: Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
https://arxiv.org/abs/2409.05926. S-SAM: scale and shift of all singular values, as SALT's repository has it.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters._per_linear import PerLinear
from vfmadapt.contracts import Adapter, Backbone, BackboneSpec, Merger, OnWeight, Site, UserError

MODES = ("salt", "svfit", "ssam")


class Salt(Adapter):
    """Trains singular values of linear weights, and in mode salt a low-rank mix of the remaining ones.

    With W = U diag(s) V^T, k values in falling order and p = int(top k), mode by mode:

    - salt: s_i <- ReLU(a_i s_i + c_i) for the first p; the block of the others gets + X Y and its diagonal a ReLU.
    - ssam: s_i <- ReLU(a_i s_i + c_i) for all k.
    - svfit: s_i <- s_i + c_i for the first p. This trains the values themselves, counted from the frozen ones.

    The identity when new: a = 1, c = 0, Y = 0. Acts on the weight and not on activations: with more tokens in a batch
    than a layer is wide that is cheaper. 2 p + 2 rank (k - p) parameters a layer in mode salt, 2 k in ssam, p in svfit.

    U, s and V follow from the frozen weights, so no file holds them. As the mix depends on the singular vectors' signs,
    the largest entry of every left vector is made positive; the decomposition is computed in float64 on the CPU, so
    that the vectors of close values are the same on another machine too.

    Not reproduced from github.com/BioMedIA-MBZUAI/SALT: a ReLU on every entry of the block, which loses the negative
    ones off the diagonal (`published=True` brings it back); X and Y random at the start in its SAM file, no identity;
    singular vectors of whatever the weights are at the first forward; in its S-SAM layer, frozen singular values that
    move by 1 where only a share is trained.

    Args:
        spec: the backbone's.
        mode: salt, svfit or ssam.
        roles: linear layers that are adapted, in every block.
        top: share p / k of the singular values that are trained one by one (published for SALT: 0.1); not for ssam.
        rank: columns of X; mode salt only (published: 256).
        weight: of the auxiliary loss |a s + c - s| + |X Y| (ssam: |1 - a| + |c|), Frobenius norms summed over layers.
        published: rectify every entry as the released code does; acts in mode salt only.

    Raises:
        UserError: a setting out of its range, or a role that the backbone lacks.
    """

    unmergeable = ""

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        mode: str = "salt",
        roles: Sequence[str] = ("qkv", "proj", "fc1", "fc2"),
        top: float = 0.1,
        rank: int = 256,
        weight: float = 0.0,
        published: bool = False,
    ) -> None:
        super().__init__()
        _check(mode, top, rank, weight)
        self.mode, self.weight = mode, weight
        self.layers = PerLinear(spec, roles, partial(_make, mode, top, rank, published))

    def bind(self, backbone: Backbone) -> None:
        """Decompose the frozen weights; nothing to do where they are on the meta device."""
        for role, index, layer in self.layers.each():
            place = backbone.place(role, index)
            weight = place.module.get_parameter("weight").detach()
            if not weight.is_meta:
                layer.decompose(weight[slice(*place.rows)] if place.rows is not None else weight)

    def sites(self) -> Sequence[Site]:
        """The weight of every adapted layer."""
        return [OnWeight(role, index, layer.forward) for role, index, layer in self.layers.each()]

    def aux_loss(self) -> Tensor | None:
        """The weighted distance from the frozen singular values, or None where its weight is 0, as released."""
        if not self.weight:
            return None
        terms = [
            layer.ratio_penalty() if self.mode == "ssam" else layer.penalty() for _, _, layer in self.layers.each()
        ]
        return self.weight * torch.stack(terms).sum()

    def merge(self, into: Merger) -> None:
        """Add every layer's change to its weight."""
        for role, index, layer in self.layers.each():
            into.add(role, index, layer.delta())


class SingularUpdate(nn.Module):
    """W + U dSigma V^T for one weight (out, in), or a kernel (out, in, kh, kw) that is flattened to (out, in kh kw).

    Args:
        width_in, width_out: of the (flattened) weight.
        top: number p of singular values that are trained one by one.
        rank: columns of X; 0 leaves the values after the first p alone.
        scaled: train a factor a too, and rectify; else only the offset c.
        published: rectify every entry of the block of the remaining values.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def __init__(
        self, width_in: int, width_out: int, top: int, *, rank: int, scaled: bool = True, published: bool = False
    ) -> None:
        super().__init__()
        self.top, self.published = top, published
        used = min(width_in, width_out) if rank else top
        self.register_buffer("left", torch.zeros(width_out, used), persistent=False)
        self.register_buffer("values", torch.zeros(used), persistent=False)
        self.register_buffer("right", torch.zeros(used, width_in), persistent=False)
        self.shift = nn.Parameter(torch.zeros(top))
        self.scale = nn.Parameter(torch.ones(top)) if scaled else None
        self.mix_out = nn.Parameter(torch.empty(used - top, rank)) if rank else None
        self.mix_in = nn.Parameter(torch.zeros(rank, used - top)) if rank else None
        if self.mix_out is not None:
            nn.init.kaiming_uniform_(self.mix_out, a=math.sqrt(5))

    @torch.no_grad()
    def decompose(self, weight: Tensor) -> None:
        """Take the singular values and vectors of the frozen weight."""
        left, values, right = torch.linalg.svd(weight.flatten(1).cpu().double(), full_matrices=False)
        signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
        used = len(self.values)
        self.left.copy_((left * signs)[:, :used])
        self.values.copy_(values[:used])
        self.right.copy_((right * signs.T)[:used])

    def forward(self, weight: Tensor) -> Tensor:
        """Frozen weight -> adapted weight, both (out, in) or (out, in, kh, kw)."""
        return weight + self.delta().view_as(weight)

    def delta(self) -> Tensor:
        """U dSigma V^T: (out, in)."""
        columns = self.left[:, : self.top] * self._top_change()
        rest = self._rest_columns()
        if rest is not None:
            columns = torch.cat([columns, rest], dim=1)
        return columns @ self.right

    def penalty(self) -> Tensor:
        """|a s + c - s| before any ReLU, plus |X Y|."""
        values = self.values[: self.top]
        scaled = values if self.scale is None else self.scale * values
        distance = torch.linalg.vector_norm(scaled + self.shift - values)
        if self.mix_out is None or self.mix_in is None:
            return distance
        return distance + torch.linalg.matrix_norm(self.mix_out @ self.mix_in)

    def ratio_penalty(self) -> Tensor:
        """|1 - a| + |c|, as S-SAM has it."""
        assert self.scale is not None
        return torch.linalg.vector_norm(1 - self.scale) + torch.linalg.vector_norm(self.shift)

    def _top_change(self) -> Tensor:
        """Change of the first singular values: (top,)."""
        if self.scale is None:
            return self.shift
        values = self.values[: self.top]
        return F.relu(self.scale * values + self.shift) - values

    def _rest_columns(self) -> Tensor | None:
        """U dSigma of the remaining singular values: (out, k - top)."""
        if self.mix_out is None or self.mix_in is None:
            return None
        left, values = self.left[:, self.top :], self.values[self.top :]
        if self.published:
            frozen = torch.diag(values)
            return left @ (F.relu(frozen + self.mix_out @ self.mix_in) - frozen)
        diagonal = values + (self.mix_out * self.mix_in.T).sum(1)
        lift = F.relu(diagonal) - diagonal  # what its ReLU adds to the diagonal
        return left @ self.mix_out @ self.mix_in + left * lift


def _make(mode: str, top: float, rank: int, published: bool, width_in: int, width_out: int) -> SingularUpdate:
    share = 1.0 if mode == "ssam" else top
    return SingularUpdate(
        width_in,
        width_out,
        max(1, int(share * min(width_in, width_out))),
        rank=rank if mode == "salt" else 0,
        scaled=mode != "svfit",
        published=published,
    )


def _check(mode: str, top: float, rank: int, weight: float) -> None:
    if mode not in MODES:
        raise UserError(f"salt: mode={mode} is unknown; allowed are {', '.join(MODES)}")
    if not 0 < top <= 1 or (mode == "salt" and top == 1):
        raise UserError(
            f"salt: top={top} must be above 0 and below 1 (published: 0.1); mode=ssam trains all singular values"
        )
    if rank < 1:
        raise UserError(f"salt: rank={rank} must be at least 1 (published: 256); mode=svfit or ssam has no X and Y")
    if weight < 0:
        raise UserError(f"salt: weight={weight} must not be negative; 0 is as released")
