"""What all frozen networks share: frozen for good, roles, recomputation, features."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vfmadapt.backbones._roles import Net, find_place, linear_widths, patch_convolution, tensor_names
from vfmadapt.backbones._weights import RGB, weights_hash, widen_patch_embed
from vfmadapt.contracts import BackboneSpec, Features, Place, UserError


class FrozenNet(nn.Module):
    """A frozen network behind the backbone contract; subclasses add how images become tokens and tokens grids.

    Args:
        net: the network, three input channels; frozen here.
        name: what the adapter file calls it.
        bands: number of bands or their names; see `widen_patch_embed`.
        dims, strides, windowed: per block, see `BackboneSpec`.
        prefix_tokens: class and register tokens.
        gradient_checkpointing: recompute each block in the backward pass.
        final_norm: put the network's final norm on the last block's features.
        mean, std: per RGB channel of the pretraining, or None.
        licence: of the weights.
        trunk: path of the module in `net` that has the blocks; "" for `net` itself.
    """

    spec: BackboneSpec

    def __init__(
        self,
        net: Net,
        *,
        name: str,
        bands: int | Sequence[str],
        dims: Sequence[int],
        strides: Sequence[int],
        windowed: Sequence[bool],
        prefix_tokens: int,
        gradient_checkpointing: bool = False,
        final_norm: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        licence: str = "unknown",
        trunk: str = "",
    ) -> None:
        super().__init__()
        names = tuple(bands) if not isinstance(bands, int) else RGB if bands == 3 else ("",) * bands
        self.net: Net = net.requires_grad_(False).eval()
        self._path = trunk
        widen_patch_embed(self.trunk, names)
        self.gradient_checkpointing = gradient_checkpointing
        self.recompute_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        if final_norm:
            find_place(self.trunk, "norm", 0, name)
        self.spec = BackboneSpec(
            name=name,
            dims=tuple(dims),
            strides=tuple(strides),
            prefix_tokens=prefix_tokens,
            bands=len(names),
            mean=tuple(mean) if mean is not None else None,
            std=tuple(std) if std is not None else None,
            weights_hash=weights_hash(net),
            licence=licence,
            linears=linear_widths(self.trunk),
            embed_dim=patch_convolution(self.trunk).out_channels,
            windowed=tuple(windowed),
            final_norm=final_norm,
        )

    @property
    def trunk(self) -> Net:
        """The module that has the blocks."""
        return self.net.get_submodule(self._path)

    def train(self, mode: bool = True) -> "FrozenNet":
        """Stay in evaluation mode whatever `mode` says."""
        return super().train(False)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Cells (h, w) of the first grid for an H x W image."""
        raise NotImplementedError  # abstract

    def split(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A block's tokens -> prefix (B, P, C), grid (B, h, w, C)."""
        raise NotImplementedError  # abstract

    def join(self, prefix: Tensor, grid: Tensor) -> Tensor:
        """The inverse of `split`."""
        raise NotImplementedError  # abstract

    def widen_prefix(self, index: int, tokens: int) -> None:
        """Tell the attention of block `index` that `tokens` more prefix tokens come."""
        raise NotImplementedError  # abstract

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order."""
        return list(self.trunk.blocks)

    def place(self, role: str, index: int) -> Place:
        """The module that plays `role` in block `index`."""
        return find_place(self.trunk, role, index, self.spec.name)

    def tensors(self, role: str) -> Iterable[str]:
        """Names of the frozen tensors of `role` in the state dict."""
        names = tensor_names(self.trunk, role, self.spec.name, final_norm=self.spec.final_norm)
        return [".".join(filter(None, ("net", self._path, name))) for name in names]

    def exported(self) -> nn.Module:
        """The library's network."""
        net: nn.Module = self.net
        return net

    def _check_image(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] != self.spec.bands:
            raise UserError(
                f"{self.spec.name} takes images (B, {self.spec.bands}, H, W), got {tuple(image.shape)}; "
                f"build it with bands={image.shape[1] if image.ndim == 4 else 'N'} to use another number of bands"
            )

    def _run(self, block: nn.Module, tokens: Tensor, extra: dict[str, Tensor]) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(tokens, **extra)
        contexts = partial(_contexts, self.recompute_context())
        return checkpoint(block, tokens, use_reentrant=False, context_fn=contexts, **extra)  # type: ignore[call-overload]

    def _features(self, layers: Sequence[int], kept: dict[int, tuple[Tensor, Tensor]]) -> Features:
        """`kept[i]`: prefix (B, P, C) and grid (B, h, w, C) of block i."""
        return Features(
            grids=tuple(kept[i][1].permute(0, 3, 1, 2) for i in layers),
            prefix=tuple(kept[i][0] for i in layers),
            layers=tuple(layers),
            strides=tuple(self.spec.strides[i] for i in layers),
        )


def _contexts(
    recompute: AbstractContextManager[Any],
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), recompute
