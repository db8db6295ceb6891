"""Where an adapter or a head acts in a backbone, and with what function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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
