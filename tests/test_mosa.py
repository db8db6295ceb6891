"""MoSA beyond its published numbers: counts, who owns what, draws, the merge, two forwards."""

from functools import partial

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from vfmadapt.adapters.mosa import Experts, MoSA, owners
from vfmadapt.errors import UserError
from vfmadapt.testing import adapted, grids, loss, perturb, vit_spec


@pytest.mark.parametrize(
    ("settings", "count"), [({"experts": 1}, 1_208_064), ({"experts": 4, "share": "down"}, 3_005_184)]
)
def test_published_counts(settings, count):
    with torch.device("meta"):
        adapter = MoSA(vit_spec(768, 12), dim=64, **settings)
    assert sum(p.numel() for p in adapter.parameters()) == count


def moved(**settings):
    """An adapter of one block whose experts differ."""
    torch.manual_seed(0)
    adapter = MoSA(vit_spec(16), **{"dim": 5, "experts": 3, "share": "none", "dropout": 0.0, **settings})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    return adapter


def branch(adapter):
    return adapter.branches["parallel"][0]


def test_every_entry_has_one_owner_and_experts_equal_shares():
    owner = owners(torch.rand(16, 5), 3)  # 80 entries: no multiple of 3
    assert sorted(owner.unique(return_counts=True)[1].tolist()) == [26, 27, 27]


def test_only_owned_entries_of_the_drawn_expert_get_a_gradient():
    down = branch(moved()).down
    down.draw = partial(torch.tensor, 1)
    down(torch.randn(4, 16)).square().sum().backward()
    got = down.weight.grad != 0
    assert torch.equal(got[1], down.owner == 1)
    assert not got[[0, 2]].any()


@pytest.mark.parametrize("published", [False, True])
def test_weight_decay_moves_foreign_entries_only_as_published(published):
    up = branch(moved(published=published)).up
    foreign = up.owner != 0
    optimiser = torch.optim.AdamW(up.parameters(), lr=0.1, weight_decay=0.5)
    before = up.expert(torch.tensor(0))[0].detach()
    up(torch.randn(4, 5)).square().sum().backward()
    optimiser.step()
    after = up.expert(torch.tensor(0))[0].detach()
    assert torch.equal(after[foreign], before[foreign]) is not published
    assert not torch.equal(after[~foreign], before[~foreign])


def test_draws():
    down, x = branch(moved()).down, torch.randn(2, 16)
    torch.manual_seed(1)
    first = [down(x).detach() for _ in range(20)]
    assert len({float(y.sum()) for y in first}) == 3
    torch.manual_seed(1)
    assert all(torch.equal(down(x), y) for y in first)


def test_evaluation_takes_the_mean_of_the_experts_as_they_are_now():
    down, x = branch(moved().eval()).down, torch.randn(2, 16)
    for _ in range(2):
        experts = [down.expert(torch.tensor(i)) for i in range(3)]
        weight, bias = (torch.stack(part).mean(0) for part in zip(*experts, strict=True))
        torch.testing.assert_close(down(x), x @ weight.T + bias)
        with torch.no_grad():
            down.weight.mul_(3)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("share", ["none", "down", "up"])
def test_experts_fold_into_one_adapter(share, published):
    adapter, x = moved(share=share, published=published).eval(), torch.randn(2, 7, 16)
    split = [name for name in ("down", "up") if isinstance(getattr(branch(adapter), name), Experts)]
    assert split == [name for name in ("down", "up") if name != share]
    deployed = MoSA(vit_spec(16), dim=5, experts=1).eval()
    deployed.load_state_dict(adapter.merged_state())
    torch.testing.assert_close(branch(deployed)(x), branch(adapter)(x))


def test_published_merge_divides_also_the_start():
    torch.manual_seed(0)
    for published, share in ((False, 1), (True, 1 / 4)):
        down = branch(MoSA(vit_spec(16), share="none", published=published)).down
        torch.testing.assert_close(down.merged()[0], share * down.start)


@pytest.mark.parametrize("style", ["adaptformer", "pfeiffer", "houlsby"])
def test_styles_start_from_the_frozen_backbone_and_train(style):
    torch.manual_seed(0)
    model, image = adapted("mosa", "dinov2_reg", settings={"style": style}), torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        fresh = grids(model, image)[-1]
        model.use()
        torch.testing.assert_close(fresh, grids(model, image)[-1])
    model.use("main")
    assert len(model.sites("main")) == 3 * (2 if style == "houlsby" else 1)
    perturb(model)
    loss(model.train(), image).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.trainable_parameters())


def test_recomputation_draws_the_same_experts():
    torch.manual_seed(0)
    model, image = adapted("mosa", "vit").train(), torch.randn(1, 3, 32, 48)
    perturb(model)
    gradients = []
    for saving in (False, True):
        model.backbone.gradient_checkpointing = saving
        model.zero_grad()
        torch.manual_seed(2)
        loss(model, image).backward()
        gradients.append([p.grad.clone() for p in model.trainable_parameters()])
    torch.testing.assert_close(*gradients)


def test_consistency_is_the_symmetric_divergence_of_two_forwards():
    torch.manual_seed(0)
    first, second = (torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(2))
    adapter = MoSA(vit_spec(8), consistency=0.5)
    assert adapter.forwards_per_step == 2
    one, two = (Categorical(logits=t.movedim(1, -1)) for t in (first, second))
    want = 0.5 * 0.5 * (kl_divergence(one, two) + kl_divergence(two, one)).mean()
    got = adapter.consistency(first, second)
    torch.testing.assert_close(got, want)
    # with the target held fixed, the gradient at a forward is that of the direction it predicts in
    direction = 0.5 * 0.5 * kl_divergence(Categorical(logits=two.logits.detach()), one).mean()
    torch.testing.assert_close(torch.autograd.grad(got, first), torch.autograd.grad(direction, first))
    assert MoSA(vit_spec(8), consistency=0).forwards_per_step == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"experts": 0}, "experts=0"),
        ({"experts": 256}, "experts=256 must be from 1 to 255"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"consistency": -1.0}, "consistency=-1.0"),
        ({"share": "both"}, "share='both'.*none, down, up"),
        ({"style": "lora"}, "style='lora'.*adaptformer, pfeiffer, houlsby"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        MoSA(vit_spec(8), **settings)
    assert "\n" not in str(caught.value)
