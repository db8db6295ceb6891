"""SNELLA and SNELL: counts, sparsity, what backward keeps, and how the layers share their entries."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from vfmadapt.adapters.snella import KernelUpdate, Snella, share_out
from vfmadapt.contracts import UserError
from vfmadapt.testing import vit_spec


def test_counts() -> None:
    with torch.device("meta"):
        plain, mixed = (Snella(vit_spec(768, 12), mode=mode) for mode in ("snell", "snella"))
    assert sum(p.numel() for p in plain.parameters()) == 5_308_416
    assert sum(p.numel() for p in mixed.parameters()) == 5_308_416 + 3 * 72


def test_small_when_new_and_of_high_rank() -> None:
    torch.manual_seed(0)
    adapter = Snella(vit_spec(768), mode="snell", roles=["proj"])
    ((_, _, layer),) = adapter.layers.each()
    delta = layer.delta().detach()
    assert 3e-7 < delta.abs().mean() < 5e-7  # 4e-7 in the released code
    assert torch.linalg.matrix_rank(delta[:128, :128].double()) > 120  # far above the points' 32


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_sparsity_is_the_share_of_zeros(share: float) -> None:
    torch.manual_seed(0)
    adapter = Snella(vit_spec(40), mode="snell", roles=["q"], rank=4, sparsity=share)
    ((_, _, layer),) = adapter.layers.each()
    assert (layer.delta() == 0).float().mean() == pytest.approx(share, abs=2 / 1600)


def test_backward_keeps_no_update() -> None:
    torch.manual_seed(0)
    layer, kept = KernelUpdate(24, 40, rank=4, mixed=True), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(torch.randn(2, 3, 24))
    assert max(kept, default=0) < 24 * 40
    y.sum().backward()
    assert layer.inputs.grad.any()


def test_drop_path_drops_whole_images_in_training_only() -> None:
    torch.manual_seed(0)
    layer, x = KernelUpdate(6, 8, rank=4, mixed=False, drop_path=0.5), torch.randn(16, 3, 6)
    got = layer(x)
    want = layer.eval()(x)
    dropped = (got == 0).flatten(1).all(1)
    assert 0 < dropped.sum() < 16
    torch.testing.assert_close(got[~dropped], 2 * want[~dropped])


def zeros(adapter: Snella) -> list[float]:
    return [float(layer.sparsity) for _, _, layer in adapter.layers.each()]


def test_layers_compete_for_entries_on_a_cubic_curve() -> None:
    torch.manual_seed(0)
    adapter = Snella(vit_spec(20, 2), roles=["q"], rank=4, sparsity=0.6)
    layers = [layer for _, _, layer in adapter.layers.each()]
    assert zeros(adapter) == [0, 0]
    means = []
    for step in range(1, 11):
        for layer, strength in zip(layers, (1, 10), strict=True):
            layer.inputs.grad = strength * torch.rand_like(layer.inputs)
            layer.outputs.grad = strength * torch.rand_like(layer.outputs)
        adapter.after_step(step, 10)
        means.append(sum(zeros(adapter)) / 2)
    assert means == pytest.approx([0.6 * (1 - (1 - step / 10) ** 3) for step in range(1, 11)], abs=1e-5)
    assert zeros(adapter)[1] < 0.3 < 0.9 < zeros(adapter)[0] < 1


def test_between_allocations_only_the_scores_move() -> None:
    torch.manual_seed(0)
    adapter = Snella(vit_spec(8, 1), roles=["q"], rank=4)
    ((_, _, layer),) = adapter.layers.each()
    layer.inputs.grad, layer.outputs.grad = torch.ones_like(layer.inputs), torch.ones_like(layer.outputs)
    adapter.after_step(1, 1000)
    assert zeros(adapter) == [0]
    assert layer.score() > 0
    adapter.after_step(10, 1000)
    assert zeros(adapter)[0] > 0


def test_snell_keeps_its_sparsity() -> None:
    adapter = Snella(vit_spec(8, 2), mode="snell", roles=["q"], rank=4)
    adapter.after_step(10, 10)
    assert zeros(adapter) == pytest.approx([0.3, 0.3])


def test_shares_follow_the_scores_up_to_the_sizes() -> None:
    assert share_out(60, [1, 2, 3], [100, 100, 100]) == pytest.approx([10, 20, 30], rel=0.01)
    assert share_out(90, [1, 1, 98], [100, 100, 40]) == pytest.approx([25, 25, 40], rel=0.01)
    assert share_out(50, [0, 0], [100, 300]) == pytest.approx([25, 25])
    assert share_out(50, [0, 1], [100, 100])[0] > 0
    assert share_out(400, [1, 5], [100, 300]) == pytest.approx([100, 300])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "lora"}, "mode=lora.*snella, snell"),
        ({"rank": 3}, "rank=3 must be even"),
        ({"rank": 0}, "rank=0 must be even and at least 2"),
        ({"sparsity": 1.0}, "sparsity=1.0 must be from 0 to below 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"roles": ["query"]}, "no linear layers 'query'"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Snella(vit_spec(16), **settings)


def test_a_checkpoint_holds_the_moving_averages_and_the_adapter_file_does_not() -> None:
    from vfmadapt.testing import adapted, loss

    model = adapted("snella")
    loss(model.train(), torch.randn(1, 3, 32, 32)).backward()
    model.after_step(1, 10)
    state = model.training_state()
    assert any(tensor.any() for key, tensor in state.items() if key.endswith("sensitivity"))
    assert not any("sensitivity" in key for key in model.adapter_state())
