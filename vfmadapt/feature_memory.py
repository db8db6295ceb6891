"""Features of images that were seen before, for a frozen backbone under a head that trains."""

from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor

from vfmadapt.contracts import Features, joined


class FeatureMemory:
    """Computes the features of each image once; images are told apart by their pixels.

    Args:
        compute: normalised images (B, C, H, W) -> their features.
        limit: bytes that are kept; what comes after them is computed each time.
    """

    def __init__(self, compute: Callable[[Tensor], Features], *, limit: int) -> None:
        self._compute, self._limit = compute, limit
        self._kept: dict[bytes, Features] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Features:
        """The features of normalised images (B, C, H, W), in their order."""
        keys = [blake2b(one.cpu().contiguous().numpy(), digest_size=16).digest() for one in image]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        if new := {key: row for row, key in enumerate(keys) if key not in found}:
            computed = self._compute(image[list(new.values())])
            for row, key in enumerate(new):
                found[key] = replace(computed.rows(row, row + 1), image=None)
                self._keep(key, found[key])
        return replace(joined([found[key] for key in keys]), image=image)

    def _keep(self, key: bytes, features: Features) -> None:
        tensors = (*features.grids, *features.prefix)
        size = sum(t.numel() * t.element_size() for t in tensors)
        if self._bytes + size <= self._limit:
            own = replace(features, grids=_cloned(features.grids), prefix=_cloned(features.prefix))
            self._kept[key], self._bytes = own, self._bytes + size


def _cloned(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone() for t in tensors)  # a row of a batch would keep all of it
