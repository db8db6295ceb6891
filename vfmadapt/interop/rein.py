"""Rein's official state dict (https://arxiv.org/abs/2312.04265)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vfmadapt.adapters.rein import Refinement, Rein
from vfmadapt.check_golden import Golden
from vfmadapt.contracts import Adapter, AfterBlock, UserError
from vfmadapt.interop import Strict
from vfmadapt.testing import vit_spec


def load_rein(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Official layout: `learnable_tokens` (full) or `learnable_tokens_{a,b}`, `mlp_{token2feat,delta_f}`, `scale`.

    The query link, `transform` and `merge`, must be in the file where our adapter has link_queries, and only there.
    """
    assert isinstance(adapter, Rein)
    strict = Strict(state, "rein")
    for key, parameter in _published(adapter).items():
        strict.copy(parameter, key)
    strict.done()


def _published(adapter: Rein) -> dict[str, nn.Parameter]:
    """Our parameters under their published names."""
    if len(adapter.refinements) > 1:
        widths = ", ".join(adapter.refinements)
        raise UserError(f"rein weights: official ones are for blocks of one width; this backbone has {widths}")
    (refinement,) = adapter.refinements.values()
    assert isinstance(refinement, Refinement)
    factors = list(refinement.factors)
    names = ["learnable_tokens"] if len(factors) == 1 else ["learnable_tokens_a", "learnable_tokens_b"]
    found = dict(zip(names, factors, strict=True)) | {"scale": refinement.scale}
    layers: dict[str, nn.Module] = {"mlp_token2feat": refinement.token_map, "mlp_delta_f": refinement.delta_map}
    if adapter.link is not None:
        layers |= {"transform": next(iter(adapter.link.projections.values())), "merge": adapter.link.mix}
    return found | {f"{name}.{kind}": p for name, layer in layers.items() for kind, p in layer.named_parameters()}


def replay_rein(golden: Golden) -> dict[str, Tensor]:
    """One block's tokens on a class token and patches, and the queries."""
    settings, params, x = golden.settings, golden.params, golden.inputs["x"]
    adapter = Rein(
        vit_spec(x.shape[-1], settings["num_layers"]),
        tokens=settings["token_length"],
        rank=params["learnable_tokens_a"].shape[-1] if "learnable_tokens_a" in params else None,
        link_queries=True,
        query_dim=len(params["merge.bias"]),
    )
    load_rein(adapter, params)
    site = adapter.sites()[settings["layer"]]
    assert isinstance(site, AfterBlock)
    y = torch.cat(
        [x[:, :1], site.fn(x[:, 1:].unsqueeze(1)).squeeze(1)], dim=1
    )  # any count of patches is a grid of one row
    golden.backward(y)
    gradients = {f"grad_param/{key}": p.grad for key, p in _published(adapter).items() if p.grad is not None}
    assert x.grad is not None
    return {**gradients, "output/y": y, "output/queries": adapter.queries(), "grad_input/x": x.grad}


replay_rein_lora = replay_rein
