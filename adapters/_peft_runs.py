"""What we run ourselves of PEFT's layers: the same functions, at the cost of the method and traceable by compilers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.adapters._peft_layers import NAME


def run(layer: Any, x: Tensor) -> Tensor:
    """A layer of PEFT by itself: (B, N, in) -> (B, N, out)."""
    return layer(x)


def boft(layer: Any, x: Tensor) -> Tensor:
    """BOFT: y = s * W (x R) + b, R orthogonal in blocks; PEFT's layer multiplies dense matrices of in x in."""
    base, rotation = layer.base_layer, layer.cayley_batch(layer.boft_R[NAME][0]).to(x.dtype)
    turned = torch.einsum("...dh,dhk->...dk", x.unflatten(-1, rotation.shape[:2]), rotation).flatten(-2)
    y = F.linear(turned, base.weight) * layer.boft_s[NAME].squeeze(-1)
    return (y if base.bias is None else y + base.bias).to(x.dtype)


def hra(layer: Any, x: Tensor) -> Tensor:
    """HRA: y = W H1 ... Hr x + b, reflections H = 1 - 2 u u^T; PEFT's layer multiplies them all, in x in each."""
    units = F.normalize(layer.hra_u[NAME], dim=0)
    turned = x.to(units.dtype)
    for unit in reversed(units.unbind(1)):
        turned = turned - 2 * (turned @ unit)[..., None] * unit
    return layer.base_layer(turned.to(x.dtype))


def shira(layer: Any, x: Tensor) -> Tensor:
    """SHiRA: y = (W + S) x + b, few entries in S; PEFT's layer adds a sparse tensor and drops hooks of its base."""
    base, entries = layer.base_layer, layer.shira_indices[NAME].long().to(x.device).unbind()
    values = layer.shira_weight[NAME].to(base.weight.dtype)
    return F.linear(x, base.weight.index_put(entries, values, accumulate=True), base.bias)


def waveft(layer: Any, x: Tensor) -> Tensor:
    """WaveFT: y = W x + b + S x, S the inverse wavelet transform of few entries; PEFT's cannot be traced.

    The four quarters of the entries' matrix are the approximation and the details along each axis and both; the
    result is cropped in the middle, since it is larger than the weight for filters longer than two.
    """
    entries = layer.waveft_spectrum[NAME]
    sizes = layer.out_features, layer.in_features
    padded = [n + (longer := layer.filters.shape[-1] - 2) + (n + longer) % 2 for n in sizes]
    at = [i + (p - n) // 2 for i, p, n in zip(layer.waveft_indices[NAME].to(x.device), padded, sizes, strict=True)]
    dense = entries.new_zeros(padded).index_put(tuple(at), entries)
    quarters = dense.unflatten(0, (2, -1)).unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
    update = F.conv_transpose2d(quarters[None], layer.filters, stride=2)[0, 0]
    for axis, size in enumerate(sizes):
        update = update.narrow(axis, (update.shape[axis] - size) // 2, size)
    y = layer.base_layer(x)
    return y + F.linear(x.to(update.dtype), update * layer.waveft_scaling[NAME]).to(y.dtype)


RUNS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {"boft": boft, "hra": hra, "shira": shira, "waveft": waveft}


def prepare(tuner: str, layer: Any) -> None:
    """Give a layer what our run needs of it, and take what only PEFT's needs."""
    if tuner == "boft":
        del layer.boft_P  # in x in, the identity
    if tuner == "waveft":
        from peft.tuners.waveft.wavelet import Wavelet

        wavelet = Wavelet(layer.waveft_wavelet_family[NAME])
        where = layer.waveft_spectrum[NAME].device
        low, high = (torch.tensor(values, device=where) for values in (wavelet.rec_lo, wavelet.rec_hi))
        pairs = [torch.outer(a, b) for a, b in ((low, low), (high, low), (low, high), (high, high))]
        layer.register_buffer("filters", torch.stack(pairs)[:, None], persistent=False)
