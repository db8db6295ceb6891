"""Several things of one image from one forward: a pyramid head for each task, on the features of its own streams."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, Head, UserError
from vfmadapt.heads.fpn import FPNHead

CHANNELS = {"depth": 1, "normals": 3, "edges": 1}
"""Values of each task but segmentation, which has one for each class."""


class MultiTaskHead(Head):
    """A `FPNHead` for each of `tasks`; the first task's answer is the model's, `outputs` gives all.

    Where the adapter has streams (adapter=mtlora), each task reads its own, else all read the same features.

    Args:
        spec: the backbone's.
        num_classes: K of segmentation.
        tasks: among "segmentation", "depth", "normals", "edges".
        layers: blocks to read, four evenly spaced by default.
        width: channels of each pyramid.

    Raises:
        UserError: an unknown task, none or one twice.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        num_classes: int,
        tasks: Sequence[str] = ("segmentation", "depth"),
        layers: Sequence[int] | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        channels = {"segmentation": num_classes, **CHANNELS}
        if not tasks or {*tasks} - {*channels} or len({*tasks}) < len(tasks):
            raise UserError(f"head.tasks={[*tasks]}: name one or more of {', '.join(channels)}, each once")
        self.tasks = tuple(tasks)
        self.heads = nn.ModuleDict(
            {task: FPNHead(spec, num_classes=channels[task], layers=layers, width=width) for task in tasks}
        )
        first = self.heads[self.tasks[0]]
        assert isinstance(first, FPNHead)
        self.layers = first.layers

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> the first task's values (B, K, H, W), class logits where that is segmentation."""
        first = self.tasks[0]
        values: Tensor = self.heads[first](features.of(first), size)
        return values

    def outputs(self, features: Features, size: tuple[int, int]) -> Mapping[str, Tensor]:
        """Features of `layers` -> {task: (B, its channels, H, W)}."""
        return {task: head(features.of(task), size) for task, head in self.heads.items()}
