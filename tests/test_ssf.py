"""SSF: counts, places, merging, official weights."""

import pytest
import torch

from vfmadapt.adapters.ssf import SSF
from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.contracts import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.interop import load_published
from vfmadapt.interop.ssf import PUBLISHED
from vfmadapt.testing import adapted, tiny_backbone

IMAGE = (2, 3, 37, 52)


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        adapter = SSF(timm_backbone("vit_base_patch16_224", pretrained=False, final_norm=True).spec)
    assert sum(p.numel() for p in adapter.parameters()) == 205_824


def test_final_norm_only_where_features_come_through_it() -> None:
    with_norm, without = (SSF(tiny_backbone("vit", final_norm=norm).spec) for norm in (True, False))
    assert len(with_norm.sites()) == 2 + 3 * 6
    assert {s.role for s in with_norm.sites()} - {s.role for s in without.sites()} == {"norm"}


def test_prefix_tokens_do_not_go_through_the_patch_embedding() -> None:
    """With everything but the patch embedding's shift at rest, a shift of the patches is as if their bias moved."""
    frozen = tiny_backbone("dinov2_reg")
    adapter = SSF(frozen.spec)
    with torch.no_grad():
        for _, _, layer in adapter.layers():
            layer.scale.fill_(1)
            layer.shift.zero_()
        adapter.patch_embed.shift.fill_(0.3)
        image = torch.randn(*IMAGE)
        model = AdaptedBackbone(frozen, {"main": adapter})
        got = model(image, [0])
        model.detach().net.patch_embed.proj.bias += 0.3
        want = frozen(image, [0])
    torch.testing.assert_close(got.grids, want.grids)
    torch.testing.assert_close(got.prefix, want.prefix)


@pytest.mark.parametrize("family", ["vit", "samvit", "sam2_hiera"])
def test_merges_with_the_final_norm_and_on_grids(family: str) -> None:
    frozen = tiny_backbone(family, final_norm=family == "vit")
    model = AdaptedBackbone(frozen, {"main": SSF(frozen.spec)})
    plain = tiny_backbone(family, final_norm=family == "vit")
    plain.net.load_state_dict(model.merge().state_dict())
    image, last = torch.randn(*IMAGE), frozen.spec.depth - 1
    with torch.no_grad():
        want = model(image, [last]).grids[0]
        assert (plain(image, [last]).grids[0] - want).abs().max() <= 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize(
    ("family", "message"), [("clip", "no bias at patch_embed"), ("dinov3", "no bias at qkv of block 0")]
)
def test_without_a_bias_to_shift_there_is_no_merging(family: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        adapted("ssf", family).merge()
    assert "\n" not in str(caught.value)


def official(spec: SSF) -> dict[str, torch.Tensor]:
    """A state dict in the official layout: a number of its own for every tensor."""
    state = {}
    for role, index, layer in spec.layers():
        for kind in ("scale", "shift"):
            state[PUBLISHED[role].format(kind, i=index)] = torch.full(layer.scale.shape, float(len(state)))
    return state


def test_official_weights() -> None:
    adapter = SSF(tiny_backbone("vit").spec)
    state = official(adapter)
    load_published("ssf", adapter, {**state, "blocks.0.norm1.weight": torch.zeros(32)})
    assert torch.equal(adapter.blocks[1]["fc1"].shift, state["blocks.1.mlp.ssf_shift_1"])
    assert torch.equal(adapter.blocks[2]["norm2"].scale, state["blocks.2.ssf_scale_2"])
    with pytest.raises(UserError, match="left over, first ssf_scale_1"):
        load_published("ssf", adapter, {**state, "ssf_scale_1": torch.zeros(32)})
    state.pop("blocks.1.attn.ssf_scale_2")
    with pytest.raises(UserError, match=r"no 'blocks\.1\.attn\.ssf_scale_2'"):
        load_published("ssf", adapter, state)
