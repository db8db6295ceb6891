"""The seams of the project: what a backbone, an adapter, a head and a data set promise one another.

Every method is written against this file alone. B batch, C channels, H W pixels, h w cells of the token grid, P
prefix tokens, K classes, N tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn

from vfmadapt.errors import UserError as UserError

IGNORE_INDEX = 255
"""Label of a pixel that no loss and no metric counts."""


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone promises; everything that an adapter or a head may size itself by.

    `dims[i]` and `strides[i]` are the channels and the input pixels per cell of the grid after block (or stage) i.
    `mean` and `std` (per band, in the units that the weights were trained on) are None where the weights prescribe
    none. `weights_hash` is the SHA-256 of the frozen weights.
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

    @property
    def depth(self) -> int:
        """Number of blocks (or stages) whose grids can be asked for."""
        return len(self.dims)


@dataclass(frozen=True)
class Features:
    """Un-normalised features of the requested layers.

    `grids[i]`: (B, dims[layers[i]], h, w) with h = ceil(H / stride); `prefix[i]`: (B, P, C), P may be 0;
    `strides[i]`: pixels per cell. Where H or W is no multiple of the stride the image was padded at the bottom and
    right, so a head upsamples by the stride and crops to the image's size.
    """

    grids: tuple[Tensor, ...]
    prefix: tuple[Tensor, ...]
    layers: tuple[int, ...]
    strides: tuple[int, ...]


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

    def tensors(self, role: str) -> Iterable[str]:
        """Names of the frozen tensors of a role ("patch_embed"), as in the state dict."""
        ...


GridFn = Callable[[Tensor], Tensor]
"""(B, h, w, C) -> (B, h, w, C). A bound method or a functools.partial of one, never a lambda (deepcopy, pickle)."""


@dataclass(frozen=True)
class AfterBlock:
    """grid <- fn(grid) on the output of block `index`; the host keeps prefix tokens aside."""

    index: int
    fn: GridFn


@dataclass(frozen=True)
class Owned:
    """Trained copies of frozen tensors, swapped in while the adapter is attached: {state-dict name: parameter}."""

    tensors: Mapping[str, nn.Parameter]


Site = AfterBlock | Owned


class Adapter(nn.Module):
    """A method: parameters and the sites at which they act; subclasses take `spec`, then keyword-only settings."""

    def sites(self) -> Sequence[Site]:
        """Where the method acts; called once, when it is attached."""
        return ()

    def bind(self, backbone: Backbone) -> None:
        """Copy what the method needs from the frozen weights (trained copies); called once, before `sites`."""

    def aux_loss(self) -> Tensor | None:
        """Auxiliary loss of the last forward, or None."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """Called after optimiser step `step` of `total`."""

    @property
    def trains_nothing(self) -> bool:
        """True only for the control without an adapter."""
        return False


class Head(nn.Module):
    """Features -> logits. `layers` are the blocks whose grids it wants, in order."""

    layers: tuple[int, ...]

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features -> logits (B, K, H, W) for `size` = (H, W) of the image."""
        raise NotImplementedError  # abstract


@dataclass(frozen=True)
class ClassSpec:
    """A class of a label map: its name and its 8-bit RGB colour."""

    name: str
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class DataSpec:
    """What a data set promises: bands in order, classes by label, per-band mean and std in sensor units."""

    name: str
    bands: tuple[str, ...]
    classes: tuple[ClassSpec, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ignore_index: int = IGNORE_INDEX


class Sample(TypedDict):
    """One labelled image.

    `image`: float32 (C, H, W) in sensor units (reflectance for optical data), 0 where not valid; `mask`: int64 (H,
    W), IGNORE_INDEX where no label counts; `valid`: bool (H, W); `id`: stable name. `crs` (WKT) and `transform` (six
    affine numbers) where known.
    """

    image: Tensor
    mask: Tensor
    valid: Tensor
    id: str
    bands: tuple[str, ...]
    crs: NotRequired[str | None]
    transform: NotRequired[tuple[float, ...] | None]


@runtime_checkable
class Samples(Protocol):
    """One split of a data set, without augmentation; index -> Sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class DataSource(Protocol):
    """An entry of conf/data: knows its spec and gives splits."""

    @property
    def spec(self) -> DataSpec:
        """Bands, classes and statistics."""
        ...

    def prepare(self) -> None:
        """Make sure that the files are there (generate or check); idempotent."""
        ...

    def split(self, name: str) -> Samples:
        """The samples of "train", "val" or "test"."""
        ...
