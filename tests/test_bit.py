"""The 1-bit adapters: codebook, packed layout and files, sizes, merging; the 1-bit head."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm

from vfmadapt.adapters._quantised import QuantisedLinear, dump, load, pack, unpack
from vfmadapt.adapters.bit_adaptformer import BitAdaptFormer
from vfmadapt.adapters.bit_lora import BitLoRA
from vfmadapt.check_golden import read
from vfmadapt.contracts import Features, UserError
from vfmadapt.heads.bit_linear import BitLinearHead
from vfmadapt.host import AdaptedBackbone
from vfmadapt.interop import load_published
from vfmadapt.kernels.bit_linear import bit_linear, bit_linear_reference, codebook, fake_quantise, quantise
from vfmadapt.testing import adapted, grids, perturb, tiny_backbone, vit_spec

METHODS = {"bit_adaptformer": BitAdaptFormer, "bit_lora": BitLoRA}
BITS = (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("method", "dim", "weights", "size"),
    [
        ("bit_adaptformer", 32, 589_824, 73_920),
        ("bit_adaptformer", 1, 18_432, 2_496),
        ("bit_lora", 32, 1_179_648, 147_840),
        ("bit_lora", 1, 36_864, 4_992),
    ],
)
def test_published_sizes(method, dim, weights, size):
    """ViT-B: 12 blocks of 768 channels."""
    with torch.device("meta"):
        adapter = METHODS[method](vit_spec(768, 12), dim=dim)
    assert sum(p.numel() for p in adapter.parameters()) == weights
    assert adapter.packed_bytes() == size


def test_size_grows_with_the_bits():
    with torch.device("meta"):
        sizes = [BitAdaptFormer(vit_spec(768, 12), bits=bits).packed_bytes() - 192 for bits in BITS]
    assert sizes == [73_728 * bits for bits in BITS]


def test_codebook():
    assert codebook(1) == pytest.approx((-0.67449, 0.67449), abs=1e-5)
    assert codebook(2) == pytest.approx((-1.26572, -0.37775, 0.37775, 1.26572), abs=1e-5)
    levels = torch.tensor(codebook(4), dtype=torch.float64)
    edges = norm.cdf(((levels[1:] + levels[:-1]) / 2).numpy())
    below, above = [0.0, *edges], [*edges, 1.0]
    assert norm.cdf(levels.numpy()) == pytest.approx([(a + b) / 2 for a, b in zip(below, above, strict=True)], abs=1e-7)
    assert len(set(codebook(8))) == 256


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codebook_is_the_published_one_to_the_last_bit(bits):
    published = read(Path(__file__).parent / f"golden/bit{bits}_linear_a.safetensors").stored["output/codebook"]
    assert torch.equal(torch.tensor(codebook(bits)), published)


def test_packed_layout():
    assert pack(torch.tensor([1, 0, 0, 0, 0, 1, 0, 0, 1]), 1).tolist() == [0b00100001, 1]
    assert pack(torch.tensor([[3, 0], [1, 2], [2, 1]]), 2).tolist() == [0b10010011, 0b0110]
    assert pack(torch.tensor([10, 5, 15]), 4).tolist() == [0x5A, 0x0F]
    assert pack(torch.tensor([0, 200, 255]), 8).tolist() == [0, 200, 255]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 7, 16, 33])
def test_unpacking_gives_every_code_back(bits, count):
    codes = torch.randint(2**bits, (count,))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packed_layer_acts_as_the_trained_one(bits):
    weight, x = torch.randn(5, 11, dtype=torch.float64), torch.randn(2, 3, 11, dtype=torch.float64)
    levels = torch.tensor(codebook(bits), dtype=torch.float64)
    codes, mean, deviation = quantise(weight, levels)
    packed = (x, pack(codes, bits), mean, deviation, levels, 5)
    want = F.linear(x, fake_quantise(weight, levels))
    for form in (bit_linear, bit_linear_reference):
        torch.testing.assert_close(form(*packed), want, rtol=0, atol=1e-14)
        with pytest.raises(ValueError, match="bit_linear: packed is"):
            form(x[..., :2], *packed[1:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_packed_file(method, bits, tmp_path):
    settings = {"dim": 3, "bits": bits}
    trained, image = adapted(method, settings=settings), torch.randn(1, 3, 33, 48)
    perturb(trained)
    path = tmp_path / "adapter.bin"
    trained.adapters["main"].export_packed(path)
    assert path.stat().st_size == trained.adapters["main"].packed_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.bin"]
    frozen = tiny_backbone("vit")
    fresh = METHODS[method](frozen.spec, **settings)
    assert not fresh.trains_nothing
    fresh.load_packed(path)
    assert fresh.trains_nothing
    model = AdaptedBackbone(frozen, {"main": copy.deepcopy(fresh)})
    with torch.no_grad():
        for ours, theirs in zip(grids(model, image), grids(trained, image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert dump(fresh.quantised_linears()) == path.read_bytes()


def test_loaded_codes_merge(tmp_path):
    model, image = adapted("bit_lora"), torch.randn(1, 3, 32, 48)
    perturb(model)
    model.adapters["main"].export_packed(tmp_path / "a.bin")
    model.adapters["main"].load_packed(tmp_path / "a.bin")
    plain = tiny_backbone("vit")
    plain.net.load_state_dict(model.merge().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(image, [2]).grids[0], model(image, [2]).grids[0], rtol=1e-5, atol=1e-5)


def test_packed_files_that_do_not_fit(tmp_path):
    linears = [QuantisedLinear(16, 4, 1), QuantisedLinear(4, 16, 1)]
    data = dump(linears)
    with pytest.raises(UserError, match=r"31 bytes, this adapter takes 32"):
        load(linears, data[:-1])
    with pytest.raises(UserError, match="another layout"):
        load(linears, data[:16] + b"\xff" * 16)
    assert all(linear.weight is not None for linear in linears)
    with pytest.raises(UserError, match="no such packed file"):
        BitLoRA(vit_spec(16)).load_packed(tmp_path / "none.bin")


def test_plain_weights_are_not_packed(tmp_path):
    adapter = BitLoRA(vit_spec(16), bits=32)
    assert all(not layer["q"].up.weight.any() for layer in adapter.layers)
    with pytest.raises(UserError, match="bits=32 has no codes to pack"):
        adapter.packed_bytes()
    with pytest.raises(UserError, match="bits=32 has no codes to pack"):
        adapter.export_packed(tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", [0, 3 * 17 * 4, 3 * 16 // 8 + 8], ids=["no head", "float head", "1-bit head"])
def test_published_file_ends_with_the_classifier(method, head):
    trained, ours = (METHODS[method](vit_spec(16, 2), dim=4) for _ in range(2))
    data = dump(trained.quantised_linears())
    load_published(method, ours, {"packed": torch.tensor(list(data + b"\x07" * head), dtype=torch.uint8)})
    assert dump(ours.quantised_linears()) == data


def test_a_file_of_another_layout_is_noticed():
    """The published sizes do not say where the two floats of a layer lie; here they come first."""
    adapter = BitAdaptFormer(vit_spec(16, 12), dim=4)
    layers = [dump([linear]) for linear in adapter.quantised_linears()]
    data = b"".join(layer[-8:] + layer[:-8] for layer in layers)
    with pytest.raises(UserError, match="another layout"):
        load_published("bit_adaptformer", adapter, {"packed": torch.tensor(list(data), dtype=torch.uint8)})


def test_published_file_is_loaded_strictly():
    adapter = BitAdaptFormer(vit_spec(16, 2), dim=4)
    data = torch.tensor(list(dump(adapter.quantised_linears())), dtype=torch.uint8)
    for wrong, message in [
        ({"packed": data[:-1]}, "bytes, but this adapter takes"),
        ({"packed": F.pad(data, (0, 9))}, "68 per class"),
        ({"packed": data, "head": data}, "1 tensors are left over, first head"),
        ({}, "no 'packed'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_published("bit_adaptformer", adapter, wrong)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "setting", [{"bits": 3}, {"bits": 16}, {"dim": 0}, {"scale": 0.0}, {"scale": float("inf")}, {"dropout": 1.0}]
)
def test_settings_out_of_range(method, setting):
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"{method}: {name}={value} must be") as caught:
        METHODS[method](vit_spec(16), **setting)
    assert "\n" not in str(caught.value)


def test_starts_near_the_identity():
    bottleneck = BitAdaptFormer(vit_spec(64)).eval().layers[0]
    assert 0 < bottleneck.up.weight.abs().max() <= 2e-3
    x = torch.randn(50, 64)
    assert 0 < bottleneck(x).norm() / x.norm() < 0.01


def test_adaptformer_has_a_relu_and_lora_has_none():
    x = torch.randn(9, 16)
    relu = BitAdaptFormer(vit_spec(16), dim=4, scale=10.0).eval().layers[0]
    linear = BitLoRA(vit_spec(16), dim=4, scale=10.0).eval().layers[0]["v"]
    torch.testing.assert_close(linear(-x), -linear(x))
    assert not torch.allclose(relu(-x), -relu(x))
    assert not torch.equal(relu.train()(x), relu(x))  # dropout


def test_binary_head():
    spec = vit_spec(16, 2)
    head = BitLinearHead(spec, num_classes=3, cells=2)
    features = Features((torch.randn(1, 16, 2, 3),), (torch.zeros(1, 0, 16),), head.layers, (16,))
    logits = head(features, (30, 48))
    assert logits.shape == (1, 3, 30, 48)
    assert [n for n, _ in head.classifier.named_parameters()] == ["weight"]
    assert head.classifier(torch.eye(16)).unique().numel() == 2
    logits.square().sum().backward()
    assert head.classifier.weight.grad.all()
