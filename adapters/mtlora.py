"""MTLoRA: low-rank updates that all tasks share, and features of its own for each task behind some blocks.

Agiza, Neseem, Reda, "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning",
https://arxiv.org/abs/2403.20320, §3.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from vfmadapt.adapters._layers import evenly_spaced, resolve_layers
from vfmadapt.adapters._lora import LowRank
from vfmadapt.adapters.owned import Copies
from vfmadapt.contracts import Adapter, Backbone, BackboneSpec, OnLinear, Site, Streams, UserError

SHARED, OWN = ("qkv", "proj", "fc1", "fc2"), ("proj", "fc1", "fc2")


class MTLoRA(Adapter):
    """Shared low-rank updates everywhere, and in the blocks `streams` a low-rank update of each task's own.

    A layer with streams gives, for the shared input x and a task's x_t, W x + b + s B A x on the shared stream and
    W x + b + s B_t A_t x_t on the task's ("matrix"); "matrixv2" adds s B A x to the tasks, too. Only the shared stream
    goes on to the next block, so one forward serves all tasks and the frozen layers run once. The release ends each
    stage of a Swin so; here it is the blocks that heads read. The norms are trained with them, as released; the patch
    embedding where backbone.train_patch_embed is true. The identity when new.

    Args:
        spec: the backbone's; blocks may differ in width.
        tasks: names of the tasks, as the head knows them.
        rank: of the shared updates.
        task_rank: of each task's.
        scale: s, used as it is, not over the rank.
        mode: "matrix" or "matrixv2".
        streams: blocks that give features for each task, negative ones counted from the last; by default four evenly
            spaced, as heads read.
        dropout: share of a layer's inputs that training drops before the updates.
        norms: train copies of the norms.

    Raises:
        UserError: a setting out of its range, no task or one twice, or a backbone without a fused qkv.
    """

    unmergeable = "every task has features of its own"

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        tasks: Sequence[str] = ("segmentation", "depth"),
        rank: int = 64,
        task_rank: int = 4,
        scale: float = 4.0,
        mode: Literal["matrix", "matrixv2"] = "matrix",
        streams: Sequence[int] | None = None,
        dropout: float = 0.05,
        norms: bool = True,
    ) -> None:
        super().__init__()
        if rank < 1 or task_rank < 1 or not 0 <= dropout < 1:
            raise UserError(
                f"mtlora: rank={rank} task_rank={task_rank} dropout={dropout}: the ranks are at least 1 (published: 64 "
                "and 4), dropout is 0 or more and below 1"
            )
        if not tasks or len({*tasks}) < len(tasks):
            raise UserError(f"mtlora: tasks={[*tasks]}: name one or more, each once")
        self.tasks, self.norms = tuple(tasks), norms
        parted = (
            evenly_spaced(spec.depth) if streams is None else resolve_layers(streams, spec.depth, "mtlora: streams")
        )
        self.shared, self.parted = nn.ModuleDict(), nn.ModuleDict()
        for i in range(spec.depth):
            roles = [role for role in SHARED if i not in parted or role not in OWN]
            pairs = {role: LowRank(*spec.widths(role)[i], rank, scale=scale) for role in roles}
            self.shared[str(i)] = nn.ModuleDict(pairs)
        for i in parted:
            layers = {
                role: TaskLowRank(*spec.widths(role)[i], len(tasks), rank, task_rank, scale, mode) for role in OWN
            }
            self.parted[str(i)] = nn.ModuleDict(layers)
        self.dropout = nn.Dropout(dropout)
        self.copies = Copies()

    def bind(self, backbone: Backbone) -> None:
        """Copy the norms."""
        if self.norms:
            self.copies.take(backbone, "norms")

    def sites(self) -> Sequence[Site]:
        """The copies, the shared updates, and the blocks with streams."""
        found: list[Site] = [self.copies.site()] if self.norms else []
        for i, pairs in self.shared.items():
            for role, pair in cast(nn.ModuleDict, pairs).items():
                found.append(OnLinear(role, int(i), partial(self.dropped, pair)))
        for i, layers in self.parted.items():
            fns = {role: partial(self.dropped, layer) for role, layer in cast(nn.ModuleDict, layers).items()}
            found.append(Streams(int(i), self.tasks, fns))
        return found

    def dropped(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What a layer adds for its input after dropout."""
        added: Tensor = layer(self.dropout(x))
        return added


class TaskLowRank(nn.Module):
    """What a layer adds on the shared stream and on each task's."""

    def __init__(
        self, width_in: int, width_out: int, tasks: int, rank: int, task_rank: int, scale: float, mode: str
    ) -> None:
        super().__init__()
        self.shared = LowRank(width_in, width_out, rank, scale=scale)
        self.own = nn.ModuleList(LowRank(width_in, width_out, task_rank, scale=scale) for _ in range(tasks))
        self.adds_shared = mode == "matrixv2"

    def forward(self, streams: Tensor) -> Tensor:
        """Inputs (1 + T, ..., in), the shared one first -> what each adds (1 + T, ..., out)."""
        shared = self.shared(streams[0])
        base = shared if self.adds_shared else torch.zeros_like(shared)
        return torch.stack([shared, *(base + own(x) for own, x in zip(self.own, streams[1:], strict=True))])
