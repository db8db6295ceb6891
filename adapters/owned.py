"""Trained copies of frozen tensors."""

from collections.abc import Sequence

from torch import nn

from vfmadapt.contracts import Adapter, Backbone, BackboneSpec, Owned, Site, UserError


class TrainedTensors(Adapter):
    """Trains a copy of the frozen tensors of one role (the first layer for new bands, say); identity until trained.

    The frozen originals stay as they are, so detaching restores the backbone exactly.

    Args:
        spec: the backbone's.
        role: which tensors, as `Backbone.tensors` names them.
    """

    def __init__(self, spec: BackboneSpec, *, role: str = "patch_embed") -> None:
        super().__init__()
        self.role = role
        # Keys are names in the state dict with "/" for ".", which torch does not allow in a parameter's name.
        self.copies = nn.ParameterDict()

    def bind(self, backbone: Backbone) -> None:
        """Copy the role's tensors; raises UserError if there are none."""
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone is a {type(backbone).__name__}, not an nn.Module")
        names = tuple(backbone.tensors(self.role))
        if not names:
            raise UserError(f"{backbone.spec.name} has no tensors of role {self.role!r}: nothing to train")
        for name in names:
            self.copies[name.replace(".", "/")] = nn.Parameter(backbone.get_parameter(name).detach().clone())

    def sites(self) -> Sequence[Site]:
        """One site that swaps all copies in."""
        return [Owned({key.replace("/", "."): copy for key, copy in self.copies.items()})]
