"""ExPLoRA: counts, which blocks do what, merging."""

from typing import Any

import pytest
import torch

from vfmadapt.adapters.explora import ExPLoRA
from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.contracts import OnLinear, UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.testing import adapted, perturb, tiny_backbone, vit_spec

IMAGE = (2, 3, 37, 52)


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("vit_large_patch14_dinov2", {}, 18_627_584),
        ("vit_base_patch14_dinov2", {}, 9_252_096),
        ("vit_large_patch16_224", {}, 18_627_584 - 2_048),
        ("vit_base_patch16_224", {}, 9_252_096 - 1_536),
        ("vit_base_patch14_dinov2", {"cls_token": True}, 9_252_096 + 768),
        ("vit_large_patch14_dinov2", {"cls_token": True, "norms": True}, 18_724_864),
        ("vit_base_patch14_dinov2", {"cls_token": True, "norms": True}, 9_288_192),
    ],
)
def test_published_parameter_counts(name: str, settings: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        backbone = timm_backbone(name, pretrained=False, final_norm=True)
        model = AdaptedBackbone(backbone, {"main": ExPLoRA(backbone.spec, **settings)})
    assert sum(p.numel() for p in model.trainable_parameters()) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"unfrozen": [3]}, r"unfrozen=\[3\] must be from -3 to 2"),
        ({"unfrozen": [-4]}, r"unfrozen=\[-4\]"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ExPLoRA(vit_spec(16, 3), **settings)
    assert "\n" not in str(caught.value)


def test_a_class_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="no tensors of role 'cls_token'"):
        adapted("explora", "no_prefix", settings={"cls_token": True})


def test_a_block_is_updated_or_trained_whole() -> None:
    model = adapted("explora", settings={"unfrozen": [0, -1]})
    updated = {(s.role, s.index) for s in model.sites("main") if isinstance(s, OnLinear)}
    assert updated == {("q", 1), ("v", 1)}
    assert {key.split("/")[2] for key in model.adapters["main"].copies} == {"0", "2"}


def test_alpha_is_1_whatever_the_rank() -> None:
    pair = ExPLoRA(vit_spec(16, 2), rank=4).updates["0"]["q"]
    torch.nn.init.ones_(pair.up)
    x = torch.randn(3, 16)
    torch.testing.assert_close(pair(x), (x @ pair.down.mT).sum(-1, keepdim=True).expand(3, 16) / 4)


@pytest.mark.parametrize("family", ["dinov2_reg", "dinov3", "sam2_hiera"])
def test_all_variants_merge(family: str) -> None:
    settings = {"rank": 2, "unfrozen": [1], "norms": True, "cls_token": family != "sam2_hiera"}
    model = adapted("explora", family, settings=settings)
    perturb(model)
    plain = tiny_backbone(family)
    plain.net.load_state_dict(model.merge().state_dict())
    image, last = torch.randn(*IMAGE), plain.spec.depth - 1
    with torch.no_grad():
        want = model(image, [last]).grids[0]
        assert (plain(image, [last]).grids[0] - want).abs().max() <= 1e-5 * max(1, want.abs().max())
