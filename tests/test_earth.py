"""Earth-Adapter's sizes, settings and layers; the frozen control; trained copies; the benchmark."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from vfmadapt import benchmark
from vfmadapt.adapters.earth import Bottleneck, Earth, FrequencyMixture
from vfmadapt.adapters.frozen import Frozen
from vfmadapt.adapters.owned import TrainedTensors
from vfmadapt.build import compose
from vfmadapt.contracts import AfterBlock, Owned, UserError
from vfmadapt.testing import vit_spec


def spec(depth=4, channels=16):
    return vit_spec(channels, depth)


FIRST_3, FIRST_6, LAST_3, LAST_6 = range(3), range(6), range(-3, 0), range(-6, 0)


@pytest.mark.parametrize(
    ("dim", "fft_layers", "parameters"),
    [
        (64, FIRST_3, 3_974_049),
        (32, LAST_3, 2_007_009),
        (16, LAST_3, 1_023_489),
        (32, LAST_6, 2_415_786),
        (24, LAST_6, 1_825_674),
        (64, FIRST_6, 4_776_234),
        (64, LAST_3, 3_974_049),
    ],
)
def test_published_parameter_counts(dim, fft_layers, parameters):
    """DINOv2-L: 24 blocks of 1024 channels."""
    with torch.device("meta"):
        adapter = Earth(spec(24, 1024), dim=dim, fft_layers=fft_layers)
    assert sum(p.numel() for p in adapter.parameters()) == parameters


def kinds(adapter):
    return {int(i): type(layer) for i, layer in adapter.layers.items()}


def test_layers():
    plain, mixed = Bottleneck, FrequencyMixture
    assert kinds(Earth(spec(5), dim=2)) == {0: plain, 1: plain, 2: mixed, 3: mixed, 4: mixed}
    assert kinds(Earth(spec(2), dim=2)) == {0: mixed, 1: mixed}
    assert kinds(Earth(spec(5), dim=2, layers=[-1, 1], fft_layers=[1])) == {1: mixed, 4: plain}
    assert kinds(Earth(spec(5), dim=2, fft_layers=[])) == dict.fromkeys(range(5), plain)
    sites = Earth(spec(5), dim=2, layers=[-1, 1]).sites()
    assert [type(s) for s in sites] == [AfterBlock, AfterBlock]
    assert [s.index for s in sites] == [1, 4]


def test_layers_of_different_width():
    pyramid = replace(vit_spec(8, 2), dims=(8, 16), strides=(4, 8))
    for site, channels in zip(Earth(pyramid, dim=2).sites(), (8, 16), strict=True):
        assert site.fn(torch.zeros(1, 3, 5, channels)).shape == (1, 3, 5, channels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"cutoff_ratio": 0.0}, "cutoff_ratio=0.0"),
        ({"cutoff_ratio": 1.5}, "cutoff_ratio=1.5"),
        ({"cutoff_ratio": float("nan")}, "cutoff_ratio=nan"),
        ({"layers": [4]}, r"layers=\[4\] must be whole numbers from -4 to 3"),
        ({"layers": []}, r"layers=\[\]"),
        ({"fft_layers": [-5]}, r"fft_layers=\[-5\]"),
        ({"fft_layers": ["last"]}, r"fft_layers=\['last'\]"),
        ({"layers": [0], "fft_layers": [1]}, r"fft_layers \[1\] are not among layers \[0\]"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        Earth(spec(), **settings)
    assert "\n" not in str(caught.value)


def test_initialisation():
    """As published: everything uniform within ±1/sqrt(fan in), scale 0.1, so a small change but no identity."""
    torch.manual_seed(0)
    adapter = Earth(spec(2, 256), dim=64, fft_layers=[1])
    mixture, plain = adapter.layers["1"], adapter.layers["0"]
    bounds = [(mixture.down, 256), (mixture.down_bias, 256), (mixture.up, 64), (mixture.up_bias, 64)]
    bounds += [(plain.down.weight, 256), (plain.down.bias, 256), (plain.up.weight, 64), (plain.up.bias, 64)]
    for tensor, fan_in in bounds:
        assert 0.9 * fan_in**-0.5 < tensor.abs().max() <= fan_in**-0.5
        assert abs(tensor.mean()) < 0.1 * fan_in**-0.5
    x = torch.randn(1, 32, 32, 256)
    for layer in (mixture, plain):
        assert layer.scale.item() == pytest.approx(0.1)
        assert 0.001 < (layer(x) - x).norm() / x.norm() < 0.05


def test_cutoff():
    layer = FrequencyMixture(4, 2, 0.3)
    assert [layer.cutoff(*size) for size in [(32, 32), (32, 14), (37, 60), (6, 6), (1, 1)]] == [4, 2, 5, 0, 0]
    assert FrequencyMixture(4, 2, 0.2).cutoff(32, 32) == 3


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (14, 6)])
def test_every_parameter_learns(size):
    torch.manual_seed(0)
    adapter, x = Earth(spec(2), dim=8, fft_layers=[1], cutoff_ratio=1.0), torch.randn(2, *size, 16)
    for site in adapter.sites():
        x = site.fn(x)
    x.square().sum().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("again", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_are_independent(again):
    adapter, x = Earth(spec(2), dim=4, fft_layers=[1]), torch.randn(1, 6, 7, 16)
    copied = again(adapter)
    for ours, theirs in zip(adapter.sites(), copied.sites(), strict=True):
        assert torch.equal(ours.fn(x), theirs.fn(x))
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    for ours, theirs in zip(adapter.sites(), copied.sites(), strict=True):
        assert torch.equal(theirs.fn(x), x)
        assert not torch.equal(ours.fn(x), x)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_the_type(autocast):
    adapter, x = Earth(spec(2), dim=4, fft_layers=[1]), torch.randn(1, 6, 7, 16)
    exact = [site.fn(x) for site in adapter.sites()]
    if not autocast:
        adapter, x = adapter.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = [site.fn(x) for site in adapter.sites()]
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == x.dtype
        torch.testing.assert_close(a.float(), b, rtol=1e-2, atol=2e-2)


def test_frozen():
    control = Frozen(spec())
    assert control.trains_nothing
    assert not list(control.parameters())
    assert not control.sites()
    assert not Earth(spec()).trains_nothing


class FakeBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.spec, self.net = spec(), nn.ModuleDict({"patch_embed": nn.Conv2d(3, 16, 4), "head": nn.Linear(4, 4)})
        self.requires_grad_(False)

    def tensors(self, role):
        return [n for n, _ in self.named_parameters() if f".{role}." in n]


def test_trained_tensors():
    backbone, adapter = FakeBackbone(), TrainedTensors(spec(), role="patch_embed")
    adapter.bind(backbone)
    (site,) = adapter.sites()
    assert isinstance(site, Owned)
    assert set(site.tensors) == {"net.patch_embed.weight", "net.patch_embed.bias"}
    frozen = dict(backbone.named_parameters())
    for name, trained in site.tensors.items():
        assert trained.requires_grad
        assert not frozen[name].requires_grad
        assert torch.equal(trained, frozen[name])
        assert trained.data_ptr() != frozen[name].data_ptr()
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in site.tensors.values()}
    assert set(copy.deepcopy(adapter).sites()[0].tensors) == set(site.tensors)


def test_trained_tensors_of_no_such_role():
    with pytest.raises(UserError, match="no tensors of role 'stem'"):
        TrainedTensors(spec(), role="stem").bind(FakeBackbone())


def small(*overrides):
    return compose("benchmark", ["tokens=[5,6]", "channels=8", "dim=2", "repeats=2", "threads=1", *overrides])


def test_benchmark():
    threads = torch.get_num_threads()
    result = json.loads(json.dumps(benchmark.main(small())))
    assert result["adapter"] == "Earth"
    for name in ("forward", "train"):
        assert result[f"{name}_ms"] > 0
        ratio = result[f"{name}_reference_ms"] / result[f"{name}_ms"]
        assert result[f"{name}_ratio"] == pytest.approx(ratio, rel=0.1, abs=0.02)
    assert result["max_difference"] < 1e-5
    assert result["max_gradient_difference"] < 1e-4
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter=frozen", "no benchmark_pair"),
        ("tokens=[5]", "tokens must be positive whole numbers"),
        ("tokens=[5,0]", "tokens"),
        ("batch=two", "batch"),
        ("dim=0", "dim=0"),
        ("adapter.fft_layers=[]", "no frequency mixture"),
    ],
)
def test_benchmark_refuses(override, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(small(override))
