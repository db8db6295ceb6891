"""SAM's and SAM2's image encoders: their published checkpoints, any size, the tiny one."""

import gzip
import json
from pathlib import Path

import pytest
import timm
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT

from vfmadapt import params
from vfmadapt.backbones._sam_weights import encoder_of
from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.build import compose, names
from vfmadapt.errors import UserError
from vfmadapt.testing import BACKBONES, tiny_backbone

TIMM = {"vit_b": "samvit_base_patch16", "vit_l": "samvit_large_patch16", "vit_h": "samvit_huge_patch16"}
PUBLISHED = json.loads(gzip.decompress((Path(__file__).parent / "sam2" / "keys.json.gz").read_bytes()))
TINY_SAM = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "img_size": 64,
    "window_size": 3,
    "global_attn_indexes": (2,),
    "neck_chans": 16,
}


def shapes(state):
    return {k: tuple(v.shape) for k, v in state.items()}


def official_encoder() -> ImageEncoderViT:
    """segment-anything's own, in the sizes of TINY_SAM, with positions that are not zero."""
    torch.manual_seed(3)
    made = ImageEncoderViT(
        img_size=64,
        embed_dim=32,
        depth=3,
        num_heads=2,
        out_chans=16,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(2,),
    ).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "pos" in name:
                parameter.normal_(std=0.2)
    return made


@pytest.mark.parametrize("size", TIMM)
def test_every_tensor_of_sams_encoders_has_its_place(size):
    with torch.device("meta"):
        published = sam_model_registry[size]().state_dict()
        net = timm.create_model(TIMM[size], num_classes=0)
    assert shapes(encoder_of(published)) == shapes(net.state_dict())


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_tensor_of_sam2s_trunks_has_its_place(size):
    """Names and shapes are those of the models that the sam2 package builds (tools/record_sam2_manifest.py)."""
    name = f"sam2_hiera_{size}"
    assert name in names("backbone")
    with torch.device("meta"):
        published = {key: torch.empty(shape) for key, shape in PUBLISHED[size].items()}
        net = timm.create_model(name, num_classes=0)
    own = {k: v for k, v in net.state_dict().items() if not k.startswith("head.")}
    assert shapes(encoder_of(published)) == shapes(own)


def test_transformers_names_are_known():
    from transformers import Sam2Config, Sam2Model, SamConfig, SamModel

    with torch.device("meta"):
        found = {
            "samvit_base_patch16": encoder_of(SamModel(SamConfig()).state_dict()),
            "sam2_hiera_tiny": encoder_of(Sam2Model(Sam2Config()).state_dict()),
        }
        for name, state in found.items():
            own = timm.create_model(name, num_classes=0).state_dict()
            assert state.keys() == {k for k in own if not k.startswith("head.")}
    with torch.device("meta"):
        own = timm.create_model("samvit_base_patch16", num_classes=0).state_dict()
    assert shapes(found["samvit_base_patch16"]) == shapes(own)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_an_official_file_gives_the_official_embedding(suffix, tmp_path):
    official = official_encoder()
    state = {f"image_encoder.{k}": v for k, v in official.state_dict().items()} | {"mask_decoder.x": torch.ones(1)}
    write(state, tmp_path / f"sam.{suffix}")
    backbone = timm_backbone(TIMM["vit_b"], weights=str(tmp_path / f"sam.{suffix}"), settings=TINY_SAM)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = backbone.net.neck(backbone(image, [2]).grids[0])
        torch.testing.assert_close(ours, official(image), atol=1e-3, rtol=1e-3)  # LayerNorm's eps is 1e-5 in timm


def test_sam2_file(tmp_path):
    source = tiny_backbone("sam2_hiera", seed=5)
    own = {k: v for k, v in source.net.state_dict().items() if not k.startswith("head.")}
    trunk = {k.replace("mlp.fc1", "mlp.layers.0").replace("mlp.fc2", "mlp.layers.1"): v for k, v in own.items()}
    torch.save({"model": {f"image_encoder.trunk.{k}": v for k, v in trunk.items()}}, tmp_path / "sam2.1.pt")
    name, settings = BACKBONES["sam2_hiera"]
    loaded = timm_backbone(name, weights=str(tmp_path / "sam2.1.pt"), settings=dict(settings))
    image = torch.randn(1, 3, 70, 50)
    assert torch.equal(loaded(image, [3]).grids[0], source(image, [3]).grids[0])


def write(state, path: Path) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("image_encoder.blocks.1.attn.qkv.bias"), r"missing, first blocks\.1\.attn\.qkv\.bias"),
        (lambda s: s.update({"image_encoder.extra": torch.ones(1)}), "left over, first extra"),
        (lambda s: s.update({"image_encoder.pos_embed": torch.ones(1)}), "pos_embed"),
    ],
    ids=["missing", "left over", "other shape"],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    state = {f"image_encoder.{k}": v for k, v in official_encoder().state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(UserError, match=message) as raised:
        timm_backbone(TIMM["vit_b"], weights=str(tmp_path / "sam.pth"), settings=TINY_SAM)
    assert "\n" not in str(raised.value)


def test_sam_tiny_is_small():
    result = params.main(compose("params", ["backbone=sam_tiny", "head=sam_tiny", "adapter=frozen"]))
    assert result["backbone_params"] + result["head_params"] <= 6_000_000


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (7, 19)], ids=str)
def test_sam_tiny_takes_any_size(size):
    from vfmadapt.build import build_backbone

    cfg = compose("train", ["backbone=sam_tiny", "adapter=frozen"])
    backbone = build_backbone(cfg.backbone, cfg.adapter, ("red", "green", "blue"))
    grid = backbone(torch.randn(1, 3, *size), [5]).grids[0]
    assert grid.shape == (1, 224, -(-size[0] // 8), -(-size[1] // 8))
    assert grid.isfinite().all()
