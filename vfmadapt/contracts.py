"""The seams of the project: what a backbone, an adapter, a head and a data set promise one another.

Every method is written against this file alone. B batch, C channels, H W pixels, h w cells of the token grid, P
prefix tokens, K classes, N tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn

from vfmadapt.errors import UserError as UserError

if TYPE_CHECKING:
    from numpy.random import Generator

IGNORE_INDEX = 255
"""Label of a pixel that no loss and no metric counts."""


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


TokenFn = Callable[[Tensor], Tensor]
"""Acts on the channels alone: any (..., C), be it tokens (B, N, C), a grid (B, h, w, C) or windows of one."""

GridFn = Callable[..., Tensor]
"""(B, h, w, C) -> (B, h, w, C'); with `context` also the adapter's `OnImage` result as second argument.

Functions of sites are bound methods or functools.partial of them, never lambdas (deepcopy, pickle)."""


@dataclass(frozen=True)
class AfterBlock:
    """grid <- fn(grid) on the output of block `index`; the host keeps prefix tokens aside."""

    index: int
    fn: GridFn
    context: bool = False


@dataclass(frozen=True)
class ParallelMLP:
    """Output of block `index` += fn(h), h the residual stream before the block's second norm, prefix tokens included.

    At the block's output and not at the MLP's, where LayerScale would scale it.
    """

    index: int
    fn: TokenFn


@dataclass(frozen=True)
class OnLinear:
    """y <- y + fn(x) at a linear layer, x its input.

    With `spatial`, fn gets the grid (B, h, w, C) (inside windowed attention the window, padding included), and prefix
    tokens go through `prefix_fn`, or get no delta where it is None. With `loss`, fn returns (delta, auxiliary loss or
    None), which the host adds up.
    """

    role: str
    index: int
    fn: Callable[[Tensor], Any]
    spatial: bool = False
    prefix_fn: TokenFn | None = None
    loss: bool = False


@dataclass(frozen=True)
class OnInput:
    """x <- fn(x) before the module of a role."""

    role: str
    index: int
    fn: TokenFn


@dataclass(frozen=True)
class OnOutput:
    """y <- fn(y) after the module of a role."""

    role: str
    index: int
    fn: TokenFn


@dataclass(frozen=True)
class OnWeight:
    """W <- fn(W) for the weight (out, in) of a linear role; the bias stays."""

    role: str
    index: int
    fn: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Instead:
    """y <- fn(x) in place of what the module of a role computes: fn computes that part, too.

    For layers of other libraries that wrap the frozen one; two of them cannot act on a module at once. `pair` is for
    LoRA: while it gives (A (r, in), B (out, r), s), fn(x) is the module's own y + s (x Aᵀ) Bᵀ, and in a batch of
    several adapters the host adds the updates of all of them at once.
    """

    role: str
    index: int
    fn: TokenFn
    pair: Callable[[], tuple[Tensor, Tensor, float] | None] | None = None


@dataclass(frozen=True)
class Prompts:
    """Prompt tokens (n, C) or (B, n, C) after the prefix tokens at the input of block `index`.

    fn gets what the previous block made of its prompts, (B, n, C), or None at the first site. Outside the block the
    prompts are kept aside: other sites and the features never see them. `sees` maps the prompts and the grid (B, h, w,
    C) that go into the block to bool (B, n, h, w), the cells that each prompt may attend to, or to None: all of them.
    """

    index: int
    count: int
    fn: Callable[[Tensor | None], Tensor]
    sees: Callable[[Tensor, Tensor], Tensor | None] | None = None


@dataclass(frozen=True)
class Streams:
    """Features of block `index` for each of T `tasks`, beside the shared ones that alone go on to the next block.

    The streams part behind the attention, which all share. At "proj", "fc1" and "fc2" the frozen layer works on the
    shared stream only; `fns[role]` maps the inputs of all streams (1 + T, ..., in), the shared one first, to what each
    adds to that (1 + T, ..., out). Norms, activations and skips act on each stream as they do in the frozen block.
    """

    index: int
    tasks: tuple[str, ...]
    fns: Mapping[str, TokenFn]


@dataclass(frozen=True)
class OnImage:
    """context <- fn(image), the normalised image (B, bands, H, W), once per forward; for the adapter's other sites."""

    fn: Callable[[Tensor], object]


@dataclass(frozen=True)
class Owned:
    """Trained copies of frozen tensors, swapped in while the adapter is attached: {state-dict name: parameter}."""

    tensors: Mapping[str, nn.Parameter]


Site = (
    AfterBlock | ParallelMLP | OnLinear | OnInput | OnOutput | OnWeight | Instead | Prompts | Streams | OnImage | Owned
)


class Merger(Protocol):
    """Plain weights that an adapter folds itself into."""

    def place(self, role: str, index: int) -> Place:
        """The module of a role in the copy that is merged into."""
        ...

    def weight(self, role: str, index: int) -> Tensor:
        """The weight of a layer at present, (out, in) where it is linear."""
        ...

    def bias(self, role: str, index: int) -> Tensor:
        """The bias (out,) that a layer itself adds: zeros where it has none."""
        ...

    def add(self, role: str, index: int, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Add to a linear layer's weight (out, in) and bias (out,); a bias is made where there was none."""
        ...

    def put(self, role: str, index: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replace a linear (or norm, or patch embedding) layer's weight and, where given, bias."""
        ...

    def replace(self, name: str, tensor: Tensor) -> None:
        """Replace the tensor of a name in the backbone's state dict."""
        ...


class Adapter(nn.Module):
    """A method: parameters and the sites at which they act; subclasses take `spec`, then keyword-only settings."""

    unmergeable: str = "it is not linear in the frozen weights"
    """Why `merge` is refused; "" where the method implements it."""

    hint: str = ""
    """A line for who trains it with labels, where another tool may be what is meant."""

    forwards_per_step: int = 1
    """Forwards of each batch in a training step: 1, or 2 where the method compares them (`consistency`)."""

    def sites(self) -> Sequence[Site]:
        """Where the method acts; called once, when it is attached."""
        return ()

    def bind(self, backbone: Backbone) -> None:
        """Copy what the method needs from the frozen weights (trained copies); called once, before `sites`."""

    def release(self, backbone: Backbone) -> None:
        """Undo what `bind` changed in the backbone, if anything; called when the adapter is taken off."""

    def initialise(self, batches: Iterable[Tensor]) -> None:
        """Data-driven start: normalised images (B, bands, H, W); called once before training where it is overridden.

        All adapters are off meanwhile, so that the backbone of `bind` can be called by itself.
        """

    def aux_loss(self) -> Tensor | None:
        """A loss on the adapter's own weights, or None; losses on activations come from `OnLinear(loss=True)`."""
        return None

    def consistency(self, first: Tensor, second: Tensor) -> Tensor:
        """Loss on the logits (B, K, H, W) of two forwards of one batch; asked for where `forwards_per_step` is 2."""
        raise NotImplementedError  # abstract

    def after_step(self, step: int, total: int) -> None:
        """Called after optimiser step `step` of `total`."""

    def queries(self) -> Tensor:
        """Tokens (n, C) for a head whose queries come from the adapter; raises UserError where there are none."""
        raise UserError(
            f"{type(self).__name__} has no queries for the head; use adapter=rein adapter.link_queries=true, or leave "
            "head.linked=false"
        )

    def training_state(self) -> Mapping[str, Tensor]:
        """What a resumed training needs beside the state dict (running averages): kept in checkpoints, in no file."""
        return {}

    def merge(self, into: Merger) -> None:
        """Fold the method into plain weights; only where `unmergeable` is ""."""
        raise NotImplementedError  # abstract

    @property
    def trains_nothing(self) -> bool:
        """True only for the control without an adapter, and for one whose weights are fixed codes by now."""
        return False


@dataclass(frozen=True)
class Instances:
    """The objects that were told apart in one image, surest first; they may overlap.

    `masks`: bool (n, H, W); `classes`: int64 (n,); `scores`: (n,), 0..1.
    """

    masks: Tensor
    classes: Tensor
    scores: Tensor


class Head(nn.Module):
    """Features -> logits. `layers` are the blocks whose grids it wants, in order.

    `regions`: it has learned to tell the connected regions of a class apart, so that `instances` are objects.
    """

    layers: tuple[int, ...]
    regions = False

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features -> logits (B, K, H, W) for `size` = (H, W) of the image."""
        raise NotImplementedError  # abstract

    def supervised(self, features: Features, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """All logits (B, K, H, W) that training compares with the labels: `forward`'s, then a head's coarser ones."""
        return (self(features, size),)

    def loss(self, features: Features, mask: Tensor, *, ignore_index: int) -> Mapping[str, Tensor] | None:
        """A loss of the head's own against labels (B, H, W), or None: the task's, on the logits of `supervised`.

        {"loss": what is minimised, name: a part of it before its weight, without gradient, ...}.
        """
        return None

    def instances(self, features: Features, size: tuple[int, int]) -> list[Instances]:
        """The objects of each image of `size` (H, W); raises UserError where the head does not tell them apart."""
        raise UserError(f"{type(self).__name__} labels pixels and tells no objects apart; train head=eomt for these")

    def sites(self, adapters: Sequence[Adapter]) -> Sequence[Site]:
        """Where the head acts in the blocks themselves; called once, when it joins a backbone with these adapters."""
        return ()

    def after_step(self, step: int, total: int) -> None:
        """Called after optimiser step `step` of `total`."""


@dataclass(frozen=True)
class MaskPrompts:
    """What singles out M objects in each of B images; places in pixels, x before y, (0, 0) the first pixel's centre.

    `points` (B, M, N, 2) with `labels` (B, M, N): 1 on the object, 0 off it, -1 where there is no point. `boxes` (B, M,
    4): x0, y0, x1, y1. `masks` (B, M, h', w'): the `coarse` logits of an earlier answer, chosen from its alternatives.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None


@dataclass(frozen=True)
class PromptedMasks:
    """Answers to prompts: T alternatives for each of M objects in B images.

    `logits` (B, M, T, H, W), above 0 on the object; `scores` (B, M, T): the IoU that the model expects; `coarse` (B,
    M, T, h', w'): the logits at the resolution at which they can be a prompt again.
    """

    logits: Tensor
    scores: Tensor
    coarse: Tensor

    def best(self) -> "PromptedMasks":
        """Of each object the alternative with the highest score (T = 1)."""
        return self.take(self.scores.argmax(-1, keepdim=True))

    def take(self, index: Tensor) -> "PromptedMasks":
        """The alternatives `index` (B, M, 1) (T = 1)."""
        wide = index[..., None, None]
        return PromptedMasks(
            logits=self.logits.take_along_dim(wide, 2),
            scores=self.scores.take_along_dim(index, 2),
            coarse=self.coarse.take_along_dim(wide, 2),
        )


@dataclass(frozen=True)
class PointGrid:
    """How every object of an image is asked for: by a grid of points, and by which of the answers count.

    `points` per side of the image; `quality`: the least IoU that the model must expect of a mask; `stability`: the
    least IoU of a mask that is drawn a little wider with the same drawn a little tighter. By default as published for
    SAM. Raises UserError for other numbers.
    """

    points: int = 32
    quality: float = 0.88
    stability: float = 0.95

    def __post_init__(self) -> None:
        if self.points < 1 or not 0 <= self.quality <= 1 or not 0 <= self.stability <= 1:
            raise UserError(
                f"points={self.points} quality={self.quality:g} stability={self.stability:g}: points is at least 1, "
                "the others are from 0 to 1"
            )


class PromptHead(Head):
    """A head that is asked about objects: features once per image, then any number of prompts.

    `grid`: how all objects of an image are asked for.
    """

    grid = PointGrid()

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Refused: raises UserError, there are no classes to label pixels with."""
        raise UserError(
            "this head answers prompts and labels no pixels: train it with task=promptable and ask it with "
            "model.set_image(...) and model.predict(points=..., boxes=...), or map all objects with tools/predict.py; "
            "for label maps take another head"
        )

    def embed(self, features: Features) -> Tensor:
        """Features -> image embedding (B, C, h, w)."""
        raise NotImplementedError  # abstract

    def decode(self, embedding: Tensor, prompts: MaskPrompts, size: tuple[int, int], *, several: bool) -> PromptedMasks:
        """Masks of the objects that the prompts single out, for images of `size` (H, W).

        With `several` the alternatives for prompts that may mean several things, else one mask (T = 1).
        """
        raise NotImplementedError  # abstract


@dataclass(frozen=True)
class ClassSpec:
    """A class of a label map: its name and its 8-bit RGB colour; `line`: roads and the like, judged by their course."""

    name: str
    colour: tuple[int, int, int]
    line: bool = False


@dataclass(frozen=True)
class ValueSpec:
    """A continuous value of each pixel, such as canopy height: its name and its unit ("" without one).

    `mean` and `std` of the value, or of its logarithm where `log` (it is then above 0): heads learn it in these units.
    `inverse`: it is an inverse depth, such as a disparity.
    """

    name: str
    unit: str = ""
    mean: float = 0.0
    std: float = 1.0
    log: bool = False
    inverse: bool = False


@dataclass(frozen=True)
class DataSpec:
    """What a data set promises: bands in order, classes by label, per-band mean and std in sensor units.

    A model of `values` instead has no classes: its output (B, K, H, W) are K values in their units, not logits. One of
    `objects` says which object of the image each pixel belongs to: its output (B, 1, H, W) holds whole numbers from 1
    to 2**24 - 1, and 0 for none and where the image is not valid. If it has K classes, too, a number is 1 + the class
    of the object + a multiple of K.
    """

    name: str
    bands: tuple[str, ...]
    classes: tuple[ClassSpec, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ignore_index: int = IGNORE_INDEX
    values: tuple[ValueSpec, ...] = ()
    objects: bool = False

    def __post_init__(self) -> None:
        if self.values and (self.classes or self.objects):
            other = "classes" if self.classes else "objects"
            raise UserError(f"{self.name} has {other} and values; a model gives one of these, so keep one")

    @property
    def outputs(self) -> int:
        """Channels that a model of this data gives, one for each class or value; one for objects."""
        return 1 if self.objects else len(self.values or self.classes)


class Sample(TypedDict):
    """One labelled image.

    `image`: float32 (C, H, W) in sensor units (reflectance for optical data), 0 where not valid; `mask`: int64 (H,
    W), IGNORE_INDEX where no label counts; `valid`: bool (H, W); `id`: stable name. `crs` (WKT) and `transform` (six
    affine numbers) where known; of slices and video frames, whose ids are CLIP/FRAME, `spacing` as in `ClipSample`.
    """

    image: Tensor
    mask: Tensor
    valid: Tensor
    id: str
    bands: tuple[str, ...]
    crs: NotRequired[str | None]
    transform: NotRequired[tuple[float, ...] | None]
    spacing: NotRequired[tuple[float | None, float | None, float | None]]


class ValueSample(TypedDict):
    """One image with values of its pixels.

    `image`, `valid`, `id`, `bands`, `crs`, `transform`: as in `Sample`; `values`: float32 (K, H, W), in the order and
    the units of the data's `ValueSpec`s, NaN where unknown.
    """

    image: Tensor
    values: Tensor
    valid: Tensor
    id: str
    bands: tuple[str, ...]
    crs: NotRequired[str | None]
    transform: NotRequired[tuple[float, ...] | None]


class DepthSample(TypedDict):
    """One image with depth.

    `image`, `valid`, `id`, `bands`, `crs`, `transform`: as in `Sample`; `depth`: float32 (H, W) along the optical axis,
    in the unit of the data's `ValueSpec`, NaN where unknown.
    """

    image: Tensor
    depth: Tensor
    valid: Tensor
    id: str
    bands: tuple[str, ...]
    crs: NotRequired[str | None]
    transform: NotRequired[tuple[float, ...] | None]


class FrameTriple(TypedDict):
    """A frame of a video and S others of the same scene.

    `image`: float32 (C, H, W), 0..1; `sources`: (S, C, H, W), for instance the frames before and after; `depth`: (H, W)
    of the image, NaN where unknown; `poses`: (S, 4, 4), which take points from the image's camera to each source's, in
    the unit of the depth; `intrinsics`: (3, 3) in pixels, the centre of the first pixel being (0, 0).
    """

    image: Tensor
    sources: Tensor
    depth: Tensor
    poses: Tensor
    intrinsics: Tensor
    id: str


class ClipSample(TypedDict):
    """Labelled frames of a video or slices of a volume.

    `image`: float32 (T, C, H, W), 0 black to 1 white; `mask`: int64 (T, H, W), 0 background, IGNORE_INDEX where no
    label counts; `spacing`: millimetres from frame to frame (None in time), row to row and column to column, None where
    unknown; `id`: stable name.
    """

    image: Tensor
    mask: Tensor
    spacing: tuple[float | None, float | None, float | None]
    id: str


@runtime_checkable
class Clips(Protocol):
    """The clips of one split; index -> ClipSample of a whole one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ClipSample: ...

    def labelled(self, index: int) -> Sequence[int]:
        """The frames of a clip that have labels."""
        ...

    def read(self, index: int, frames: Sequence[int]) -> ClipSample:
        """Some frames of a clip, in the order given."""
        ...


@runtime_checkable
class ClipSource(Protocol):
    """An entry of conf/data whose samples belong to clips; its frames make it a `DataSource`, too."""

    @property
    def spec(self) -> DataSpec:
        """Bands, classes and statistics."""
        ...

    def prepare(self) -> None:
        """Make sure that the files are there (generate or check); idempotent."""
        ...

    def clips(self, name: str) -> Clips:
        """The clips of "train", "val" or "test"."""
        ...


@runtime_checkable
class Samples(Protocol):
    """One split of a data set, without augmentation; index -> Sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class UnlabelledSource(Protocol):
    """An entry of conf/data without labels: images of any size, of which windows are read in place."""

    @property
    def spec(self) -> DataSpec:
        """Bands and statistics; no classes."""
        ...

    def prepare(self) -> None:
        """Make sure that the files are there (generate or check); idempotent."""
        ...

    def require(self, side: int) -> None:
        """Leave out images with a shorter side than `side` pixels; raises UserError where none is left."""
        ...

    def __len__(self) -> int: ...

    def window(self, index: int, side: int, draw: "Generator") -> tuple[Tensor, Tensor]:
        """A random square of image `index`: float32 (C, s, s) in sensor units and its valid pixels, bool (s, s).

        s is `side`, or the image's shorter side where that is less. The same generator gives the same square.
        """
        ...


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


@runtime_checkable
class ValueSource(Protocol):
    """An entry of conf/data whose samples hold values or depth instead of labels."""

    @property
    def values(self) -> tuple[ValueSpec, ...]:
        """What the values are; known before `prepare`, unlike the statistics."""
        ...

    @property
    def spec(self) -> DataSpec:
        """Bands, values and statistics."""
        ...

    def prepare(self) -> None:
        """Make sure that the files are there (generate or check); idempotent."""
        ...

    def split(self, name: str) -> "ValueSamples":
        """The samples of "train", "val" or "test"."""
        ...


@runtime_checkable
class ValueSamples(Protocol):
    """One split of such a data set, without augmentation."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ValueSample | DepthSample: ...
