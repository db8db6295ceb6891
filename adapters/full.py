"""The control at the other end from `frozen`: full fine-tuning."""

from vfmadapt.adapters.owned import TrainedTensors
from vfmadapt.contracts import BackboneSpec


class Full(TrainedTensors):
    """Trains a copy of every tensor that a forward reads, position embeddings and class token too; identity until then.

    Args:
        spec: the backbone's.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__(spec, role="all")
