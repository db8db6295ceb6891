from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from vfmadapt import benchmark
from vfmadapt.build import compose, instantiate, names
from vfmadapt.contracts import Features, PromptHead
from vfmadapt.errors import UserError
from vfmadapt.heads._resize import spread, to_image
from vfmadapt.heads.dpt import DPTHead
from vfmadapt.heads.fpn import FPNHead
from vfmadapt.heads.linear import LinearHead
from vfmadapt.heads.segformer import SegFormerHead
from vfmadapt.heads.upernet import UPerNetHead
from vfmadapt.testing import vit_spec

ROOT = Path(__file__).resolve().parents[1]


def make_spec(dims=(24,) * 6, strides=(8,) * 6):
    return replace(vit_spec(8, len(dims)), dims=tuple(dims), strides=tuple(strides))


def prompted(name):
    """Heads that answer prompts are tested in test_sam_head.py."""
    target = get_object(OmegaConf.load(ROOT / f"conf/head/{name}.yaml")["_target_"])
    return issubclass(target, PromptHead)


def make_head(name, spec, *, num_classes):
    if name == "mmseg":
        pytest.importorskip("mmseg")
    node = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/head/{name}.yaml"))
    narrow = {key: 32 for key in ("width", "channels") if key in node}  # for speed
    return instantiate({**node, **narrow}, spec, num_classes=num_classes)


def make_features(spec, layers, size, batch=2, sites=()):
    """Random grids; prompts of the head's own `sites` pass the blocks as they are."""
    g = torch.Generator().manual_seed(0)
    grids = tuple(
        torch.randn(batch, spec.dims[i], -(-size[0] // spec.strides[i]), -(-size[1] // spec.strides[i]), generator=g)
        for i in layers
    )
    prompts = {}
    for site in sites:
        prompts[site.index] = site.fn(prompts.get(site.index - 1)).expand(batch, -1, -1)
    prefix, strides = tuple(g.new_zeros(batch, 0, 1) for g in grids), tuple(spec.strides[i] for i in layers)
    image = torch.randn(batch, spec.bands, *size, generator=g)
    return Features(grids, prefix, tuple(layers), strides, prompts, image=image)


SPECS = {
    "vit": make_spec(),
    "patch14": make_spec(strides=(14,) * 6),
    "shallow": make_spec((16, 16), (8, 8)),
    "one_block": make_spec((16,), (8,)),
    "hierarchy": replace(make_spec((8, 16, 24, 32), (4, 8, 16, 32)), windowed=(True,) * 4),
}
REFUSED = {("eomt", "one_block"), ("eomt", "hierarchy")}  # queries need a plain ViT, and a block before them
PAIRS = [(h, s) for h in names("head") if not prompted(h) for s in SPECS if (h, s) not in REFUSED]


@pytest.mark.parametrize("size", [(32, 48), (37, 61), (1, 1), (5, 100)], ids=str)
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_every_head_gives_logits_of_the_images_size(name, family, size):
    spec = SPECS[family]
    head = make_head(name, spec, num_classes=5)
    assert all(0 <= i < spec.depth for i in head.layers)
    features = make_features(spec, head.layers, size, sites=head.sites(()))
    supervised = head.supervised(features, size)
    assert all(logits.shape == (2, 5, *size) for logits in supervised)
    others = head.outputs(features, size).values() if name == "multitask" else ()
    sum(logits.square().mean() for logits in (*supervised, *others)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "family"), sorted(REFUSED))
def test_backbones_that_a_head_refuses(name, family):
    with pytest.raises(UserError, match="choose") as caught:
        make_head(name, SPECS[family], num_classes=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [LinearHead, FPNHead, SegFormerHead, UPerNetHead, DPTHead])
def test_layers_by_negative_index_and_out_of_range(make):
    spec = make_spec()
    assert make(spec, num_classes=2, layers=(-2,)).layers == (4,)
    with pytest.raises(UserError, match="6 blocks"):
        make(spec, num_classes=2, layers=(6,))
    with pytest.raises(UserError):
        make(spec, num_classes=2, layers=())


def test_spread_is_even_and_ends_at_the_last_block():
    assert spread(12) == (2, 5, 8, 11)
    assert spread(24) == (5, 11, 17, 23)
    assert spread(6) == (1, 2, 4, 5)
    assert spread(2) == (0, 1)
    for depth in range(1, 40):
        assert len(set(spread(depth))) == min(4, depth)


def test_fpn_is_finer_than_the_patch():
    """Detail within a cell of 8 pixels lies in the channels alone: the output must vary within the cell."""
    spec = make_spec()
    head = FPNHead(spec, num_classes=2)
    assert head.doublings == (2, 1, 0, 0)
    torch.manual_seed(0)
    features = make_features(spec, head.layers, (16, 16), 1)
    logits = head(features, (16, 16))
    flat = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(logits, 8), scale_factor=8, mode="bilinear")
    assert (logits - flat).std() > 0.2 * logits.std()


def test_to_image_keeps_pixels_in_place():
    """Logits of a padded grid: the crop is at the bottom and right, nothing is stretched to the image's size."""
    grid = torch.zeros(1, 1, 4, 4)
    grid[..., 3, 3] = 1
    full = to_image(grid, (4, 4), 8, (32, 32))
    assert torch.equal(to_image(grid, (4, 4), 8, (27, 30)), full[..., :27, :30])


def test_linear_is_invariant_to_the_scale_of_features():
    spec = make_spec()
    head = LinearHead(spec, num_classes=3)
    features = make_features(spec, head.layers, (16, 16))
    scaled = Features(tuple(50 * g + 7 for g in features.grids), features.prefix, features.layers, features.strides)
    torch.testing.assert_close(head(features, (16, 16)), head(scaled, (16, 16)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("make", [LinearHead, FPNHead, SegFormerHead, UPerNetHead, DPTHead])
def test_images_of_a_batch_are_independent(make):
    spec = make_spec()
    head = make(spec, num_classes=3).eval()
    both = make_features(spec, head.layers, (24, 40))
    second = Features(tuple(g[1:] for g in both.grids), both.prefix, both.layers, both.strides)
    torch.testing.assert_close(head(both, (24, 40))[1:], head(second, (24, 40)), atol=1e-5, rtol=1e-4)


def test_dpt_is_that_of_depth_anything():
    """The same weights in transformers' neck and head, which has no LayerNorm of its own."""
    from transformers import DepthAnythingConfig
    from transformers.models.depth_anything import modeling_depth_anything as published

    spec = make_spec((32,) * 4, (14,) * 4)
    ours = DPTHead(spec, num_classes=1, width=8).eval()
    config = DepthAnythingConfig(
        reassemble_hidden_size=32,
        patch_size=14,
        neck_hidden_sizes=[4, 8, 16, 32],
        fusion_hidden_size=8,
        head_hidden_size=32,
    )
    neck = published.DepthAnythingNeck(config).eval()
    head = published.DepthAnythingDepthEstimationHead(config).eval()
    stages = neck.reassemble_stage.layers
    for reassemble, stage in zip(ours.reassemble, stages, strict=True):
        stage.projection.load_state_dict(reassemble[0].state_dict())
        stage.resize.load_state_dict(reassemble[1].state_dict())
    for project, conv in zip(ours.project, neck.convs, strict=True):
        conv.load_state_dict(project.state_dict())
    for fusion, layer in zip(reversed(ours.fusion), neck.fusion_stage.layers, strict=True):
        layer.projection.load_state_dict(fusion.mix.state_dict())
        for residual, unit in ((fusion.join, layer.residual_layer1), (fusion.refine, layer.residual_layer2)):
            if residual is not None:
                unit.convolution1.load_state_dict(residual.first.state_dict())
                unit.convolution2.load_state_dict(residual.second.state_dict())
    head.conv1.load_state_dict(ours.shrink.state_dict())
    head.conv2.load_state_dict(ours.values[0].state_dict())
    head.conv3.load_state_dict(ours.values[2].state_dict())
    features = make_features(spec, ours.layers, (42, 70))
    tokens = [norm(grid).flatten(2).transpose(1, 2) for norm, grid in zip(ours.norms, features.grids, strict=True)]
    with torch.no_grad():
        fused = neck([torch.cat([t[:, :1], t], 1) for t in tokens], 3, 5)  # it drops a class token
        want = head(fused, 3, 5)
        got = ours(features, (42, 70))
    assert got.std() > 1e-3
    torch.testing.assert_close(got[:, 0].relu(), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours(features, (40, 61)), got[..., :40, :61])


def test_benchmark_of_heads():
    small = ["what=heads", "network=vit_tiny_patch16_224", "size=32", "batch=1", "repeats=1", "threads=1"]
    result = benchmark.main(compose("benchmark", [*small, "only=[linear,eomt,sam_tiny]"]))
    assert list(result["heads"]) == ["linear", "eomt"]  # prompts label no pixels
    assert "backbone" in result["heads"]["eomt"]
    head = LinearHead(vit_spec(192, 12), num_classes=19, cells=4)
    assert result["heads"]["linear"]["params"] == sum(p.numel() for p in head.parameters())
