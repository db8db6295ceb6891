"""The whole model: normalisation, adapted backbone, head."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vfmadapt._state import load_state
from vfmadapt.contracts import DataSpec, Features, Head, Instances, ValueSpec
from vfmadapt.errors import UserError
from vfmadapt.feature_memory import FeatureMemory
from vfmadapt.host import AdaptedBackbone


def normalise(image: Tensor, valid: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
    """Image (B, C, H, W) in sensor units -> (image - mean) / std, the only place where images are normalised.

    Pixels that are not valid (`valid`: bool (B, H, W)) or not finite become 0, the mean. `mean` and `std`: (C, 1, 1).
    """
    usable = torch.isfinite(image)
    if valid is not None:
        usable = usable & valid[:, None]
    return ((image - mean) / std).where(usable, 0)


def in_units(found: Tensor, values: Sequence[ValueSpec]) -> Tensor:
    """What a head gives (B, K, H, W) -> values in their units; logits, of which there are no `values`, as they are."""
    if all((v.mean, v.std, v.log) == (0, 1, False) for v in values):
        return found
    parts = [v.mean + v.std * part.float() for v, part in zip(values, found.unbind(1), strict=True)]
    return torch.stack([part.exp() if v.log else part for v, part in zip(values, parts, strict=True)], 1)


class AdaptedModel(nn.Module):
    """Image in sensor units -> logits, or values where the data has those.

    Args:
        backbone: the frozen backbone with its adapters.
        head: maps its features to logits.
        spec: bands, classes and the per-band mean and std of the data that the model is for.
    """

    def __init__(self, backbone: AdaptedBackbone, head: Head, *, spec: DataSpec) -> None:
        super().__init__()
        if backbone.spec.bands != len(spec.bands):
            raise UserError(
                f"{backbone.spec.name} was built for {backbone.spec.bands} bands, "
                f"the data has {len(spec.bands)}: {', '.join(spec.bands)}"
            )
        self.backbone = backbone
        self.head = head
        backbone.use(*backbone.serve(head))
        self.spec = spec
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1), persistent=False)
        self._features: Callable[[Tensor], Features] = self._computed

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits, or values in their units, (B, K, H, W), of images (B, C, H, W) in sensor units.

        Pixels that are not valid (`valid`: bool (B, H, W)) or not finite count as the mean, so that they never spread.
        """
        found: Tensor = self.head(self.features(image, valid), (image.shape[-2], image.shape[-1]))
        return in_units(found, self.spec.values)

    @torch.no_grad()
    def instances(self, image: Tensor, valid: Tensor | None = None) -> list[Instances]:
        """The objects of each image of (B, C, H, W) in sensor units; UserError where the head tells none apart."""
        return self.head.instances(self.features(image, valid), (image.shape[-2], image.shape[-1]))

    def features(self, image: Tensor, valid: Tensor | None = None) -> Features:
        """What the head gets of images (B, C, H, W) in sensor units; raises UserError for other bands."""
        if image.ndim != 4 or image.shape[1] != len(self.spec.bands):
            wanted = f"(B, {len(self.spec.bands)}, H, W) with the bands {', '.join(self.spec.bands)}"
            raise UserError(f"this model takes images {wanted}, got {tuple(image.shape)}")
        return self._features(normalise(image, valid, self.mean, self.std))

    def keep_features(self, megabytes: int) -> None:
        """Compute the features of each image once from now on, keep those that fit; UserError if they can change."""
        trained = sum(p.numel() for p in self.backbone.trainable_parameters())
        if trained or self.head.sites(list(self.backbone.active_adapters())):
            raise UserError(
                "remember=true keeps features, which training would change: it needs adapter=frozen and a head that "
                "puts nothing into the backbone's blocks"
            )
        self._features = FeatureMemory(self._computed, limit=megabytes * 2**20)

    def _computed(self, image: Tensor) -> Features:
        return self.backbone(image, self.head.layers)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that the optimiser may change: the adapters' and the head's."""
        return [*self.backbone.trainable_parameters(), *(p for p in self.head.parameters() if p.requires_grad)]

    def adapter_state(self) -> dict[str, Tensor]:
        """What was trained and the buffers that belong to it: `adapters.NAME.KEY` and `head.KEY`."""
        return self.backbone.adapter_state() | {f"head.{k}": v for k, v in self.head.state_dict().items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `adapter_state`; raises UserError unless keys and shapes are the same."""
        load_state(self.adapter_state(), state)
