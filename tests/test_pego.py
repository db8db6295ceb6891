"""PEGO: counts, the loss against its direct form, and the frozen weights that it only refers to."""

import copy
from itertools import combinations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from vfmadapt.adapters.pego import Pego
from vfmadapt.contracts import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.testing import adapted, perturb, vit_spec


def test_published_count() -> None:
    with torch.device("meta"):
        adapter = Pego(vit_spec(768, 12))
    assert sum(p.numel() for p in adapter.parameters()) == 589_824


def perturbed(**settings: float) -> tuple[AdaptedBackbone, Pego]:
    torch.manual_seed(0)
    model = adapted("pego", settings=settings)
    perturb(model)
    return model, model.adapters["main"]


def test_the_loss_is_that_of_the_whole_products() -> None:
    model, adapter = perturbed(group=3, rank=2)
    base = mutual = 0
    for role, index, layer in adapter.layers.each():
        place = model.backbone.place(role, index)
        frozen = place.module.weight[slice(*place.rows)]
        products = [layer.up[:, i : i + 2] @ layer.down[i : i + 2] for i in (0, 2, 4)]
        base += sum((frozen @ product.T).abs().sum() for product in products)
        mutual += sum((a @ b.T).abs().sum() for a, b in combinations(products, 2))
    torch.testing.assert_close(adapter.orthogonality(), (base, mutual))
    torch.testing.assert_close(model.aux_loss(), 1e-3 * (base + mutual))


def test_a_single_pair_has_no_mutual_part() -> None:
    _, adapter = perturbed(group=1)
    assert adapter.orthogonality()[1] == 0


def test_without_a_weight_there_is_no_loss() -> None:
    assert adapted("pego", settings={"weight": 0.0}).aux_loss() is None


def test_no_product_of_the_full_size_waits_for_backward() -> None:
    _, adapter = perturbed()
    frozen = {weight.data_ptr() for weight, _ in adapter._frozen}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in frozen:
            kept.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        adapter.aux_loss()
    assert kept
    assert (32, 32) not in kept


def test_the_frozen_weights_are_not_its_own_and_a_copy_refers_to_its_copy() -> None:
    model, adapter = perturbed()
    weight = model.backbone.place("q", 0).module.weight
    assert not any(t is weight for t in adapter.parameters())
    assert set(adapter.state_dict()) == {name for name, _ in adapter.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.place("q", 0).module.weight.zero_()
    assert other.aux_loss() < model.aux_loss()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 0}, "group=0 must be at least 1"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"weight": -0.1}, "weight=-0.1 must not be negative"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pego(vit_spec(16), **settings)
