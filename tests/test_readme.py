"""The README's Python: what it shows is what runs."""

import re
from pathlib import Path

import pytest
import timm
import torch

import vfmadapt
from vfmadapt.build import build_model, compose
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.model import AdaptedModel

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
TINY = {"embed_dim": 32, "num_heads": 2}


def block(text: str) -> str:
    """The one block that holds `text`."""
    (found,) = (b for b in BLOCKS if text in b)
    return found


def test_all_blocks_are_run_below() -> None:
    assert [block("vfmadapt.load("), block("load_many"), block("vfmadapt.adapt(net")] == BLOCKS


def write(path: Path, seed: int) -> AdaptedModel:
    spec = DataSpec(
        name="toy",
        bands=("red", "green", "blue"),
        classes=(ClassSpec("land", (10, 120, 10)), ClassSpec("sea", (10, 10, 200))),
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
    )
    cfg = compose(
        "train", ["backbone=timm", "backbone.name=vit_tiny_patch16_224", "backbone.pretrained=false", "adapter.dim=4"]
    )
    cfg.backbone.settings = {**TINY, "depth": 2}
    torch.manual_seed(seed)
    model = build_model(cfg, spec).eval()
    vfmadapt.save(path, model)
    return model


def test_load_and_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "adapter.safetensors", 0)
    monkeypatch.chdir(tmp_path)
    names = {"image": torch.rand(2, 3, 37, 53), "vfmadapt": vfmadapt}
    exec(block("vfmadapt.load("), names)
    assert names["logits"].shape == (2, 2, 37, 53)
    assert torch.equal(names["logits"], model(names["image"]))


def test_many_on_one_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clouds, fields = (write(tmp_path / f"{name}.safetensors", i) for i, name in enumerate(("clouds", "fields")))
    monkeypatch.chdir(tmp_path)
    names = {"image": torch.rand(2, 3, 37, 53), "vfmadapt": vfmadapt}
    exec(block("load_many"), names)
    with torch.no_grad():
        want = {"clouds": clouds(names["image"]), "fields": fields(names["image"])}
    for name, logits in names["both"].items():
        torch.testing.assert_close(logits, want[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(names["mixed"][0], want["fields"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(names["mixed"][1], want["clouds"][1], rtol=0, atol=1e-5)


def test_a_timm_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def without_download(name: str, *, pretrained: bool, **settings: object) -> torch.nn.Module:
        assert pretrained
        return create(name, pretrained=False, **TINY, **settings)

    monkeypatch.setattr(timm, "create_model", without_download)
    monkeypatch.chdir(tmp_path)
    names = {"image": torch.rand(2, 3, 42, 56)}
    exec(block("vfmadapt.adapt(net"), names)
    assert [tuple(grid.shape) for grid in names["features"].grids] == [(2, 32, 3, 4)] * 2
    adapted, ids = names["adapted"], {id(p) for p in names["net"].parameters()}
    assert isinstance(names["optimiser"], torch.optim.Optimizer)
    assert not any(p.requires_grad for p in names["net"].parameters())
    assert not any(id(p) in ids for p in adapted.trainable_parameters())
    again = adapted(names["image"], [5, 11])  # from the file, with what was saved
    assert all(torch.equal(a, b) for a, b in zip(again.grids, names["features"].grids, strict=True))
    with torch.no_grad():
        names["net"].blocks[0].attn.qkv.weight.add_(0.1)
    with pytest.raises(vfmadapt.UserError, match="weights"):  # "refused if net's weights are others"
        vfmadapt.adapt(names["net"], "earth.safetensors")
