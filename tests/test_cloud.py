"""Cloud-Adapter and its attention kernel."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vfmadapt import benchmark
from vfmadapt.adapters.cloud import Cloud
from vfmadapt.build import compose
from vfmadapt.contracts import OnImage, UserError
from vfmadapt.interop import load_published
from vfmadapt.kernels.lowrank_attention import lowrank_attention, lowrank_attention_direct
from vfmadapt.testing import adapted, loss, vit_spec


def count(channels: int, depth: int, **settings: int) -> int:
    with torch.device("meta"):
        adapter = Cloud(vit_spec(channels, depth), **settings)
    return sum(p.numel() for p in adapter.parameters())


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({}, 1_828_425),
        ({"rank": 4}, 611_913),
        ({"rank": 8}, 1_017_417),
        ({"rank": 32}, 3_450_441),
        ({"context_dim": 16}, 1_598_361),
        ({"context_dim": 32}, 1_649_449),
        ({"context_dim": 128}, 2_493_577),
    ],
)
def test_published_counts_of_dinov2_large(settings: dict[str, int], parameters: int) -> None:
    assert count(1024, 24, **settings) == parameters


@pytest.mark.parametrize(
    ("channels", "depth", "parameters"), [(384, 12, 771_657), (768, 12, 919_113), (1280, 32, 2_631_241)]
)
def test_published_counts_of_other_backbones(channels: int, depth: int, parameters: int) -> None:
    assert count(channels, depth) == parameters


def test_published_counts_of_the_parts() -> None:
    with torch.device("meta"):
        adapter = Cloud(vit_spec(1024))
    assert sum(p.numel() for p in adapter.perception.parameters()) == 206_409
    assert sum(p.numel() for p in adapter.layers.parameters()) == 67_584


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 and context_dim=64 must be at least 1"),
        ({"context_dim": 0}, "context_dim=0"),
        ({"layers": []}, r"cloud: layers=\[\] must be"),
        ({"layers": [3]}, r"layers=\[3\] must be whole numbers from -3 to 2 \(3 blocks\)"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cloud(vit_spec(8, 3), **settings)


def test_layers() -> None:
    perception, *after = Cloud(vit_spec(8, 5), layers=[-1, 1, 4]).sites()
    assert isinstance(perception, OnImage)
    assert [site.index for site in after] == [1, 4]


def operands(dtype: torch.dtype = torch.float64, rank: int = 3, width: int = 5, heads: int = 2) -> list[Tensor]:
    """7 queries and 4 keys of two images, and the four weights."""
    made = torch.Generator().manual_seed(0)
    inner = heads * width
    shapes = [(2, 7, rank), (2, 4, rank), (2, 4, rank), *[(inner, rank)] * 3, (rank, inner)]
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("rank", "width", "heads"), [(3, 5, 2), (6, 2, 3), (1, 1, 1)])
def test_kernel_is_the_direct_form(rank: int, width: int, heads: int) -> None:
    tensors = operands(rank=rank, width=width, heads=heads)
    ours, theirs = (f(*tensors, heads) for f in (lowrank_attention, lowrank_attention_direct))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, tensors, cotangent) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_direct_form_is_the_equation() -> None:
    q, k, v, q_up, k_up, v_up, down = operands()
    total = torch.zeros_like(q)
    for rows in (slice(0, 5), slice(5, 10)):
        score = (q @ q_up[rows].T) @ (k @ k_up[rows].T).transpose(1, 2) / 5**0.5
        total = total + score.softmax(-1) @ (v @ v_up[rows].T) @ down[:, rows].T
    torch.testing.assert_close(lowrank_attention_direct(q, k, v, q_up, k_up, v_up, down, 2), total)


def test_kernel_precision() -> None:
    """At most twice the error of the direct form in bfloat16."""
    exact = lowrank_attention_direct(*operands(rank=16, width=64, heads=8), 8)
    half = operands(torch.bfloat16, rank=16, width=64, heads=8)
    ours, theirs = ((f(*half, 8).double() - exact).abs().mean() for f in (lowrank_attention, lowrank_attention_direct))
    assert ours <= 2 * theirs


def test_kernel_does_less() -> None:
    tensors, work = [t.detach() for t in operands(torch.float32, rank=16, width=64, heads=8)], []
    tensors[:3] = [torch.randn(1, 512, 16) for _ in range(3)]
    for attend in (lowrank_attention, lowrank_attention_direct):
        with FlopCounterMode(display=False) as counter:
            attend(*tensors, 8)
        work.append(counter.get_total_flops())
    assert work[0] < work[1] / 3


def test_kernel_refuses_shapes_that_do_not_fit() -> None:
    q, k, v, q_up, k_up, v_up, down = operands()
    for wrong in (
        (q, k, v[:, 1:], q_up, k_up, v_up, down),
        (q, k, v, q_up[1:], k_up, v_up, down),
        (q[0], k, v, q_up, k_up, v_up, down),
    ):
        with pytest.raises(ValueError, match="do not fit 2 heads"):
            lowrank_attention(*wrong, 2)
    with pytest.raises(ValueError, match="do not fit 3 heads"):
        lowrank_attention(q, k, v, q_up, k_up, v_up, down, 3)


@pytest.mark.parametrize("size", [(37, 52), (5, 7), (64, 16)])
def test_context_has_a_cell_per_16_pixels(size: tuple[int, int]) -> None:
    adapter = Cloud(replace(vit_spec(8), bands=6), context_dim=4).eval()
    perception, after = adapter.sites()
    context = perception.fn(torch.randn(2, 6, *size))
    assert context.shape == (2, 4, -(-size[0] // 16), -(-size[1] // 16))
    grid = torch.randn(2, 3, 9, 8)
    assert after.fn(grid, context).shape == grid.shape


def test_statistics_move_in_training_only_and_belong_to_the_file() -> None:
    model = adapted("cloud")
    image = torch.randn(2, 3, 37, 52)
    norm = model.adapters["main"].perception.first.norm1
    model(image, [2])
    assert norm.num_batches_tracked == 0
    model.train()(image, [2])
    assert norm.num_batches_tracked == 1
    state = model.adapter_state()
    assert "adapters.main.perception.first.norm1.running_mean" in state
    fresh = adapted("cloud", seed=1)
    fresh.load_adapter_state(state)
    assert torch.equal(fresh.adapters["main"].perception.first.norm1.running_mean, norm.running_mean)


def test_the_image_is_read_once_although_blocks_are_recomputed() -> None:
    model = adapted("cloud").train()
    model.backbone.gradient_checkpointing = True
    loss(model, torch.randn(2, 3, 37, 52)).backward()
    assert model.adapters["main"].perception.first.norm1.num_batches_tracked == 1


def test_benchmark() -> None:
    small = ["adapter=cloud", "tokens=[5,6]", "channels=8", "repeats=1", "threads=1"]
    result = json.loads(json.dumps(benchmark.main(compose("benchmark", small))))
    assert result["adapter"] == "Cloud"
    assert result["max_difference"] < 1e-5
    assert result["max_gradient_difference"] < 1e-4


NAMES = {
    "perception.first": "cnn.proj_1x1",
    "perception.levels": "cnn.spp_dw",
    "spatial": "conv_dw",
    "mix": "conv_pw",
    "norm1": "bn1",
    "norm2": "bn2",
    "layers.1": "net.0.attn",
    "layers.2": "net.1.attn",
    "query": "to_q.loramlp",
    "key": "to_k.loramlp",
    "value": "to_v.loramlp",
    "out": "to_out.loramlp",
}


def test_official_weights_are_loaded_strictly() -> None:
    adapter = Cloud(vit_spec(6, 3), rank=2, context_dim=4, layers=[1, 2])
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    state = {}
    for name, tensor in before.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor + 1
    assert {"cnn.spp_dw.4.bn2.running_var", "net.1.attn.to_out.loramlp.1.weight"} < state.keys()
    load_published("cloud", adapter, state)
    for name, tensor in adapter.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 1)
    with pytest.raises(UserError, match=r"no 'net\.1\.attn\.to_k\.loramlp\.0\.weight'"):
        load_published("cloud", adapter, {k: v for k, v in state.items() if k != "net.1.attn.to_k.loramlp.0.weight"})
    with pytest.raises(UserError, match=r"1 tensors are left over, first net\.2"):
        load_published("cloud", adapter, state | {"net.2.attn.to_q.loramlp.0.weight": torch.zeros(1)})
