"""Rein beyond its published numbers: counts, the null slot, several widths, the query link, official weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vfmadapt import check_golden
from vfmadapt.adapters.rein import Rein
from vfmadapt.errors import UserError
from vfmadapt.interop import load_published
from vfmadapt.testing import vit_spec

PYRAMID = replace(vit_spec(8, 4), dims=(8, 8, 16, 32))


@pytest.mark.parametrize(
    ("channels", "depth", "settings", "count"),
    [
        (1024, 24, {"link_queries": True}, 2_990_081),
        (768, 12, {"link_queries": True}, 1_741_569),
        (384, 12, {"link_queries": True}, 684_033),
        (1024, 24, {"link_queries": True, "rank": None}, 5_016_065),
        (1024, 24, {}, 2_990_081 - 262_400 - 196_864),
    ],
)
def test_published_counts(channels, depth, settings, count):
    with torch.device("meta"):
        adapter = Rein(vit_spec(channels, depth), **settings)
    assert sum(p.numel() for p in adapter.parameters()) == count


def test_a_patch_that_attends_to_the_first_token_gets_nothing_from_tokens():
    torch.manual_seed(0)
    adapter = Rein(vit_spec(8), tokens=5, rank=None)
    refinement = adapter.refinements["8"]
    x = torch.rand(1, 2, 3, 8) + 1  # positive, so that a large first token takes all the attention
    with torch.no_grad():
        refinement.factors[0][0, 0] = 1000.0
        y = adapter.sites()[0].fn(x)
    torch.testing.assert_close(y, x + refinement.scale * refinement.delta_map(x))


def test_one_set_of_maps_per_width():
    adapter = Rein(PYRAMID, tokens=5, rank=2, link_queries=True, query_dim=6)
    assert list(adapter.refinements) == ["8", "16", "32"]
    total = adapter.queries().sum()
    assert adapter.queries().shape == (5, 6)
    for site, channels in zip(adapter.sites(), PYRAMID.dims, strict=True):
        y = site.fn(torch.randn(1, 2, 3, channels))
        assert y.shape == (1, 2, 3, channels)
        total = total + y.square().sum()
    total.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_blocks_of_one_width_have_tokens_of_their_own():
    first, second = (site.fn for site in Rein(PYRAMID, rank=2).sites()[:2])
    x = torch.randn(1, 2, 3, 8)
    assert not torch.equal(first(x), second(x))


def test_queries_need_the_link():
    adapter = Rein(vit_spec(8))
    assert not [n for n, _ in adapter.named_parameters() if n.startswith("link")]
    with pytest.raises(UserError, match="link_queries=true"):
        adapter.queries()


@pytest.mark.parametrize(
    ("settings", "message"), [({"tokens": 1}, "tokens=1"), ({"rank": 0}, "rank=0"), ({"query_dim": 0}, "query_dim=0")]
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        Rein(vit_spec(8), **settings)
    assert "\n" not in str(caught.value)


def official(**changes):
    """Official weights of three layers of width 48: 20 tokens of rank 4, queries of 24 channels."""
    path = Path(__file__).parent / "golden" / "rein_lora_a.safetensors"
    state = {**check_golden.read(path).params, **changes}
    return {key: tensor for key, tensor in state.items() if tensor is not None}


def ours(spec=None, **settings):
    return Rein(spec or vit_spec(48, 3), **{"tokens": 20, "rank": 4, "link_queries": True, "query_dim": 24, **settings})


def test_official_weights():
    state, adapter = official(), ours()
    load_published("rein", adapter, state)
    factors = state["learnable_tokens_a"] @ state["learnable_tokens_b"]
    assert torch.equal(adapter.refinements["48"].tokens(2), factors[2])
    assert torch.equal(adapter.link.mix.bias, state["merge.bias"])


@pytest.mark.parametrize(
    ("state", "adapter", "message"),
    [
        (official(scale=None), ours(), "no 'scale'"),
        (official(more=torch.zeros(1)), ours(), "1 tensors are left over, first more"),
        (official(), ours(link_queries=False), "4 tensors are left over, first merge.bias"),
        (official(), ours(rank=None), "no 'learnable_tokens'"),
        (official(), ours(rank=8), r"learnable_tokens_a is \(3, 20, 4\), this adapter has \(3, 20, 8\)"),
        (official(), ours(PYRAMID), "blocks of one width; this backbone has 8, 16, 32"),
    ],
)
def test_official_weights_that_do_not_fit(state, adapter, message):
    with pytest.raises(UserError, match=message):
        load_published("rein", adapter, state)
