"""The adapter file: what is in it, that it rebuilds the model, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vfmadapt
from vfmadapt.build import build_model, compose
from vfmadapt.checkpoint import read_header
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.model import AdaptedModel

SPEC = DataSpec(
    name="toy",
    bands=("red", "green", "blue", "nir"),
    classes=(ClassSpec("land", (10, 120, 10)), ClassSpec("sea", (10, 10, 200))),
    mean=(0.1, 0.2, 0.3, 0.4),
    std=(0.5, 0.5, 0.5, 0.5),
)
TINY = [
    "backbone=timm",
    "backbone.name=vit_tiny_patch16_224",
    "backbone.pretrained=false",
    "backbone.settings={embed_dim: 32, depth: 4, num_heads: 2}",
]


def model(*overrides: str) -> AdaptedModel:
    torch.manual_seed(1)
    return build_model(compose("train", [*TINY, *overrides]), SPEC).eval()


def test_file_rebuilds_the_model(tmp_path: Path) -> None:
    trained = model("head=fpn")
    path = vfmadapt.save(tmp_path / "a.safetensors", trained, training={"seed": 3})
    loaded = vfmadapt.load(path)
    image = torch.randn(2, 4, 37, 53)
    with torch.no_grad():
        assert torch.equal(loaded(image), trained(image))
    assert loaded.spec == SPEC
    assert not loaded.training


def test_file_holds_only_what_was_trained(tmp_path: Path) -> None:
    trained = model()
    path = vfmadapt.save(tmp_path / "a.safetensors", trained)
    state = load_file(path)
    assert state.keys() == trained.adapter_state().keys()
    assert not any("net." in k for k in state)
    header = read_header(path)
    assert header["backbone"]["weights_hash"] == trained.backbone.spec.weights_hash
    assert header["data"]["bands"] == list(SPEC.bands)
    assert header["data"]["classes"][1] == {"name": "sea", "colour": [10, 10, 200], "line": False}
    assert set(header["versions"]) == {"vfmadapt", "torch", "timm"}


def test_trained_patch_embedding_is_stored(tmp_path: Path) -> None:
    trained = model("backbone.train_patch_embed=true")
    with torch.no_grad():
        for parameter in trained.backbone.adapters["patch_embed"].parameters():
            parameter.add_(0.1)
    loaded = vfmadapt.load(vfmadapt.save(tmp_path / "a.safetensors", trained))
    image = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(image), trained(image))
        assert not torch.equal(loaded(image), model()(image))
    assert loaded.backbone.spec.weights_hash == model().backbone.spec.weights_hash


def rewrite(path: Path, **changes: object) -> Path:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vfmadapt"])
    header.update(changes)
    save_file(load_file(path), path, metadata={"vfmadapt": json.dumps(header)})
    return path


def test_other_backbone_weights_are_refused(tmp_path: Path) -> None:
    path = vfmadapt.save(tmp_path / "a.safetensors", model())
    config = read_header(path)["config"]
    config["backbone"]["seed"] = 5
    with pytest.raises(UserError, match=r"was trained on vit_tiny_patch16_224 with weights \w{12}"):
        vfmadapt.load(rewrite(path, config=config))


def test_targets_outside_the_package_are_refused(tmp_path: Path) -> None:
    path = vfmadapt.save(tmp_path / "a.safetensors", model())
    config = read_header(path)["config"]
    config["head"] = {"_target_": "os.system", "command": "true"}
    with pytest.raises(UserError, match=r"_target_ 'os\.system' is not allowed"):
        vfmadapt.load(rewrite(path, config=config))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such adapter file"):
        vfmadapt.load(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="is not an adapter file"):
        vfmadapt.load(tmp_path / "junk.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="is not an adapter file"):
        vfmadapt.load(tmp_path / "foreign.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "pickle.safetensors")
    with pytest.raises(UserError, match="is not an adapter file"):
        vfmadapt.load(tmp_path / "pickle.safetensors")
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        vfmadapt.save(tmp_path / "a.pt", model())
    path = vfmadapt.save(tmp_path / "later.safetensors", model())
    with pytest.raises(UserError, match="upgrade it"):
        vfmadapt.load(rewrite(path, format=99))


def test_missing_and_changed_tensors_are_named(tmp_path: Path) -> None:
    trained = model()
    state = trained.adapter_state()
    first = next(iter(state))
    with pytest.raises(UserError, match="1 tensors missing"):
        trained.load_adapter_state({k: v for k, v in state.items() if k != first})
    with pytest.raises(UserError, match="needed"):
        trained.load_adapter_state({**state, first: torch.zeros(7)})


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def fails(_state: object, where: Path, metadata: object) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        vfmadapt.save(tmp_path / "a.safetensors", model())
    assert list(tmp_path.iterdir()) == []


def test_library_use_without_hydra_or_lightning(tmp_path: Path) -> None:
    import timm

    def own_model() -> torch.nn.Module:
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, embed_dim=32, depth=4, num_heads=2
        )

    adapted = vfmadapt.adapt(own_model(), "earth", dim=8)
    optimiser = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    image = torch.randn(2, 3, 40, 56)
    for _ in range(2):
        optimiser.zero_grad()
        adapted(image, [3]).grids[0].square().mean().backward()
        optimiser.step()
    adapted.eval()
    vfmadapt.save(tmp_path / "earth.safetensors", adapted)
    again = vfmadapt.adapt(own_model(), tmp_path / "earth.safetensors")
    with torch.no_grad():
        assert torch.equal(again(image, [3]).grids[0], adapted(image, [3]).grids[0])
    with pytest.raises(UserError, match=r"attach it with vfmadapt\.adapt"):
        vfmadapt.load(tmp_path / "earth.safetensors")


def test_invalid_pixels_never_spread() -> None:
    trained = model()
    image = torch.rand(1, 4, 32, 32)
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    valid[0, 3, 5] = False
    for garbage in (float("nan"), float("inf"), 1e9):
        spoiled = image.clone()
        spoiled[0, :, 3, 5] = garbage
        clean = image.clone()
        clean[0, :, 3, 5] = torch.tensor(SPEC.mean)
        with torch.no_grad():
            torch.testing.assert_close(trained(spoiled, valid), trained(clean))


def test_wrong_bands_are_refused() -> None:
    with pytest.raises(UserError, match=r"takes images \(B, 4, H, W\) with the bands red, .* got \(1, 3, 32, 32\)"):
        model()(torch.zeros(1, 3, 32, 32))
