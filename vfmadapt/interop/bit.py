"""Published packed weights of the 1-bit adapters (JieShibo/PETL-ViT, https://arxiv.org/abs/2307.16867)."""

from collections.abc import Mapping

from torch import Tensor

from vfmadapt.adapters._quantised import QuantisedAdapter, QuantisedLinear, load
from vfmadapt.adapters.bit_adaptformer import BitAdaptFormer
from vfmadapt.adapters.bit_lora import BitLoRA
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Adapter
from vfmadapt.errors import UserError
from vfmadapt.interop import Strict


def load_bit_adaptformer(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Official file: `{"packed": all its bytes as uint8}`, see `_load`."""
    assert isinstance(adapter, BitAdaptFormer)
    _load(adapter, state, "bit_adaptformer")


def load_bit_lora(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Official file: `{"packed": all its bytes as uint8}`, see `_load`; queries before values."""
    assert isinstance(adapter, BitLoRA)
    _load(adapter, state, "bit_lora")


def _load(adapter: QuantisedAdapter, state: Mapping[str, Tensor], method: str) -> None:
    """Fix the adapter to the front of an official file, which ends with the classifier (float32 or 1-bit) or without.

    The release's order: blocks; queries before values; down before up; a layer's codes, then its mean and deviation;
    at the end the classifier.
    """
    strict = Strict(state, method)
    data = bytes(strict.take("packed").tolist())
    strict.done()
    linears, size = adapter.quantised_linears(), adapter.packed_bytes()
    rest, width = len(data) - size, linears[-1].out_features
    plain = rest % (4 * (width + 1)) == 0  # per class, `width` weights and a bias
    binary = rest > 8 and (rest - 8) * 8 % width == 0  # one bit per weight, then mean and deviation
    if rest < 0 or not (plain or binary):
        raise UserError(
            f"{method} weights: {len(data)} bytes, but this adapter takes {size} and a classifier on {width} channels "
            f"{4 * (width + 1)} per class (1-bit: {width}/8 per class and 8); give it the file's dim and bits"
        )
    load(linears, data[:size])


def replay_bit_linear(golden: Golden) -> dict[str, Tensor]:
    """One quantised layer, and what its packed file holds."""
    x, weight = golden.inputs["x"], golden.params["weight"]
    layer = QuantisedLinear(weight.shape[1], weight.shape[0], golden.settings["bits"])
    assert layer.weight is not None
    layer.weight.data.copy_(weight)
    y = layer(x)
    golden.backward(y)
    packed, mean, deviation = layer.packed_state()
    assert x.grad is not None
    assert layer.weight.grad is not None
    return {
        "output/y": y,
        "output/packed": packed,
        "output/mean": mean.view(1),
        "output/std": deviation.view(1),
        "output/codebook": layer.levels,
        "grad_input/x": x.grad,
        "grad_param/weight": layer.weight.grad,
    }
