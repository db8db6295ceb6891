"""SALT, S-SAM and SVFit: counts, where the ReLU acts, and what the singular vectors must keep to."""

from pathlib import Path

import pytest
import torch

from vfmadapt.adapters.salt import Salt, SingularUpdate
from vfmadapt.check_golden import compare, read
from vfmadapt.contracts import UserError
from vfmadapt.interop.salt import replay_salt_linear, replay_salt_linear_signed
from vfmadapt.testing import adapted, vit_spec

GOLDEN = Path(__file__).parent / "golden"


def decomposed(mode_settings: dict, shape: tuple[int, int] = (40, 24)) -> tuple[SingularUpdate, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    layer = SingularUpdate(shape[1], shape[0], **mode_settings)
    layer.decompose(weight)
    return layer, weight


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 2 * 76 + 2 * 256 * (768 - 76)),
        ({"mode": "ssam"}, 2 * 768),
        ({"mode": "svfit"}, 76),
    ],
)
def test_counts_of_a_layer(settings: dict, count: int) -> None:
    with torch.device("meta"):
        adapter = Salt(vit_spec(768), roles=["fc1"], **settings)
    assert sum(p.numel() for p in adapter.parameters()) == count


def test_only_the_released_form_rectifies_off_the_diagonal() -> None:
    signed, positive = (read(GOLDEN / f"salt_linear_{name}.safetensors") for name in ("signed_a", "a"))
    assert compare(signed, replay_salt_linear(signed))[0] > 1
    assert compare(positive, replay_salt_linear_signed(positive))[0] <= 1


def test_vectors_belong_to_the_weight_and_have_one_sign() -> None:
    layer, weight = decomposed({"top": 6, "rank": 3})
    torch.testing.assert_close(layer.left * layer.values @ layer.right, weight)
    assert (layer.left.amax(0) >= -layer.left.amin(0)).all()
    mirrored = SingularUpdate(24, 40, 6, rank=3)
    mirrored.decompose(-weight)
    assert torch.equal(mirrored.left, layer.left)


def test_a_new_one_changes_no_bit() -> None:
    for settings in ({"top": 6, "rank": 3}, {"top": 6, "rank": 3, "published": True}, {"top": 24, "rank": 0}):
        layer, weight = decomposed(settings)
        assert torch.equal(layer(weight), weight)


def test_the_diagonal_is_rectified_and_nothing_else() -> None:
    layer, _ = decomposed({"top": 6, "rank": 20})
    with torch.no_grad():
        layer.scale[0] = -1
        layer.mix_in.normal_(std=20)
        changed = torch.diag(layer.values) + layer.left.T @ layer.delta() @ layer.right.T
        block = torch.diag(layer.values[6:]) + layer.mix_out @ layer.mix_in
    assert (block.diag() < 0).any()  # else nothing is tested
    torch.testing.assert_close(changed.diag()[1:6], layer.values[1:6])
    assert changed[0, 0].abs() < 1e-4
    torch.testing.assert_close(changed[6:, 6:], block - torch.diag(block.diag().clamp(max=0)), atol=1e-4, rtol=1e-4)


def test_svfit_moves_the_first_singular_values_alone() -> None:
    layer, weight = decomposed({"top": 3, "rank": 0, "scaled": False})
    offset = torch.tensor([3.0, 2.0, 1.0])
    with torch.no_grad():
        layer.shift.copy_(offset)
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(layer(weight).detach())
    torch.testing.assert_close(after, before + torch.cat([offset, torch.zeros(21)]))


def test_files_hold_no_singular_vectors() -> None:
    names = {key.rpartition(".")[2] for key in adapted("salt").adapter_state()}
    assert names == {"scale", "shift", "mix_out", "mix_in"}


def test_the_regulariser_counts_only_with_a_weight() -> None:
    assert adapted("salt").aux_loss() is None
    for mode in ("salt", "svfit", "ssam"):
        model = adapted("salt", settings={"mode": mode, "weight": 0.5})
        loss = model.aux_loss()
        assert loss == 0
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.trainable_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "lora"}, "mode=lora.*salt, svfit, ssam"),
        ({"top": 0.0}, "top=0.0 must be above 0"),
        ({"top": 1.0}, "mode=ssam trains all"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"weight": -1.0}, "weight=-1.0 must not be negative"),
        ({"roles": ["query"]}, "no linear layers 'query'"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Salt(vit_spec(16), **settings)
