"""AdaptFormer's published numbers (https://arxiv.org/abs/2205.13535)."""

from torch import Tensor, nn

from vfmadapt.adapters.adaptformer import AdaptFormer
from vfmadapt.check_golden import Golden
from vfmadapt.interop import Strict
from vfmadapt.interop._block import adapted_block, run_block
from vfmadapt.testing import vit_spec

BLOCK = {
    "norm1": ["norm1"],
    "attn.qkv": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
    "attn.proj": ["attn.proj"],
    "norm2": ["norm2"],
    "mlp.fc1": ["fc1"],
    "mlp.fc2": ["fc2"],
}


def replay_adaptformer_adapter(golden: Golden) -> dict[str, Tensor]:
    """The branch alone."""
    adapter, published = _filled(golden, "")
    y = adapter.branches[0](golden.inputs["x"])
    return _finished(golden, y, published)


def replay_adaptformer_block(golden: Golden) -> dict[str, Tensor]:
    """A whole block: the tokens (B, N, C) before it -> after it."""
    adapter, published = _filled(golden, "adaptmlp.")
    model = adapted_block(adapter, golden.params, BLOCK, golden.settings["num_heads"])
    return _finished(golden, run_block(model, golden.inputs["x"]), published)


def _filled(golden: Golden, prefix: str) -> tuple[AdaptFormer, dict[str, nn.Parameter]]:
    """An adapter of one block with the file's tensors, and its parameters under their published names."""
    settings = golden.settings
    adapter = AdaptFormer(vit_spec(settings["dim"]), dim=settings["bottleneck"], scale=settings["scale"]).eval()
    published = {
        prefix + name.replace(".", "_proj."): parameter for name, parameter in adapter.branches[0].named_parameters()
    }
    strict = Strict({k: v for k, v in golden.params.items() if k.startswith(prefix)}, "adaptformer")
    for name, parameter in published.items():
        strict.copy(parameter, name)
    strict.done()
    return adapter, published


def _finished(golden: Golden, y: Tensor, published: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    golden.backward(y)
    tensors = {f"grad_param/{name}": parameter.grad for name, parameter in published.items()}
    tensors |= {"output/y": y, "grad_input/x": golden.inputs["x"].grad}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
