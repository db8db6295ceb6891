"""BitFit: only the biases are trained.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
https://arxiv.org/abs/2106.10199.
"""

from vfmadapt.adapters.owned import TrainedTensors
from vfmadapt.contracts import BackboneSpec


class BitFit(TrainedTensors):
    """Trains a copy of every bias that a forward reads: linear layers, norms, patch embedding; identity until trained.

    102,912 parameters for ViT-B/16 with its final norm. The bias of the keys cannot matter, as the softmax over them
    cancels it; where it is a tensor of its own, its gradient is rounding.

    Args:
        spec: the backbone's.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__(spec, role="biases")
