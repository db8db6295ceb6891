"""The control: the frozen backbone as it is."""

from vfmadapt.contracts import Adapter, BackboneSpec


class Frozen(Adapter):
    """No parameter and no site, so only the head learns; what every adapter is compared with."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()

    @property
    def trains_nothing(self) -> bool:
        """True: the host accepts it although it has nothing to train."""
        return True
