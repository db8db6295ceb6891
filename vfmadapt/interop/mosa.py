"""MoSA's published numbers (https://arxiv.org/abs/2312.02923)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vfmadapt.adapters.mosa import Branch, Experts, MoSA, owners
from vfmadapt.check_golden import Golden
from vfmadapt.interop import Strict
from vfmadapt.interop._block import adapted_block, run_block
from vfmadapt.testing import vit_spec

BLOCK = {
    "norm1": ["attention_norm"],
    "attn.qkv": ["attn.query", "attn.key", "attn.value"],
    "attn.proj": ["attn.out"],
    "norm2": ["ffn_norm"],
    "mlp.fc1": ["ffn.fc1"],
    "mlp.fc2": ["ffn.fc2"],
}


def replay_mosa_merge(golden: Golden) -> dict[str, Tensor]:
    """The merged adapter; attention and MLP are switched off, so that the stream passes them as it is."""
    branch = _branch(_filled(golden).eval())
    return _evaluated(golden, branch, branch.after)


replay_mosa_merge_down = replay_mosa_merge


def replay_mosa_block(golden: Golden) -> dict[str, Tensor]:
    """A whole block with the merged adapter."""
    adapter = _filled(golden)
    model = adapted_block(adapter, golden.params, BLOCK, golden.settings["heads"])
    return _evaluated(golden, _branch(adapter), partial(run_block, model))


def replay_mosa_train(golden: Golden) -> dict[str, Tensor]:
    """One training step with the experts that the file names; plain gradients are those of experts that own all."""
    branch, x = _branch(_filled(golden).train()), golden.inputs["x"]
    masks, drawn = _masks(branch), {}
    for name, experts in _experts(branch).items():
        drawn[name] = golden.settings[f"expert_{name.removeprefix('adapter_')}"]
        experts.draw = partial(torch.tensor, drawn[name])  # type: ignore[method-assign]
    y = branch.after(x)
    golden.backward(y)
    found = masks | {"output/y": y, "grad_input/x": _gradient(x).clone()}
    for name, experts in _experts(branch).items():
        found[f"output/masked_grad/{name}.{drawn[name]}.weight"] = _gradient(experts.weight)[drawn[name]]
        experts.owner.fill_(drawn[name])
    branch.zero_grad()
    golden.backward(branch.after(x))
    for name, layer in _published(branch).items():
        if isinstance(layer, Experts):
            weight, bias = _gradient(layer.weight), _gradient(layer.bias).view(len(layer.weight), -1)
            found[f"grad_param/{name}.{drawn[name]}.weight"] = weight[drawn[name]]
            found[f"grad_param/{name}.{drawn[name]}.bias"] = bias[drawn[name]]
        else:
            found |= _gradients(name, layer)
    return found


def _filled(golden: Golden) -> MoSA:
    """An adapter of one block with the file's tensors; who owns what follows from the file's scores."""
    settings = golden.settings
    adapter = MoSA(
        vit_spec(settings["dim"]),
        dim=settings["bottleneck"],
        experts=settings["experts"],
        share=settings["share"] or "none",
        scale=settings["scale"],
        dropout=0.0,  # the files are without
    )
    own = {k: v for k, v in golden.params.items() if k.startswith("adapter_") and "_merge." not in k}
    strict = Strict(own, "mosa")
    for name, layer in _published(_branch(adapter)).items():
        if not isinstance(layer, Experts):
            strict.copy(layer.weight, f"{name}.weight")
            strict.copy(layer.bias, f"{name}.bias")
            continue
        experts = len(layer.weight)
        for i in range(experts):
            strict.copy(layer.weight[i], f"{name}.{i}.weight")
            strict.copy(layer.bias.view(experts, -1)[i], f"{name}.{i}.bias")
        layer.owner.copy_(owners(golden.inputs[f"score_{name}"], experts))
        stranger = (layer.owner.long() + 1) % experts  # any expert that does not own the entry holds its start
        layer.start.copy_(layer.weight.detach().gather(0, stranger[None])[0])
    strict.done()
    return adapter


def _branch(adapter: MoSA) -> Branch:
    branch = adapter.branches["parallel"].get_submodule("0")
    assert isinstance(branch, Branch)
    return branch


def _published(branch: Branch) -> dict[str, nn.LayerNorm | nn.Linear | Experts]:
    """The layers under their published names."""
    return {"adapter_norm": branch.norm, "adapter_down": branch.down, "adapter_up": branch.up}


def _experts(branch: Branch) -> dict[str, Experts]:
    return {name: layer for name, layer in _published(branch).items() if isinstance(layer, Experts)}


def _masks(branch: Branch) -> dict[str, Tensor]:
    found = {}
    for name, layer in _experts(branch).items():
        numbers = torch.arange(len(layer.weight)).view(-1, 1, 1)
        found[f"output/mask_{name}"] = (layer.owner == numbers).float()
    return found


def _evaluated(golden: Golden, branch: Branch, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    y = run(golden.inputs["x"])
    golden.backward(y)
    found = _masks(branch) | {"output/y": y, "grad_input/x": _gradient(golden.inputs["x"])}
    for name, layer in _published(branch).items():
        if not isinstance(layer, Experts):
            found |= _gradients(name, layer)
            continue
        weight, bias = layer.merged()
        # the mean hands each expert 1/E of the merged tensor's gradient, and each entry of a weight has one owner
        weight_grad = _gradient(layer.weight).sum(0) * len(layer.weight)
        bias_grad = _gradient(layer.bias).view(len(layer.weight), -1).sum(0)
        for kind, tensor, grad in (("weight", weight, weight_grad), ("bias", bias, bias_grad)):
            found[f"output/merged_{name}.{kind}"] = tensor
            found[f"grad_param/{name}_merge.{kind}"] = grad
    return found


def _gradients(name: str, layer: nn.Module) -> dict[str, Tensor]:
    return {f"grad_param/{name}.{kind}": _gradient(p) for kind, p in layer.named_parameters()}


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
