"""Depth Anything's checkpoints, versions 1 and 2: loaded strictly, and the numbers of transformers' model."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.errors import UserError
from vfmadapt.heads.dpt import DPTHead
from vfmadapt.heads.endodac import EndoDACHead
from vfmadapt.testing import vit_spec

MANIFEST = Path(__file__).parent / "golden" / "depth_anything_keys.txt"
DIM, DEPTH, WIDTH, SIDE = 32, 4, 8, 70
TINY = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2, "img_size": SIDE}


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under the release's names."""
    found: dict[str, Tensor] = {}
    fused = {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"(.*attention)\.([qkv])_proj\.(weight|bias)", key):
            fused.setdefault((match[1], match[3]), {})[match[2]] = tensor
            continue
        for theirs, ours in RENAMED:
            key = re.sub(theirs, ours, key)
        key = re.sub(r"fusion_stage\.layers\.(\d)", lambda m: f"refinenet{4 - int(m[1])}", key)
        key = re.sub(r"scratch\.convs\.(\d)\.weight", lambda m: f"scratch.layer{int(m[1]) + 1}_rn.weight", key)
        found[key] = tensor
    for (stem, kind), parts in fused.items():
        key = stem.replace("backbone.encoder.layer.", "pretrained.blocks.").replace("attention", "attn.qkv")
        found[f"{key}.{kind}"] = torch.cat([parts[name] for name in "qkv"])
    return found


RENAMED = [
    (r"backbone\.embeddings\.patch_embeddings\.projection", "pretrained.patch_embed.proj"),
    (r"backbone\.embeddings\.position_embeddings", "pretrained.pos_embed"),
    (r"backbone\.embeddings\.", "pretrained."),
    (r"backbone\.encoder\.layer\.", "pretrained.blocks."),
    (r"backbone\.layernorm", "pretrained.norm"),
    (r"attention\.o_proj", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"neck\.reassemble_stage\.layers\.(\d)\.projection", r"depth_head.projects.\1"),
    (r"neck\.reassemble_stage\.layers\.(\d)\.resize", r"depth_head.resize_layers.\1"),
    (r"neck\.", "depth_head.scratch."),
    (r"residual_layer(\d)\.convolution(\d)", r"resConfUnit\1.conv\2"),
    (r"(layers\.\d)\.projection", r"\1.out_conv"),
    (r"head\.conv1", "depth_head.scratch.output_conv1"),
    (r"^head\.conv2", "depth_head.scratch.output_conv2.0"),
    (r"^head\.conv3", "depth_head.scratch.output_conv2.2"),
]


@pytest.fixture(scope="module")
def published():
    """A tiny Depth Anything of transformers that reads all four blocks."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(0)
    trunk = Dinov2Config(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
        layerscale_value=0.5,
        initializer_range=0.2,
    )
    config = DepthAnythingConfig(
        backbone_config=trunk,
        reassemble_hidden_size=DIM,
        patch_size=14,
        neck_hidden_sizes=[4, 8, 16, 32],
        fusion_hidden_size=WIDTH,
        head_hidden_size=32,
    )
    model = DepthAnythingForDepthEstimation(config).eval()
    for part in (model.neck, model.head):  # they start so small that nothing would show
        for parameter in part.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
    return model


@pytest.fixture(scope="module")
def file(published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "depth_anything_v2_tiny.pth"
    torch.save(published_names(published.state_dict()), path)
    return path


def trunk(path: Path):
    return timm_backbone("vit_small_patch14_dinov2", weights=str(path), settings=dict(TINY))


def test_one_file_gives_trunk_and_head_with_the_published_numbers(published, file: Path) -> None:
    backbone = trunk(file)
    head = DPTHead(backbone.spec, num_classes=1, width=WIDTH, weights=str(file)).eval()
    image = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        want = published(image).predicted_depth
        got = head(backbone(image, head.layers), (SIDE, SIDE))[:, 0].relu()
    assert want.std() > 1e-3
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)  # float32 through two networks


@pytest.mark.parametrize(
    ("version", "size", "channels", "width", "stages"),
    [("v1", "vits", 384, 64, None), ("v2", "vitb", 768, 128, None), ("v2", "vitl", 1024, 256, (256, 512, 1024, 1024))],
)
def test_released_layouts(version: str, size: str, channels: int, width: int, stages: tuple[int, ...] | None) -> None:
    """The head's tensors as the release's code names and shapes them, the same in both versions."""
    from vfmadapt.heads._depth_anything import _named

    with torch.device("meta"):
        head = DPTHead(vit_spec(channels, 12), num_classes=1, width=width, stages=stages)
    ours = {f"depth_head.{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in _named(head)}
    listed = (line.split(" ", 1) for line in MANIFEST.read_text().splitlines() if not line.startswith("#"))
    wanted = {rest for name, rest in listed if name == size and "refinenet4.resConfUnit1" not in rest}
    assert ours == wanted, version


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("depth_head.scratch.layer1_rn.weight", None, "scratch.layer1_rn.weight is missing"),
        ("depth_head.scratch.stem.weight", torch.zeros(1), "scratch.stem.weight is left over"),
        ("depth_head.projects.0.bias", torch.zeros(5), r"projects.0.bias is \(5,\), needed \(4,\)"),
        ("pretrained.norm.weight", None, "pretrained.norm.weight is missing"),
    ],
)
def test_the_head_is_loaded_strictly(file: Path, tmp_path: Path, key: str, change: Tensor | None, message: str) -> None:
    state = torch.load(file, weights_only=True)
    state.pop(key, None)
    if change is not None:
        state[key] = change
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(UserError, match=message):
        DPTHead(vit_spec(DIM, DEPTH), num_classes=1, width=WIDTH, weights=str(tmp_path / "changed.pth"))


def test_the_trunk_is_loaded_strictly(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    torch.save(state | {"pretrained.blocks.9.norm1.weight": torch.zeros(DIM)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"1 of \d+ tensors are left over, first blocks\.9"):
        trunk(tmp_path / "more.pth")
    del state["pretrained.blocks.0.norm1.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"missing, first blocks\.0\.norm1\.weight"):
        trunk(tmp_path / "less.pth")


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is no checkpoint of Depth Anything"):
        DPTHead(vit_spec(DIM, DEPTH), num_classes=1, width=WIDTH, weights=str(tmp_path / "other.pth"))


def test_endodac_keeps_the_fusion_and_trains_the_exits(file: Path) -> None:
    head = EndoDACHead(vit_spec(DIM, DEPTH), num_classes=1, width=WIDTH, weights=str(file), frozen=True)
    loaded = DPTHead(vit_spec(DIM, DEPTH), num_classes=1, width=WIDTH, weights=str(file)).state_dict()
    trained = {name.split(".")[0] for name, p in head.named_parameters() if p.requires_grad}
    assert trained == {"shrink", "values", "exits"}
    for name, p in head.named_parameters():
        assert p.requires_grad or torch.equal(p, loaded[name])
    with pytest.raises(UserError, match=r"head\.frozen=true freezes random weights"):
        EndoDACHead(vit_spec(DIM, DEPTH), num_classes=1, width=WIDTH, frozen=True)


def test_endodac_counts_and_range() -> None:
    head = EndoDACHead(vit_spec(32, 4), num_classes=1, width=128, nearest=2.0, farthest=50.0)
    exits = [head.shrink, head.values, head.exits]
    assert sum(p.numel() for part in exits for p in part.parameters()) == 369_156
    with torch.no_grad():
        limits = head._depth(torch.tensor([-1e4, 1e4]))
    torch.testing.assert_close(limits, torch.tensor([50.0, 2.0]))
    with pytest.raises(UserError, match=r"head\.nearest=3"):
        EndoDACHead(vit_spec(32, 4), num_classes=1, nearest=3, farthest=2)
