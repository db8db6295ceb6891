"""Plain ViT, DINOv2, DINOv3 and CLIP image towers of timm behind the backbone contract.

The only place that knows timm's attribute names. timm's ViT (https://arxiv.org/abs/2010.11929) and Eva (its class for
RoPE models such as DINOv3, https://arxiv.org/abs/2508.10104) differ in what their blocks take; everything else is
shared.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vfmadapt.contracts import BackboneSpec, Features, UserError

RGB = ("red", "green", "blue")
Net = Any
"""A timm VisionTransformer or Eva: nn.Module declares none of the attributes that they share."""

POSITIONS_KEPT = 16
"""Grid sizes whose resized position embeddings are kept; a raster uses one, mixed image folders a few."""


class TimmBackbone(nn.Module):
    """A timm ViT as a frozen backbone: any H x W, any number of bands, features of any block.

    Args:
        net: timm VisionTransformer or Eva with `dynamic_img_size`, three input channels.
        name: what the adapter file calls it.
        bands: number of bands or their names; see `widen_patch_embed`.
        gradient_checkpointing: recompute each block in the backward pass.
        mean, std: per RGB channel of the pretraining, or None.
        licence: of the weights.
    """

    def __init__(
        self,
        net: Net,
        *,
        name: str,
        bands: int | Sequence[str] = RGB,
        gradient_checkpointing: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        licence: str = "unknown",
    ) -> None:
        super().__init__()
        names = tuple(bands) if not isinstance(bands, int) else RGB if bands == 3 else ("",) * bands
        _require_plain_vit(net, name)
        widen_patch_embed(net, names)
        self.net: Net = net.requires_grad_(False).eval()
        self.gradient_checkpointing = gradient_checkpointing
        self.recompute_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._positions: dict[tuple[Any, ...], tuple[Tensor | None, Tensor | None]] = {}
        self._patch: int = net.patch_embed.patch_size[0]
        depth = len(net.blocks)
        self.spec = BackboneSpec(
            name=name,
            dims=(net.embed_dim,) * depth,
            strides=(self._patch,) * depth,
            prefix_tokens=net.num_prefix_tokens,
            bands=len(names),
            mean=tuple(mean) if mean is not None else None,
            std=tuple(std) if std is not None else None,
            weights_hash=weights_hash(net),
            licence=licence,
        )

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Keep the frozen network in evaluation mode whatever `mode` says."""
        super().train(mode)
        self.net.eval()
        return self

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (h, w) of an H x W image, the last row and column padded where needed."""
        return -(-height // self._patch), -(-width // self._patch)

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks in order."""
        return list(self.net.blocks)

    def split(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(B, P + h*w, C) -> prefix (B, P, C), grid (B, h, w, C)."""
        prefix = self.spec.prefix_tokens
        return tokens[:, :prefix], tokens[:, prefix:].unflatten(1, grid)

    def join(self, prefix: Tensor, grid: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([prefix, grid.flatten(1, 2)], dim=1)

    def tensors(self, role: str) -> Iterable[str]:
        """Names of the frozen tensors of `role` in the state dict; "patch_embed" is the only role so far."""
        if role != "patch_embed":
            raise UserError(f"{self.spec.name} has no tensors of role {role!r}; it has: patch_embed")
        return [f"net.patch_embed.{name}" for name, _ in self.net.patch_embed.named_parameters()]

    def forward(self, image: Tensor, layers: Sequence[int]) -> Features:
        """Normalised image (B, bands, H, W) -> un-normalised features of the blocks `layers` (ascending or not)."""
        if image.ndim != 4 or image.shape[1] != self.spec.bands:
            raise UserError(
                f"{self.spec.name} takes images (B, {self.spec.bands}, H, W), got {tuple(image.shape)}; "
                f"build it with bands={image.shape[1] if image.ndim == 4 else 'N'} to use another number of bands"
            )
        height, width = image.shape[-2:]
        grid = self.grid_size(height, width)
        pad = (0, grid[1] * self._patch - width, 0, grid[0] * self._patch - height)
        tokens, rope = self._embed(F.pad(image, pad, mode="replicate") if any(pad) else image, grid)
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        for index, block in enumerate(self.net.blocks[: max(layers) + 1]):
            tokens = self._run(block, tokens, {} if rope is None else {"rope": rope})
            if index in layers:
                prefix, cells = self.split(tokens, grid)
                kept[index] = prefix, cells.permute(0, 3, 1, 2)
        return Features(
            grids=tuple(kept[i][1] for i in layers),
            prefix=tuple(kept[i][0] for i in layers),
            layers=tuple(layers),
            strides=tuple(self.spec.strides[i] for i in layers),
        )

    def _run(self, block: nn.Module, tokens: Tensor, extra: dict[str, Tensor]) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(tokens, **extra)
        contexts = partial(_contexts, self.recompute_context())
        return checkpoint(block, tokens, use_reentrant=False, context_fn=contexts, **extra)  # type: ignore[call-overload]

    def _embed(self, image: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Patches, class and register tokens and position embeddings -> tokens (B, P + h*w, C) and the rotary table."""
        net = self.net
        tokens = net.patch_embed(image).flatten(1, 2)  # (B, h, w, C) -> (B, N, C)
        position, rope = self._position(grid, tokens)
        extra = [t.expand(len(tokens), -1, -1) for t in (net.cls_token, net.reg_token) if t is not None]
        if position is not None and net.no_embed_class:
            tokens = tokens + position
        if extra:
            tokens = torch.cat([*extra, tokens], dim=1)
        if position is not None and not net.no_embed_class:
            tokens = tokens + position
        return net.norm_pre(tokens), rope

    def _position(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Absolute embedding (1, P or 0 + h*w, C) and rotary table; computed once per grid, device and dtype."""
        net = self.net
        trained = net.pos_embed is not None and net.pos_embed.requires_grad
        key = (*grid, like.device, like.dtype)
        if key in self._positions and not trained:
            return self._positions[key]
        position = rope = None
        with torch.set_grad_enabled(trained):
            if net.pos_embed is not None:
                position = _resize_positions(net, grid)
            if getattr(net, "rope", None) is not None:
                rope = net.rope.get_embed(shape=grid)
        if not trained:
            if len(self._positions) >= POSITIONS_KEPT:
                self._positions.pop(next(iter(self._positions)))
            self._positions[key] = position, rope
        return position, rope


def _contexts(
    recompute: AbstractContextManager[Any],
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), recompute


def _resize_positions(net: Net, grid: tuple[int, int]) -> Tensor:
    from timm.layers import resample_abs_pos_embed

    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    return resample_abs_pos_embed(net.pos_embed, list(grid), list(net.patch_embed.grid_size), prefix)


def _require_plain_vit(net: Net, name: str) -> None:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(net, VisionTransformer | Eva) or getattr(net, "rope_mixed", False):
        raise UserError(
            f"{name} is a {type(net).__name__}; this wrapper takes timm's VisionTransformer and Eva (DINOv3)"
        )
    if not net.dynamic_img_size:
        raise UserError(
            f"{name} was built for one image size; build it with timm.create_model(..., dynamic_img_size=True)"
        )


def widen_patch_embed(net: Net, bands: Sequence[str]) -> None:
    """Give the first layer one filter per band, in place.

    Rule: a band named red, green or blue keeps the pretrained filter of that colour; any other band gets the mean of
    the three; then all are scaled by 3 / N, so that a picture with the same value in every band gives the response of
    a grey RGB picture. One unnamed band therefore gets the sum of the three filters. Three bands in the order red,
    green, blue stay as they are.
    """
    if tuple(bands) == RGB:
        return
    old = net.patch_embed.proj
    mean = old.weight.mean(1)
    filters = [old.weight[:, RGB.index(b)] if b in RGB else mean for b in bands]
    new = nn.Conv2d(len(bands), old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    with torch.no_grad():
        new.weight.copy_(torch.stack(filters, 1) * (3 / len(bands)))
        if new.bias is not None:
            new.bias.copy_(old.bias)
    net.patch_embed.proj = new.to(old.weight)


def weights_hash(net: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 bytes of a module's persistent state, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def timm_backbone(
    name: str,
    *,
    pretrained: bool | None = None,
    weights: str | None = None,
    seed: int = 0,
    bands: int | Sequence[str] = RGB,
    gradient_checkpointing: bool = False,
    settings: dict[str, Any] | None = None,
) -> TimmBackbone:
    """Build a timm model by name as a frozen backbone.

    Args:
        name: timm's name, for example vit_small_patch14_dinov2.lvd142m.
        pretrained: True loads the hub's weights (the only case that uses the network), False asks for random weights.
        weights: a file (.safetensors, .pth) or a folder that holds one; takes precedence over the hub.
        seed: of random weights, so that an adapter trained on them can be loaded again.
        bands: number of bands or their names.
        gradient_checkpointing: recompute blocks in the backward pass.
        settings: further arguments of the timm model (tests build tiny ones).

    Raises:
        UserError: unknown name; no weights asked for; no network; weights that do not fit.
    """
    import timm

    if pretrained is None and weights is None:
        raise UserError(
            f"backbone {name} has no weights: pass backbone.weights=FILE or FOLDER, "
            "backbone.pretrained=true (downloads them) "
            "or backbone.pretrained=false (random weights)"
        )
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]
        raise UserError(
            f"timm has no model {name!r}; close names: {', '.join(close) or 'none'}; see timm.list_models()"
        )
    build = partial(timm.create_model, name, num_classes=0, dynamic_img_size=True, **(settings or {}))
    if pretrained and weights is None:
        try:
            net = build(pretrained=True)
        except Exception as error:  # the hub's client raises many kinds
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise UserError(
                f"backbone {name}: the hub gave no weights ({reason}); pass backbone.weights=FILE or FOLDER"
            ) from error
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build(pretrained=False)
        if weights is not None:
            load_weights(net, find_weights(weights), name)
    return _wrap(net, name=name, bands=bands, gradient_checkpointing=gradient_checkpointing)


def wrap_timm(net: Net, *, gradient_checkpointing: bool = False) -> TimmBackbone:
    """A timm model that the caller built -> frozen backbone; the object itself is used (and frozen), not a copy."""
    channels = net.patch_embed.proj.in_channels if hasattr(net, "patch_embed") else 3
    if channels != 3:
        raise UserError(f"the model takes {channels} channels; build it with 3 and pass bands= to TimmBackbone")
    name = (getattr(net, "pretrained_cfg", None) or {}).get("architecture", type(net).__name__)
    return _wrap(net, name=name, bands=RGB, gradient_checkpointing=gradient_checkpointing)


def _wrap(net: Net, *, name: str, bands: int | Sequence[str], gradient_checkpointing: bool) -> TimmBackbone:
    cfg = getattr(net, "pretrained_cfg", None) or {}
    return TimmBackbone(
        net,
        name=name,
        bands=bands,
        gradient_checkpointing=gradient_checkpointing,
        mean=cfg.get("mean"),
        std=cfg.get("std"),
        licence=cfg.get("license") or "unknown",
    )


def find_weights(path: str | Path) -> Path:
    """A weights file, or the one weights file in a folder."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in {".safetensors", ".pth", ".pt", ".bin"})
        if len(found) != 1:
            raise UserError(f"backbone.weights={path}: the folder holds {len(found)} weights files; name one of them")
        return found[0]
    if not path.is_file():
        raise UserError(f"backbone.weights={path}: no such file or folder")
    return path


def load_weights(net: Net, path: Path, name: str) -> None:
    """Load a file into a timm model; it must hold every tensor of the model, others (a classifier) are left over."""
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path))
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        state = convert(state, net) if convert else state
        result = net.load_state_dict(state, strict=False)
    except Exception as error:  # corrupt, pickled or of other shapes
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"backbone.weights={path} does not fit {name}: {reason}") from error
    if result.missing_keys:
        raise UserError(
            f"backbone.weights={path} does not fit {name}: "
            f"{len(result.missing_keys)} of {len(net.state_dict())} tensors are "
            f"missing, first {result.missing_keys[0]}"
        )
