"""Many adapter files on one frozen backbone give what each gives by itself."""

from pathlib import Path

import pytest
import torch

import vfmadapt
from vfmadapt import _hooks
from vfmadapt.build import build_model, entry
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.kernels.grouped_lora import grouped_lora
from vfmadapt.testing import BACKBONES, perturb


def spec(classes: int, mean: float = 0.4) -> DataSpec:
    named = tuple(ClassSpec(str(i), (i, i, i)) for i in range(classes))
    return DataSpec("data", ("red", "green", "blue"), named, (mean,) * 3, (0.2,) * 3)


def write(path: Path, adapter: str, data: DataSpec, family: str = "vit", **settings: object) -> Path:
    name, tiny = BACKBONES[family]
    backbone = {
        "_target_": "vfmadapt.backbones.timm_models.timm_backbone",
        "name": name,
        "pretrained": False,
        "settings": dict(tiny),
    }
    nodes = {
        "backbone": backbone,
        "adapter": {**entry("adapter", adapter), **settings},
        "head": entry("head", "linear"),
    }
    model = build_model(nodes, data)
    perturb(model.backbone, amount=0.1)
    return vfmadapt.save(path, model)


@pytest.fixture(params=["vit", "sam2_hiera", "samvit"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """Adapters that start at different blocks, heads of different sizes, one that normalises otherwise."""
    family = request.param
    return {
        "a": write(tmp_path / "a.safetensors", "earth", spec(3), family, dim=4, layers=[1, 2], fft_layers=[2]),
        "b": write(tmp_path / "b.safetensors", "earth", spec(5), family, dim=6, layers=[2], fft_layers=[]),
        "c": write(tmp_path / "c.safetensors", "earth", spec(2, mean=0.1), family, dim=6),
        "bare": write(tmp_path / "bare.safetensors", "frozen", spec(4), family),
    }


IMAGE = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(1))


def test_switching_gives_what_each_gives_alone(files: dict[str, Path]) -> None:
    bank = vfmadapt.load_many(files)
    for name in ("b", "a", "bare", "c", "a"):
        bank.use(name)
        with torch.no_grad():
            assert torch.equal(bank(IMAGE), vfmadapt.load(files[name])(IMAGE))


def test_several_on_one_image(files: dict[str, Path]) -> None:
    found = vfmadapt.load_many(files).each(IMAGE, ["c", "a", "b", "bare"])
    assert list(found) == ["c", "a", "b", "bare"]
    for name, logits in found.items():
        with torch.no_grad():
            torch.testing.assert_close(logits, vfmadapt.load(files[name])(IMAGE), rtol=0, atol=1e-5)


def test_blocks_before_the_first_adapted_one_run_once(files: dict[str, Path]) -> None:
    bank = vfmadapt.load_many(files)
    seen: list[int] = []
    for block in bank.backbone.backbone.blocks():
        block.register_forward_hook(lambda _m, args, _y: seen.append(args[0].shape[0]))
    bank.each(IMAGE, ["a", "b"])
    assert seen == [2, *[4] * (len(seen) - 1)]


def test_one_adapter_per_sample(files: dict[str, Path]) -> None:
    images = torch.rand(5, 3, 40, 52)
    names = ["b", "a", "bare", "b", "c"]
    for name, image, logits in zip(names, images, vfmadapt.load_many(files).routed(images, names), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, vfmadapt.load(files[name])(image[None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["dinov3", "samvit", "sam2_hiera"])
def test_one_adapter_per_sample_inside_attention(family: str, tmp_path: Path) -> None:
    """Within windows the batch of the attention's layers is windows, several to an image."""
    chosen = {"lora": "lora", "bits": "bit_lora", "conv": "conv_lora", "bare": "frozen"}
    files = {
        name: write(tmp_path / f"{name}.safetensors", adapter, spec(3), family) for name, adapter in chosen.items()
    }
    images = torch.rand(5, 3, 40, 52)
    names = ["conv", "bits", "bare", "lora", "bits"]
    for name, image, logits in zip(names, images, vfmadapt.load_many(files).routed(images, names), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, vfmadapt.load(files[name])(image[None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["dinov3", "samvit"])
def test_loras_act_together(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks and scales, in one operation a layer; beside another kind one after the other."""
    lora = {"lora": {"options": {"r": 2, "lora_alpha": 6}}, "rslora": {"options": {"r": 5}}, "eva": {}}
    files = {name: write(tmp_path / f"{name}.safetensors", name, spec(3), family, **lora[name]) for name in lora}
    files |= {name: write(tmp_path / f"{name}.safetensors", name, spec(3), family) for name in ("frozen", "dora")}
    bank, images, calls = vfmadapt.load_many(files), torch.rand(4, 3, 40, 52), []

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        return grouped_lora(*args)

    monkeypatch.setattr(_hooks, "grouped_lora", counted)
    for names, together in ((["rslora", "frozen", "lora", "eva"], True), (["lora", "dora", "eva", "lora"], False)):
        calls.clear()
        for name, image, logits in zip(names, images, bank.routed(images, names), strict=True):
            with torch.no_grad():
                torch.testing.assert_close(logits, vfmadapt.load(files[name])(image[None])[0], rtol=0, atol=1e-5)
        assert bool(calls) == together


def test_refusals(files: dict[str, Path], tmp_path: Path) -> None:
    bank = vfmadapt.load_many(files)
    with pytest.raises(UserError, match="no model 'x' is loaded; there are: a, b, c, bare"):
        bank.use("x")
    with pytest.raises(UserError, match="one name per image"):
        bank.routed(IMAGE, ["a"])
    other = write(tmp_path / "other.safetensors", "frozen", spec(3), "dinov3")
    with pytest.raises(UserError, match="with weights"):
        vfmadapt.load_many({"a": files["a"], "other": other})


def test_the_patch_embedding_is_a_site_too(tmp_path: Path) -> None:
    files = {name: write(tmp_path / f"{name}.safetensors", "ssf", spec(3)) for name in ("a", "b")}
    for name, logits in vfmadapt.load_many(files).each(IMAGE).items():
        with torch.no_grad():
            torch.testing.assert_close(logits, vfmadapt.load(files[name])(IMAGE), rtol=0, atol=1e-5)


def test_prompts_and_own_weights_are_refused_by_name(tmp_path: Path) -> None:
    files = {name: write(tmp_path / f"{name}.safetensors", name, spec(3)) for name in ("earth", "vpt", "bitfit")}
    bank = vfmadapt.load_many(files)
    with pytest.raises(UserError, match="vpt/main changes the sequence's length"):
        bank.each(IMAGE, ["earth", "vpt"])
    with pytest.raises(UserError, match="bitfit/main changes the frozen weights"):
        bank.routed(IMAGE, ["earth", "bitfit"])
