"""Any decode head of mmsegmentation's registry on any backbone; needs the extra `mmseg`.

https://github.com/open-mmlab/mmsegmentation, Apache-2.0, in the maintained builds of the name onedl-mmsegmentation;
without mmcv's compiled operations.
"""

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.contracts import BackboneSpec, Features, Head, UserError
from vfmadapt.heads._pyramid import Pyramid
from vfmadapt.heads._resize import to_image

COMPILED = ("CCHead", "Mask2FormerHead", "MaskFormerHead", "PointHead", "PSAHead")
"""Heads whose layers or losses are compiled operations of mmcv (or of mmdetection, which needs these)."""

OURS = ("in_channels", "in_index", "channels", "num_classes", "out_channels", "ignore_index", "input_transform")
"""Settings that follow from the backbone, the data and `channels`."""

FINE_WIDTH = 48
"""Channels of the finest map where one joins at the end, as published for DeepLabV3+."""

DRY = (8, 12)
"""Cells of the grid in the forward that tells whether a head turns maps into logits."""


class MmsegHead(Head):
    """A decode head by its registered name, on normalised maps of four scales (from a plain ViT by a simple pyramid).

    A head that takes several maps gets all of them; one that takes a single map that of the last block, at its own
    stride, and where it joins a finer one at the end, as DeepLabV3+ does, the finest, too. The norm is GroupNorm unless
    `options` name another, as crops come in small batches.

    Args:
        spec: the backbone's.
        num_classes: logits per pixel.
        type: the registered name, such as UPerHead.
        channels: of the head.
        layers: blocks to read, see `Pyramid`.
        own_loss: train with the head's own loss (`options: {loss_decode: ...}`, cross-entropy by default) in place of
            the task's.
        options: further settings of that head, under mmsegmentation's names.

    Raises:
        UserError: the extra is not installed; an unknown head or setting; a head that needs compiled operations, or
            that makes no logits from maps alone.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        num_classes: int,
        type: str = "UPerHead",
        channels: int = 256,
        layers: Sequence[int] | None = None,
        own_loss: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        made = _registered(type)
        known = dict(_settings(made))
        given = dict(options or {})
        if unknown := [key for key in given if key not in known or key in OURS]:
            free = ", ".join(sorted(set(known) - set(OURS)))
            raise UserError(f"head.options: {type} has no setting {unknown[0]!r} to choose; it has: {free}")
        if "norm_cfg" in known and known["norm_cfg"] is None:
            given.setdefault("norm_cfg", {"type": "GN", "num_groups": 1})
        given |= {"num_classes": num_classes, "channels": channels}
        one, finer = _takes_one(made, given), "c1_in_channels" in known
        self.pyramid = _pyramid(spec, layers, finer=finer) if one else Pyramid(spec, layers)
        self.layers, self.own_loss = self.pyramid.layers, own_loss
        if finer:
            given = {"c1_channels": FINE_WIDTH, **given, "c1_in_channels": self.pyramid.dims[0]}
        index = len(self.pyramid.dims) - 1 if one else tuple(range(len(self.pyramid.dims)))
        channels_in = self.pyramid.dims[-1] if one else self.pyramid.dims
        self.decode: Any = _build(made, {**given, "in_index": index, "in_channels": channels_in})
        with _quiet():
            self.decode.init_weights()
        if not self._gives_logits(num_classes):
            raise UserError(
                f"head.type={type} makes no logits (B, K, h, w) from feature maps alone; choose one that does, such as "
                "UPerHead, SegformerHead, FCNHead or PSPHead"
            )

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> logits (B, K, H, W)."""
        logits: Tensor = self.decode(self.pyramid(features))
        return to_image(logits, _cells(features), features.strides[0], size)

    def loss(self, features: Features, mask: Tensor, *, ignore_index: int) -> Mapping[str, Tensor] | None:
        """The head's own loss where it is wanted: the sum of its parts, and each of them."""
        if not self.own_loss:
            return None
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        (height, width), stride = _cells(features), features.strides[0]
        labels = mask.masked_fill(mask == ignore_index, self.decode.ignore_index)
        padding = (0, width * stride - mask.shape[2], 0, height * stride - mask.shape[1])
        samples = []
        for each in F.pad(labels, padding, value=self.decode.ignore_index):
            samples.append(SegDataSample())
            samples[-1].gt_sem_seg = PixelData(data=each[None])
        found = self.decode.loss(self.pyramid(features), samples, {})
        losses = [part for name, part in found.items() if "loss" in name]  # the others are accuracies
        return {"loss": torch.stack(losses).sum(), **{name: part.detach() for name, part in found.items()}}

    def _gives_logits(self, classes: int) -> bool:
        like = next(self.decode.parameters())
        finest = self.pyramid.strides[0]
        sizes = [[max(1, round(8 * n * finest / stride)) for n in DRY] for stride in self.pyramid.strides]
        maps = [like.new_zeros(1, c, *n) for c, n in zip(self.pyramid.dims, sizes, strict=True)]
        was = self.decode.training
        try:
            with torch.no_grad():
                found = self.decode.eval()(maps)
        except (TypeError, AttributeError, AssertionError, ValueError, IndexError, RuntimeError):
            return False
        finally:
            self.decode.train(was)
        return isinstance(found, Tensor) and found.ndim == 4 and found.shape[1] == classes


def _registered(name: str) -> Any:
    """The class of a decode head."""
    if name in COMPILED:
        raise UserError(
            f"head.type={name} needs compiled operations of mmcv, which the extra mmseg does without; "
            "choose another head, or head=eomt for masks with classes"
        )
    try:
        with warnings.catch_warnings():  # of compiled operations that are not there
            warnings.simplefilter("ignore")
            from mmseg.models import decode_heads
    except ImportError as error:
        raise UserError(
            f"head=mmseg needs the extra mmseg ({error}); type: MMCV_WITH_OPS=0 pip install 'vfmadapt[mmseg]'"
        ) from error
    known = [n for n in decode_heads.__all__ if n not in COMPILED]
    if name not in known:
        close = get_close_matches(name, known, 1)
        hint = f", did you mean {close[0]}?" if close else ";"
        raise UserError(f"head.type={name}: unknown decode head{hint} known: {', '.join(sorted(known))}")
    return getattr(decode_heads, name)


def _settings(made: Any) -> Iterator[tuple[str, Any]]:
    """Settings of a head's constructor and of those that it hands others on to, with their defaults."""
    for base in reversed(made.__mro__):
        if "__init__" in vars(base) and base.__module__.startswith("mmseg."):
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    yield name, parameter.default


def _build(made: Any, settings: Mapping[str, Any]) -> Any:
    """A decode head; raises UserError with what mmsegmentation says of its settings."""
    try:
        with warnings.catch_warnings():  # of two classes, where one logit would do
            warnings.simplefilter("ignore")
            return made(**settings)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"head.type={made.__name__} cannot be built: {type(error).__name__}: {reason}; see head.options"
        ) from error


def _takes_one(made: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a head reads a single map: those that read several assert a list of channels."""
    finer = {"c1_in_channels": 1, "c1_channels": 1} if "c1_in_channels" in dict(_settings(made)) else {}
    try:
        _build(made, {**settings, **finer, "in_index": 0, "in_channels": 1})
    except UserError as error:
        if isinstance(error.__cause__, AssertionError):
            return False
        raise
    return True


def _pyramid(spec: BackboneSpec, layers: Sequence[int] | None, *, finer: bool) -> Pyramid:
    """The map of the last block at its own stride, after the finest one where that joins."""
    if len(set(spec.strides)) > 1:
        return Pyramid(spec, layers, maps=(0, -1) if finer else (-1,))
    return Pyramid(spec, layers or (-1,), maps=(0, 2) if finer else (2,))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without mmengine's line on the standard error for every weight that is initialised."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _cells(features: Features) -> tuple[int, int]:
    return features.grids[0].shape[2], features.grids[0].shape[3]
