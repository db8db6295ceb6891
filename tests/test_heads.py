from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from vfmadapt.build import instantiate, names
from vfmadapt.contracts import Features, PromptHead
from vfmadapt.errors import UserError
from vfmadapt.heads._resize import to_image
from vfmadapt.heads.fpn import FPNHead, spread
from vfmadapt.heads.linear import LinearHead
from vfmadapt.testing import vit_spec

ROOT = Path(__file__).resolve().parents[1]


def make_spec(dims=(24,) * 6, strides=(8,) * 6):
    return replace(vit_spec(8, len(dims)), dims=tuple(dims), strides=tuple(strides))


def prompted(name):
    """Heads that answer prompts are tested in test_sam_head.py."""
    target = get_object(OmegaConf.load(ROOT / f"conf/head/{name}.yaml")["_target_"])
    return issubclass(target, PromptHead)


def make_features(spec, layers, size, batch=2):
    g = torch.Generator().manual_seed(0)
    grids = tuple(
        torch.randn(batch, spec.dims[i], -(-size[0] // spec.strides[i]), -(-size[1] // spec.strides[i]), generator=g)
        for i in layers
    )
    return Features(
        grids, tuple(g.new_zeros(batch, 0, 1) for g in grids), tuple(layers), tuple(spec.strides[i] for i in layers)
    )


SPECS = {
    "vit": make_spec(),
    "patch14": make_spec(strides=(14,) * 6),
    "shallow": make_spec((16, 16), (8, 8)),
    "one_block": make_spec((16,), (8,)),
    "hierarchy": make_spec((8, 16, 24, 32), (4, 8, 16, 32)),
}


@pytest.mark.parametrize("size", [(32, 48), (37, 61), (1, 1), (5, 100)], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", [name for name in names("head") if not prompted(name)])
def test_every_head_gives_logits_of_the_images_size(name, spec, size):
    head = instantiate(OmegaConf.load(ROOT / f"conf/head/{name}.yaml"), spec, num_classes=5)
    assert all(0 <= i < spec.depth for i in head.layers)
    supervised = head.supervised(make_features(spec, head.layers, size), size)
    assert all(logits.shape == (2, 5, *size) for logits in supervised)
    sum(logits.square().mean() for logits in supervised).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [LinearHead, FPNHead])
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


@pytest.mark.parametrize("make", [LinearHead, FPNHead])
def test_images_of_a_batch_are_independent(make):
    spec = make_spec()
    head = make(spec, num_classes=3)
    both = make_features(spec, head.layers, (24, 40))
    second = Features(tuple(g[1:] for g in both.grids), both.prefix, both.layers, both.strides)
    torch.testing.assert_close(head(both, (24, 40))[1:], head(second, (24, 40)), atol=1e-5, rtol=1e-4)
