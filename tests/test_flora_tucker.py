"""FLoRA: counts, the update and its direct form, dropout."""

import pytest
import torch

from vfmadapt.adapters.flora_tucker import FloraTucker, TuckerUpdate
from vfmadapt.contracts import UserError
from vfmadapt.testing import vit_spec


def test_counts() -> None:
    with torch.device("meta"):
        kernel = TuckerUpdate((64, 128, 3, 3), (16, 16, 2, 2), scale=4.0)
        adapter = FloraTucker(vit_spec(768, 12), roles=["proj"])
    assert sum(p.numel() for p in kernel.parameters()) == 4108
    assert sum(p.numel() for p in adapter.parameters()) == 12 * (16 * 16 + 2 * 768 * 16)


def filled(**settings: float) -> TuckerUpdate:
    torch.manual_seed(0)
    layer = TuckerUpdate((6, 10), (2, 3), scale=0.5, **settings)
    torch.nn.init.normal_(layer.core)
    return layer


def test_the_update_on_activations_is_that_of_the_weight() -> None:
    layer, x = filled(), torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(layer(x), x @ layer.delta().T)


def test_a_kernel_is_every_core_entry_times_its_factors() -> None:
    torch.manual_seed(0)
    layer = TuckerUpdate((3, 4, 2, 5), (2, 3, 1, 2), scale=2.0)
    torch.nn.init.normal_(layer.core)
    want = 2 * torch.einsum("abcd,ia,ob,hc,wd->oihw", layer.core, *layer.factors)
    torch.testing.assert_close(layer.delta(), want)


def test_only_training_drops_inputs() -> None:
    layer, x = filled(dropout=0.5), torch.randn(8, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": (0, 4)}, r"ranks=\[0, 4\] must be two whole numbers"),
        ({"ranks": (4, 4, 2, 2)}, "two whole numbers"),
        ({"scale": 0.0}, "scale=0 switches the update off"),
        ({"dropout": 1.0}, "dropout=1.0 must be from 0 to below 1"),
        ({"roles": ["conv"]}, "no linear layers 'conv'"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FloraTucker(vit_spec(16), **settings)
