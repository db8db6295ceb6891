"""What a backbone promises: its spec, the features that it gives, the roles of its modules."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vfmadapt.errors import UserError


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone promises; everything that an adapter or a head may size itself by.

    `dims[i]` and `strides[i]` are the channels and the input pixels per cell of the grid after block (or stage) i.
    `mean` and `std` (per band, in the units that the weights were trained on) are None where the weights prescribe
    none. `weights_hash` is the SHA-256 of the frozen weights. `linears[role][i]` is (in, out) of block i's linear
    layer; a role that a backbone lacks has no entry. `embed_dim`: channels of the patch embedding. `windowed[i]`:
    block i attends within windows (or keeps a grid), so that its sequence cannot be lengthened. `final_norm`: the
    last block's features come through the final norm.
    """

    name: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    prefix_tokens: int
    bands: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    weights_hash: str
    licence: str
    linears: Mapping[str, tuple[tuple[int, int], ...]]
    embed_dim: int
    windowed: tuple[bool, ...]
    final_norm: bool = False

    @property
    def depth(self) -> int:
        """Number of blocks (or stages) whose grids can be asked for."""
        return len(self.dims)

    def widths(self, role: str) -> tuple[tuple[int, int], ...]:
        """(in, out) of the linear layers of a role, block by block; raises UserError with the roles that there are."""
        if role not in self.linears:
            raise UserError(f"{self.name} has no linear layers {role!r}; it has: {', '.join(self.linears)}")
        return self.linears[role]


@dataclass(frozen=True)
class Features:
    """Un-normalised features of the requested layers.

    `grids[i]`: (B, dims[layers[i]], h, w) with h = ceil(H / stride); `prefix[i]`: (B, P, C), P may be 0;
    `strides[i]`: pixels per cell. Where H or W is no multiple of the stride the image was padded at the bottom and
    right, so a head upsamples by the stride and crops to the image's size. `prompts[i]`: what block i made of the
    prompts (B, n, C) that the head itself put into the blocks (`Head.sites`). `streams[task, i]`: the grid that block i
    made for one task alone (`Streams`). `image`: the normalised image (B, bands, H, W), for what a patch does not keep;
    a bare backbone's features have none.
    """

    grids: tuple[Tensor, ...]
    prefix: tuple[Tensor, ...]
    layers: tuple[int, ...]
    strides: tuple[int, ...]
    prompts: Mapping[int, Tensor] = field(default_factory=dict)
    streams: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    image: Tensor | None = None

    def of(self, task: str) -> "Features":
        """The same with the grids of a task's own streams where there are such."""
        own = zip(self.layers, self.grids, strict=True)
        return replace(self, grids=tuple(self.streams.get((task, layer), grid) for layer, grid in own))

    def only(self, layers: Sequence[int]) -> "Features":
        """Some of the layers, in the order asked."""
        at = [self.layers.index(i) for i in layers]
        return replace(
            self,
            grids=tuple(self.grids[i] for i in at),
            prefix=tuple(self.prefix[i] for i in at),
            layers=tuple(layers),
            strides=tuple(self.strides[i] for i in at),
        )

    def rows(self, first: int, last: int) -> "Features":
        """The samples first .. last - 1 of the batch."""
        return replace(
            self,
            grids=tuple(grid[first:last] for grid in self.grids),
            prefix=tuple(prefix[first:last] for prefix in self.prefix),
            prompts={index: prompts[first:last] for index, prompts in self.prompts.items()},
            streams={key: grid[first:last] for key, grid in self.streams.items()},
            image=None if self.image is None else self.image[first:last],
        )


def joined(parts: Sequence[Features]) -> Features:
    """The samples of several features of the same layers as one batch, without prompts, streams and images."""
    first = parts[0]
    return Features(
        grids=tuple(torch.cat(grids) for grids in zip(*(p.grids for p in parts), strict=True)),
        prefix=tuple(torch.cat(prefix) for prefix in zip(*(p.prefix for p in parts), strict=True)),
        layers=first.layers,
        strides=first.strides,
    )


@runtime_checkable
class Backbone(Protocol):
    """A vision transformer with its library's names hidden."""

    spec: BackboneSpec

    def __call__(self, image: Tensor, layers: Sequence[int]) -> Features:
        """Image (B, C, H, W), already normalised -> features of `layers` (indices, 0 = first block)."""
        ...

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Cells (h, w) of the token grid for an image of H x W pixels."""
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order; each maps tokens to tokens."""
        ...

    def split(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A block's tokens -> (prefix (B, P, C), grid (B, h, w, C))."""
        ...

    def join(self, prefix: Tensor, grid: Tensor) -> Tensor:
        """The inverse of `split`."""
        ...

    def place(self, role: str, index: int) -> "Place":
        """The module that plays `role` (see `ROLES`) in block `index`; raises UserError where there is none."""
        ...

    def tensors(self, role: str) -> Iterable[str]:
        """Names of the frozen tensors of a role, as in the state dict.

        Roles: "patch_embed", "biases", "norms", "cls_token", "all" and "blocks.I"; only tensors that a forward uses.
        """
        ...

    def widen_prefix(self, index: int, tokens: int) -> None:
        """Tell block `index` that `tokens` more prefix tokens come (fewer where negative); UserError where it can't."""
        ...

    def exported(self) -> nn.Module:
        """The library's own network inside, to be saved as a plain checkpoint."""
        ...


@dataclass(frozen=True)
class Blank:
    """Patches that a network is not shown: where `patches` (bool (B, h, w)) is set, `token` (C,) is their embedding."""

    patches: Tensor
    token: Tensor


@runtime_checkable
class PatchBackbone(Backbone, Protocol):
    """A backbone whose patches can be hidden from it, as learning without labels wants it."""

    def tokens(self, image: Tensor, *, keep: Tensor | None = None, blank: Blank | None = None) -> Tensor:
        """Normalised image (B, bands, H, W) -> normed tokens (B, P + N, C) after the last block, the prefix first.

        `keep`: indices (B, N) of the patches, counted row by row, that are encoded; the others are left out.
        """
        ...


LINEAR_ROLES = ("q", "k", "v", "qkv", "proj", "fc1", "fc2")
"""Linear layers of a block; "q", "k" and "v" are the thirds of "qkv" where that is one layer."""

ROLES = (*LINEAR_ROLES, "norm1", "attn", "norm2", "mlp", "patch_embed", "norm")
"""Modules at which an adapter can act; the last two belong to the whole network and ignore the block's index."""


@dataclass(frozen=True)
class Place:
    """A module, and which of its output features are meant: (first, last + 1), or None for all of them."""

    module: nn.Module
    rows: tuple[int, int] | None = None
