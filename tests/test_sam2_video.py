"""SAM2's video model: sizes from configs, checkpoints of every layout, one hash."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vfmadapt.backbones._sam2_config import Trunk, video_config
from vfmadapt.backbones._sam2_weights import canonical
from vfmadapt.backbones.sam2_video import sam2_video
from vfmadapt.build import entry, instantiate
from vfmadapt.contracts import Backbone
from vfmadapt.errors import UserError
from vfmadapt.testing import BACKBONES, tiny_backbone

PUBLISHED = json.loads(gzip.decompress((Path(__file__).parent / "sam2" / "keys.json.gz").read_bytes()))
# entry of conf/backbone -> whose tensors its checkpoint has: MedSAM2 went on from SAM2.1 tiny, strictly, at 512 px
CHECKPOINTS = {**{f"sam2_video_{size}": size for size in PUBLISHED}, "medsam2": "tiny"}


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_backbone("sam2_video")


def sam2_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under the names of the sam2 package: those whose canonical name is in `state`."""
    points = enumerate(state["prompt_encoder.point_embed.weight"])
    found = {f"sam_prompt_encoder.point_embeddings.{i}.weight": row[None] for i, row in points}
    keys = [key for key in PUBLISHED["tiny"] if key not in found]
    keys += [f"image_encoder.trunk.blocks.{i}.proj.{kind}" for i in (2, 4) for kind in ("weight", "bias")]
    marked = {key: torch.tensor(i) for i, key in enumerate(keys)}  # blocks that widen are others in the tiny model
    for name, mark in canonical(marked).items():
        if name in state and not name.startswith("shared_image_embedding"):
            found[keys[int(mark)]] = state[name]
    return found


def test_a_frozen_backbone_like_any_other(tiny: Backbone) -> None:
    assert isinstance(tiny, Backbone)
    assert tiny.spec.dims == (16, 32, 64, 64, 128)
    assert tiny.spec.strides == (4, 8, 16, 16, 32)
    assert not any(p.requires_grad for p in tiny.parameters())
    frame = torch.randn(1, 3, 64, 64)
    theirs = tiny.net.vision_encoder.backbone(frame).intermediate_hidden_states
    for ours, stage in zip(tiny(frame, [0, 1, 3, 4]).grids, theirs, strict=True):
        torch.testing.assert_close(ours, stage.permute(0, 3, 1, 2))


def test_attention_is_that_of_transformers(tiny: Backbone) -> None:
    from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention

    for block in tiny.blocks():
        x = torch.randn(2, 4, 4, block.dim)
        torch.testing.assert_close(block.attn(x), Sam2MultiScaleAttention.forward(block.attn, x))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_checkpoints_have_exactly_our_tensors(name: str) -> None:
    from transformers import Sam2VideoModel

    settings = entry("backbone", name)
    sizes = {key: settings[key] for key in ("size", "width", "memory_layers", "hidden", "decoder_hidden")}
    with torch.device("meta"):
        own = Sam2VideoModel(video_config(Trunk(**settings["trunk"]), **sizes)).state_dict()
        theirs = canonical({key: torch.empty(shape) for key, shape in PUBLISHED[CHECKPOINTS[name]].items()})
    assert {key: tensor.shape for key, tensor in own.items()} == {key: t.shape for key, t in theirs.items()}


@pytest.mark.parametrize("layout", ["sam2.pt", "medsam2.pt", "transformers.safetensors"])
def test_every_layout_loads_strictly_and_hashes_alike(layout: str, tiny: Backbone, tmp_path: Path) -> None:
    state, path = tiny.net.state_dict(), tmp_path / layout
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": sam2_layout(state)} if layout == "sam2.pt" else sam2_layout(state), path)
    loaded = sam2_video("sam2_video", weights=str(path), seed=5, **BACKBONES["sam2_video"][1])
    assert loaded.spec.weights_hash == tiny.spec.weights_hash
    assert tiny_backbone("sam2_video", seed=5).spec.weights_hash != tiny.spec.weights_hash


def test_the_mini_is_small() -> None:
    settings = {key: value for key, value in entry("backbone", "sam2_mini").items() if key != "train_decoder"}
    mini = instantiate(settings | {"pretrained": False})
    assert sum(p.numel() for p in mini.parameters()) < 8_000_000
    assert mini.net.image_size == 256
    assert len(mini.net.memory_attention.layers) <= 2
    assert mini.net.config.memory_attention_hidden_size == 128


def test_weights_that_do_not_fit_are_named(tiny: Backbone, tmp_path: Path) -> None:
    state = sam2_layout(tiny.net.state_dict())
    cases = {
        "missing": {k: v for k, v in state.items() if k != "no_obj_ptr"},
        "unknown": state | {"more": torch.zeros(1)},
        "needed": state | {"no_obj_ptr": torch.zeros(1, 2)},
    }
    for line, wrong in cases.items():
        torch.save({"model": wrong}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=line):
            sam2_video("sam2_video", weights=str(tmp_path / "w.pt"), **BACKBONES["sam2_video"][1])
    (tmp_path / "w.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="is no checkpoint"):
        sam2_video("sam2_video", weights=str(tmp_path / "w.pt"), **BACKBONES["sam2_video"][1])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "has no weights"),
        ({"pretrained": False, "size": 100}, "multiple of 32"),
        ({"pretrained": False, "width": 64}, "multiple of 64 above 64"),
        ({"pretrained": False, "bands": 4}, "red, green and blue"),
        ({"pretrained": False, "trunk": {"width": 16, "heads": 1, "blocks": (1, 1), "global_blocks": ()}}, "4 numbers"),
    ],
)
def test_impossible_settings(settings: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        sam2_video("sam2_video", **{**BACKBONES["sam2_video"][1], **settings})
