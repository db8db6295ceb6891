"""DyLoRA and SoRA: how the rank is drawn, chosen and pruned."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vfmadapt.adapters.dylora import DyLoRA
from vfmadapt.adapters.sora import SoRA
from vfmadapt.contracts import UserError
from vfmadapt.testing import adapted, grids, perturb, tiny_backbone, vit_spec


@pytest.mark.parametrize(("made", "parameters"), [(DyLoRA, 294_912), (SoRA, 295_104)])
def test_parameter_counts(made, parameters):
    """ViT-B: 12 blocks of 768 channels; LoRA's of rank 8, and SoRA's gates."""
    with torch.device("meta"):
        adapter = made(vit_spec(768, 12))
    assert sum(p.numel() for p in adapter.parameters()) == parameters


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (DyLoRA, {"rank": 0}, "rank=0"),
        (DyLoRA, {"alpha": 0.0}, "alpha=0.0"),
        (DyLoRA, {"rank": 4, "rank_used": 5}, "rank_used=5 must be from 1 to rank=4"),
        (DyLoRA, {"rank_used": 0}, "rank_used=0"),
        (SoRA, {"rank": 0}, "rank=0"),
        (SoRA, {"alpha": float("nan")}, "alpha=nan"),
        (SoRA, {"penalty": -1.0}, "penalty=-1.0"),
        (SoRA, {"threshold": -1.0}, "threshold=-1.0"),
    ],
)
def test_settings_out_of_range(made, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        made(vit_spec(16), **settings)
    assert "\n" not in str(caught.value)


def dylora(**settings):
    adapter = DyLoRA(vit_spec(6), rank=4, alpha=8.0, **settings)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter, adapter.updates["q"][0], adapter.sites()[0].fn


def lora(pair, rank, x):
    """LoRA of the first directions alone, scaled as LoRA of that rank."""
    return 8.0 / rank * x @ pair.down[:rank].T @ pair.up[:, :rank].T


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_dylora_is_lora_of_every_rank(rank):
    adapter, pair, delta = dylora(rank_used=2)
    adapter.eval()
    x = torch.randn(5, 6)
    torch.testing.assert_close(delta(x), lora(pair, 2, x))
    adapter.use_rank(rank)
    torch.testing.assert_close(delta(x), lora(pair, rank, x))


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_trains_the_drawn_rank(frozen):
    adapter, pair, delta = dylora(frozen=frozen, rank_used=1)
    adapter.train()
    adapter.drawn.fill_(3)
    x = torch.randn(5, 6)
    y = delta(x)
    torch.testing.assert_close(y, lora(pair, 3, x))
    y.square().sum().backward()
    trained = [False, False, True, False] if frozen else [True, True, True, False]
    assert pair.down.grad.any(1).tolist() == trained
    assert pair.up.grad.any(0).tolist() == trained


def test_dylora_draws_every_rank_and_keeps_the_draw():
    adapter, _, _ = dylora()
    assert adapter.drawn == 4
    draws = []
    for step in range(100):
        adapter.after_step(step + 1, 100)
        draws.append(int(adapter.drawn))
    assert set(draws) == {1, 2, 3, 4}
    again, _, _ = dylora()
    again.load_state_dict(adapter.state_dict())
    assert again.drawn == draws[-1]


@pytest.mark.parametrize(("name", "settings"), [("dylora", {"rank_used": 3}), ("sora", {"threshold": 0.5})])
def test_merges_at_the_rank_that_is_used(name, settings):
    model = adapted(name, settings=settings)
    perturb(model, amount=0.1)
    model.after_step(1, 1)
    image, plain = torch.randn(1, 3, 32, 48), tiny_backbone("vit")
    with torch.no_grad():
        frozen = plain(image, [2]).grids[0]
        plain.net.load_state_dict(model.merge().state_dict())
        want, got = grids(model, image)[-1], plain(image, [2]).grids[0]
    assert (want - frozen).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def sora(gate, **settings):
    adapter = SoRA(vit_spec(6), rank=len(gate), **settings)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    pair = adapter.updates["q"][0]
    pair.gate.data = torch.tensor(gate)
    return adapter, pair


@pytest.mark.parametrize(
    ("published", "after"), [(False, [-0.5, -0.05, 0.0, 0.0, 0.05, 0.5]), (True, [-0.5, 0, 0, 0, 0, 0.5])]
)
def test_sora_thresholds_the_gates(published, after):
    adapter, pair = sora([-0.6, -0.15, -0.05, 0.0, 0.15, 0.6], threshold=0.1, published=published)
    adapter.after_step(1, 1)
    torch.testing.assert_close(pair.gate, nn.Parameter(torch.tensor(after)))


def test_sora_penalises_the_mean_gate():
    adapter, pair = sora([1.0, -2.0, 0.0], penalty=4.0)
    adapter.updates["v"][0].gate.data.fill_(0.5)
    assert adapter.aux_loss().item() == pytest.approx(4.0 * (1 + 2 + 3 * 0.5) / 6)
    adapter.aux_loss().backward()
    torch.testing.assert_close(pair.gate.grad, torch.tensor([4 / 6, -4 / 6, 0.0]))


def test_sora_pruned_is_the_same_update_of_a_lower_rank():
    adapter, pair = sora([0.3, 0.0, -1.2, 0.0], alpha=8.0)
    x = torch.randn(5, 6)
    down, up = adapter.pruned()["q", 0]
    assert (down.shape, up.shape) == ((2, 6), (6, 2))
    torch.testing.assert_close(F.linear(F.linear(x, down), up), pair(x))
    torch.testing.assert_close(pair(x), 2.0 * ((x @ pair.down.T) * pair.gate) @ pair.up.T)
