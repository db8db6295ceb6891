"""Conv-LoRA: its gate, its experts, windows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.adapters.conv_lora import ConvLoRA, ConvLowRank, _chances
from vfmadapt.contracts import UserError
from vfmadapt.interop import load_published
from vfmadapt.testing import adapted, loss, vit_spec


@pytest.mark.parametrize(
    ("channels", "depth", "parameters"),
    [(1280, 1, 16_080), (1280, 32, 514_560), (1024, 24, 312_192), (768, 12, 119_232)],
)
def test_published_counts(channels: int, depth: int, parameters: int) -> None:
    with torch.device("meta"):
        adapter = ConvLoRA(vit_spec(channels, depth))
    assert sum(p.numel() for p in adapter.parameters()) == parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0 above 0"),
        ({"experts": 1}, "experts=1 must be at least 2"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ConvLoRA(vit_spec(8), **settings)


def layer_of(*, published: bool = False, experts: int = 4) -> ConvLowRank:
    """One layer whose parameters all show in its output."""
    torch.manual_seed(0)
    adapter = ConvLoRA(vit_spec(6), rank=2, experts=experts, published=published)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    return adapter.eval().layers[0]


@pytest.mark.parametrize("training", [False, True])
def test_the_task_trains_the_gate_and_nothing_else_changes(training: bool) -> None:
    x = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    found = []
    for published in (False, True):
        layer = layer_of(published=published).train(training)
        torch.manual_seed(2)
        y, _ = layer(x)
        y.square().sum().backward()
        found.append((y, layer))
    (ours, layer), (theirs, original) = found
    torch.testing.assert_close(ours, theirs)
    assert layer.gate.weight.grad.any()
    assert layer.gate.noise.grad.any() == training
    assert original.gate.weight.grad is None
    others = [n for n, _ in layer.named_parameters() if not n.startswith("gate.")]
    for name in others:
        torch.testing.assert_close(layer.get_parameter(name).grad, original.get_parameter(name).grad)


def test_the_gates_gradient_is_that_of_a_soft_gate() -> None:
    """d loss / d logits = <d loss / d v_i, v_i> dp_i / d logits for the chosen i: by differences of a soft mixture."""
    layer, x = layer_of().double(), torch.randn(1, 4, 5, 6, dtype=torch.float64)
    y, _ = layer(x)
    cotangent = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, layer.gate.weight, cotangent)
    narrow = layer.narrow(x)
    pooled = narrow.mean((2, 3)).detach()
    chosen = int((pooled @ layer.gate.weight).argmax())

    def soft(weight: Tensor) -> Tensor:
        share = (pooled @ weight).softmax(1)[0, chosen]
        update = share * layer.experts[chosen](narrow)
        return (F.linear(layer.pair.scale * update.permute(0, 2, 3, 1), layer.pair.up) * cotangent).sum()

    theirs = torch.autograd.functional.jacobian(soft, layer.gate.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # the gate itself is in single precision


def test_large_activations_overflow_only_as_published() -> None:
    x = 1e4 * torch.randn(2, 4, 6, 6)
    assert torch.isfinite(layer_of()(x)[0]).all()
    assert not torch.isfinite(layer_of(published=True)(x)[0]).all()


def test_each_element_has_its_own_expert_and_noise_is_of_training_only() -> None:
    layer, x = layer_of(), torch.randn(6, 3, 5, 6)
    gates, _ = layer.gate(layer.narrow(x).mean((2, 3)))
    assert torch.equal(gates.sum(1), torch.ones(6))
    assert (gates.sum(0) > 0).sum() > 1
    together = layer(x)[0]
    alone = torch.cat([layer(x[i : i + 1])[0] for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)  # sums in another order
    assert torch.equal(layer(x)[0], together)
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


def test_what_a_compiler_sees_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(), torch.randn(6, 3, 5, 6)
    parameters = [p for n, p in layer.named_parameters() if n != "gate.noise"]

    def run() -> tuple[Tensor, ...]:
        y, loss = layer(x)
        return y, loss, *torch.autograd.grad(y.square().sum(), parameters)

    eager = run()
    monkeypatch.setattr(torch.compiler, "is_compiling", bool)
    assert all(torch.equal(a, b) for a, b in zip(run(), eager, strict=True))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(run(), eager, rtol=1e-4, atol=1e-4)


def test_balance_loss_of_known_choices() -> None:
    gate = layer_of(experts=4).gate
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1]]))
    one_each = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert gate(one_each)[1] == 0
    # all on one of M: mean B / M, unbiased variance B² / M, so M for importance and M for load
    assert gate(one_each[:1].repeat(5, 1))[1].item() == pytest.approx(0.01 * (4 + 4))


def test_chance_of_winning_by_drawing() -> None:
    made = torch.Generator().manual_seed(0)
    clean, spread = torch.randn(1, 4, generator=made), torch.rand(1, 4, generator=made) + 0.5
    noisy = clean + spread * torch.randn(1, 4, generator=made)
    drawn = clean + spread * torch.randn(50_000, 4, generator=made)
    rivals = torch.stack([noisy[0, [j for j in range(4) if j != i]].max() for i in range(4)])
    assert (_chances(clean, spread, noisy) - (drawn > rivals).float().mean(0)).abs().max() < 0.01


def test_prefix_tokens_get_plain_lora() -> None:
    adapter = ConvLoRA(vit_spec(6), rank=2, alpha=8)
    pair, x = adapter.layers[0].pair, torch.randn(2, 5, 6)
    with torch.no_grad():
        pair.up.normal_()
    torch.testing.assert_close(adapter.sites()[0].prefix_fn(x), 4 * x @ pair.down.T @ pair.up.T)


@pytest.mark.parametrize(
    ("family", "elements"),
    # SAM: 4 x 3 cells in windows of 3 x 3, the last block global. Hiera: 16 x 16 cells, halved after blocks 1, 2 and 4;
    # windows of 4, 4 and 2, one global block, windows of 2.
    [("samvit", [4, 4, 2]), ("sam2_hiera", [32, 32, 32, 2, 8])],
)
def test_the_gate_sees_windows_where_attention_is_windowed(family: str, elements: list[int]) -> None:
    model = adapted("conv_lora", family)
    seen: list[int] = []
    for layer in model.adapters["main"].layers:
        layer.gate.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 48), [model.spec.depth - 1])
    assert seen == elements


def test_blocks_that_are_computed_again_add_no_second_loss() -> None:
    model = adapted("conv_lora").train()
    model.backbone.gradient_checkpointing = True
    total = loss(model, torch.randn(2, 3, 37, 52))
    before = model.aux_loss()
    total.backward()
    assert torch.equal(model.aux_loss(), before)


def official(adapter: ConvLoRA) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i, layer in enumerate(adapter.layers):
        parts = {"lora_A": layer.pair.down, "lora_B": layer.pair.up}
        parts |= {"lora_moe_gating.w_gate": layer.gate.weight, "lora_moe_gating.w_noise": layer.gate.noise}
        for k, expert in enumerate(layer.experts):
            parts[f"lora_moe_experts.{k}.0.weight"] = expert.conv.weight
            parts[f"lora_moe_experts.{k}.0.bias"] = expert.conv.bias
        parts = {name: tensor.detach() + 1 for name, tensor in parts.items()}
        parts |= {"lora_moe_gating.mean": torch.zeros(1), "lora_moe_gating.std": torch.ones(1), "weight": torch.ones(1)}
        state |= {f"model.vision_encoder.layers.{i}.attn.qkv.{name}": tensor for name, tensor in parts.items()}
    return state


def test_official_weights_are_loaded_strictly() -> None:
    adapter = ConvLoRA(vit_spec(6, 2), experts=2)
    state, before = official(adapter), [p.detach().clone() for p in adapter.parameters()]
    load_published("conv_lora", adapter, state)
    for new, old in zip(adapter.parameters(), before, strict=True):
        torch.testing.assert_close(new, old + 1)
    stem = "model.vision_encoder.layers.1.attn.qkv."
    with pytest.raises(UserError, match=r"no 'vision_encoder\.layers\.1\.attn\.qkv\.lora_B'"):
        load_published("conv_lora", adapter, {k: v for k, v in state.items() if k != f"{stem}lora_B"})
    with pytest.raises(UserError, match=r"1 tensors are left over.*lora_moe_experts\.2\.0\.bias"):
        load_published("conv_lora", adapter, state | {f"{stem}lora_moe_experts.2.0.bias": torch.zeros(3)})
