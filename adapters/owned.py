"""Trained copies of frozen tensors."""

from collections.abc import Sequence

from torch import nn

from vfmadapt.contracts import Adapter, Backbone, BackboneSpec, Merger, Owned, Site, UserError


class Copies(nn.ParameterDict):
    """Trained copies of tensors, under their names in the state dict with "/" for ".", which torch refuses there."""

    def take(self, backbone: Backbone, role: str) -> None:
        """Copy the tensors of a role that are not copied yet; raises UserError if there are none of that role."""
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone is a {type(backbone).__name__}, not an nn.Module")
        names = tuple(backbone.tensors(role))
        if not names:
            raise UserError(f"{backbone.spec.name} has no tensors of role {role!r}: nothing to train")
        for name in names:
            if (key := name.replace(".", "/")) not in self:
                self[key] = nn.Parameter(backbone.get_parameter(name).detach().clone())

    def site(self) -> Owned:
        """The site that swaps all copies in."""
        return Owned({key.replace("/", "."): copy for key, copy in self.items()})

    def merge(self, into: Merger) -> None:
        """Put the copies in the place of the originals."""
        for name, copy in self.site().tensors.items():
            into.replace(name, copy)


class TrainedTensors(Adapter):
    """Trains a copy of the frozen tensors of one role (the first layer for new bands, say); identity until trained.

    The frozen originals stay as they are, so detaching restores the backbone exactly.

    Args:
        spec: the backbone's.
        role: which tensors, as `Backbone.tensors` names them.
    """

    unmergeable = ""

    def __init__(self, spec: BackboneSpec, *, role: str = "patch_embed") -> None:
        super().__init__()
        self.role = role
        self.copies = Copies()

    def bind(self, backbone: Backbone) -> None:
        """Copy the role's tensors; raises UserError if there are none."""
        self.copies.take(backbone, self.role)

    def sites(self) -> Sequence[Site]:
        """One site that swaps all copies in."""
        return [self.copies.site()]

    def merge(self, into: Merger) -> None:
        """The copies are the weights."""
        self.copies.merge(into)
