"""The optimiser Muon against timm's, which iterates in bfloat16, and against AdamW."""

import copy

import pytest
import timm.optim
import torch
from torch import nn

from vfmadapt.tasks.muon import Muon, layer_weights


class Small(nn.Module):
    """Layers of every kind that the rule tells apart."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.up = nn.Linear(8, 24), nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(8, 4, 2)
        self.depthwise, self.single = nn.Conv2d(6, 6, 3, groups=6), nn.Linear(8, 1)
        self.tokens, self.norm = nn.Parameter(torch.randn(5, 8)), nn.LayerNorm(8)
        self.embedding = nn.Embedding(4, 8)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small()


def give_gradients(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def groups(module, **settings):
    weights = layer_weights(module.modules())
    return [
        {"params": [p for p in module.parameters() if p not in weights], **settings},
        {"params": [p for p in module.parameters() if p in weights], "orthogonal": True, **settings},
    ]


def test_it_is_for_layers_that_map_channels_to_channels(small):
    names = {name for name, p in small.named_parameters() if p in layer_weights(small.modules())}
    assert names == {"linear.weight", "conv.weight", "up.weight"}


def test_matrices_step_as_timm_steps_and_the_rest_as_adamw(small):
    """timm rounds to bfloat16: its steps have 3 digits at best, and the iteration spreads singular values anyway."""
    by_timm, by_adamw = copy.deepcopy(small), copy.deepcopy(small)
    weights = [by_timm.linear.weight, by_timm.conv.weight, by_timm.up.weight]
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    ours = Muon(groups(small, weight_decay=0.1), lr=1e-2)
    reference = timm.optim.Muon(
        weights, **settings, momentum=0.95, nesterov=True, ns_coefficients="original", adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(by_adamw.parameters(), **settings)
    before = small.conv.weight.detach().clone()
    for seed in range(3):
        for module, optimiser in ((small, ours), (by_timm, reference), (by_adamw, adamw)):
            give_gradients(module, seed)
            optimiser.step()
    assert (small.conv.weight - before).abs().max() > 0.005
    for name in ("linear", "conv", "up"):
        one, other = getattr(small, name).weight, getattr(by_timm, name).weight
        torch.testing.assert_close(one, other, atol=4e-4, rtol=0)
        assert (one - getattr(by_adamw, name).weight).abs().max() > 0.005
        assert torch.equal(getattr(small, name).bias, getattr(by_adamw, name).bias)
    for name in ("depthwise", "single", "embedding"):
        assert torch.equal(getattr(small, name).weight, getattr(by_adamw, name).weight)
    assert torch.equal(small.tokens, by_adamw.tokens)


def test_a_saved_state_goes_on_exactly(small):
    whole = Muon(groups(small), lr=1e-2)
    give_gradients(small, 0)
    whole.step()
    other = copy.deepcopy(small)
    resumed = Muon(groups(other), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for module, optimiser in ((small, whole), (other, resumed)):
        give_gradients(module, 1)
        optimiser.step()
    for one, another in zip(small.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)


def test_what_has_no_gradient_stays(small):
    optimiser = Muon(groups(small), lr=1e-2)
    give_gradients(small, 0)
    small.linear.weight.grad = None
    before = small.linear.weight.detach().clone()
    optimiser.step()
    assert torch.equal(small.linear.weight, before)
