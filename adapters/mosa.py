"""MoSA: a bottleneck that trains as several sparse experts and runs as one.

Zhang et al., "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning", https://arxiv.org/abs/2312.02923.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import Adapter, BackboneSpec, OnOutput, ParallelMLP, Site, UserError


@dataclass(frozen=True)
class Style:
    """Where the bottlenecks act and what stands between their layers."""

    activation: type[nn.Module]
    outputs: tuple[str, ...]  # roles of the modules whose output they change; none: parallel to the MLP


STYLES = {
    "adaptformer": Style(nn.GELU, ()),
    "pfeiffer": Style(nn.ReLU, ("mlp",)),
    "houlsby": Style(nn.SiLU, ("proj", "mlp")),
}
SHARED = ("none", "down", "up")
PARALLEL = "parallel"
MOST_EXPERTS = 255
"""One byte names the owner of an entry."""


class MoSA(Adapter):
    """A block's output gains s U drop(GELU(D LN(h))), h the residual stream between attention and MLP.

    In training D and U are each drawn at random from `experts`, anew for every block and forward; in evaluation they
    are the experts' mean. Every entry of a matrix belongs to one expert: expert i is W_0 + M_i * Delta, W_0 the common
    start and M_i its entries. All others are read from W_0 itself, a buffer, so that neither gradients nor weight
    decay move them, in any training loop. Biases are not split. U starts at 0: nothing changes until it is trained.

    The experts of a matrix are one parameter, so that each takes part in every step, as distributed training needs;
    an expert that was not drawn has a gradient of 0, and AdamW's momentum and decay go on for it, where the original
    skips it. ViT-B with dim 64: 3,005,184 parameters in training with 4 experts and a shared D, 1,208,064 as deployed
    (`merged_state`).

    Not reproduced unless `published`, both faults of the official code: its merge "joint" takes each entry from its
    owner but then divides by the number of experts, W_0 included; its weight decay also moves the entries that an
    expert does not own. Never reproduced: its two forwards in evaluation.

    Args:
        spec: the backbone's; blocks may differ in width.
        dim: width of the bottleneck (published: 64; 16 on VTAB).
        experts: number of experts (published: 4 or 2); 1 is the plain adapter that is deployed.
        share: the projection that stays dense, "down" (published for most data), "up" or "none".
        style: "adaptformer" as above. The others change outputs y, y <- y + U drop(act(D LN(y))): "pfeiffer" the MLP's,
            with ReLU; "houlsby" attention's and the MLP's, with SiLU (the original: after each joined the stream).
        scale: the fixed s of the style "adaptformer" (published: 0.1); the others have none.
        dropout: of the narrow activations in training (published: 0.1).
        consistency: weight of the divergence between two forwards of each batch (published: 1); 0 for one forward.
        published: the original's faults, for comparison.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = "an activation stands between its two layers; `merged_state` folds the experts into one adapter"

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        dim: int = 64,
        experts: int = 4,
        share: Literal["none", "down", "up"] = "down",
        style: Literal["adaptformer", "pfeiffer", "houlsby"] = "adaptformer",
        scale: float = 0.1,
        dropout: float = 0.1,
        consistency: float = 1.0,
        published: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("share", share, SHARED)
        _check_choice("style", style, tuple(STYLES))
        _check_numbers(dim, experts, scale, dropout, consistency)
        self.consistency_weight = consistency
        self.forwards_per_step = 2 if consistency else 1
        outputs = STYLES[style].outputs
        build = partial(
            Branch,
            dim=dim,
            activation=STYLES[style].activation,
            scale=1.0 if outputs else scale,
            dropout=dropout,
            experts=(1 if share == "down" else experts, 1 if share == "up" else experts),
            published=published,
        )
        places = outputs or (PARALLEL,)
        self.branches = nn.ModuleDict({place: nn.ModuleList(build(c) for c in spec.dims) for place in places})

    def sites(self) -> Sequence[Site]:
        """One per block; two in the style "houlsby"."""
        found: list[Site] = []
        for place, layers in self.branches.items():
            for i, layer in enumerate(layers.children()):
                assert isinstance(layer, Branch)
                found.append(ParallelMLP(i, layer.forward) if place == PARALLEL else OnOutput(place, i, layer.after))
        return found

    def consistency(self, first: Tensor, second: Tensor) -> Tensor:
        """Symmetric KL divergence over the classes, mean over pixels; each direction's target is held fixed."""
        one, two = first.float().log_softmax(1), second.float().log_softmax(1)
        both = F.kl_div(one, two.detach(), reduction="none", log_target=True)
        both = both + F.kl_div(two, one.detach(), reduction="none", log_target=True)
        return self.consistency_weight * 0.5 * both.sum(1).mean()

    def merged_state(self) -> dict[str, Tensor]:
        """State of an adapter with experts=1 that computes what this one does in evaluation."""
        state: dict[str, Tensor] = self.state_dict()
        for name, layer in self.named_modules():
            if isinstance(layer, Experts):
                del state[f"{name}.owner"], state[f"{name}.start"]
                state[f"{name}.weight"], state[f"{name}.bias"] = (t.detach() for t in layer.merged())
        return state


class Branch(nn.Module):
    """s U drop(act(D LN(h))); `experts` of D and of U, of which 1 is a plain linear layer."""

    def __init__(
        self,
        channels: int,
        *,
        dim: int,
        activation: type[nn.Module],
        scale: float,
        dropout: float,
        experts: tuple[int, int],
        published: bool,
    ) -> None:
        super().__init__()
        down, up = nn.Linear(channels, dim), nn.Linear(dim, channels)
        for tensor in (down.bias, up.weight, up.bias):  # D's weight: Kaiming-uniform, as nn.Linear draws it
            nn.init.zeros_(tensor)
        self.norm = nn.LayerNorm(channels, eps=1e-6)  # the eps of the published ViT
        self.down = down if experts[0] == 1 else Experts(down, experts[0], published)
        self.up = up if experts[1] == 1 else Experts(up, experts[1], published)
        self.activation, self.dropout, self.scale = activation(), nn.Dropout(dropout), scale

    def forward(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        hidden: Tensor = self.up(self.dropout(self.activation(self.down(self.norm(h)))))
        return self.scale * hidden

    def after(self, y: Tensor) -> Tensor:
        """The same, added to its input."""
        return y + self(y)


class Experts(nn.Module):
    """A linear layer in several sparse versions: one at random in training, their mean in evaluation.

    Args:
        start: what all experts start from.
        experts: E, their number.
        published: read un-owned entries from the expert, where weight decay moves them, and merge by "joint".
    """

    owner: Tensor
    start: Tensor

    def __init__(self, start: nn.Linear, experts: int, published: bool) -> None:
        super().__init__()
        weight = start.weight.detach()
        self.published = published
        self.weight = nn.Parameter(weight.repeat(experts, 1, 1))
        self.bias = nn.Parameter(start.bias.detach().repeat(experts))  # E biases in a row: vectors are not decayed
        self.register_buffer("owner", owners(torch.rand_like(weight), experts))
        self.register_buffer("start", weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight, bias = self.expert(self.draw()) if self.training else self.merged()
        return F.linear(x, weight, bias)

    def draw(self) -> Tensor:
        """Number of an expert, a scalar on the layer's device: no wait for the GPU, no break of a compiled graph."""
        return torch.randint(len(self.weight), (), device=self.weight.device)

    def expert(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias of one expert; only its own entries get a gradient."""
        own = self.weight[number]
        others = own.detach() if self.published else self.start
        return torch.where(self.owner == number, own, others), self._biases()[number]

    def merged(self) -> tuple[Tensor, Tensor]:
        """Mean of the experts; each entry is W_0 in all of them but its owner."""
        owned, share = self.weight.gather(0, self.owner.long()[None])[0], 1 / len(self.weight)
        weight = owned * share if self.published else torch.lerp(self.start, owned, share)
        return weight, self._biases().mean(0)

    def _biases(self) -> Tensor:
        return self.bias.view(len(self.weight), -1)


def owners(scores: Tensor, experts: int) -> Tensor:
    """Number of the expert that each entry belongs to: the entries by rank of their score, in equal parts."""
    ranks = scores.flatten().argsort().argsort()
    return (ranks * experts // scores.numel()).view(scores.shape).to(torch.uint8)


def _check_choice(name: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise UserError(f"mosa: {name}={given!r} is not known; choose one of {', '.join(known)}")


def _check_numbers(dim: int, experts: int, scale: float, dropout: float, consistency: float) -> None:
    if dim < 1:
        raise UserError(f"mosa: dim={dim} must be at least 1 (published: 64)")
    if not 1 <= experts <= MOST_EXPERTS:
        raise UserError(f"mosa: experts={experts} must be from 1 to {MOST_EXPERTS} (published: 4 or 2)")
    if not scale > 0:
        raise UserError(f"mosa: scale={scale} must be above 0, or nothing is learnt (published: 0.1)")
    if not 0 <= dropout < 1:
        raise UserError(f"mosa: dropout={dropout} must be at least 0 and below 1 (published: 0.1)")
    if not consistency >= 0:
        raise UserError(f"mosa: consistency={consistency} must be at least 0 (published: 1), 0 for one forward a step")
