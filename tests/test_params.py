"""Counts on the meta device."""

import pytest

from vfmadapt import params
from vfmadapt.build import compose, names


def test_keys_and_figures() -> None:
    result = params.main(compose("params", ["adapter=earth", "backbone=dinov2_large", "adapter.fft_layers=[0,1,2]"]))
    assert result["adapter_params"] == 3_974_049
    assert result["unfrozen_params"] == 0
    assert result["backbone_params"] == 304_367_616
    assert result["head_params"] == 2 * 1024 + (1024 + 1) * 4 * 16  # norm, 4 classes x 4 x 4 cells
    assert result["adapter_bytes"] == 4 * (result["adapter_params"] + result["head_params"])
    assert result["mergeable"] is False


def test_trained_copies_are_counted_apart() -> None:
    both = params.main(compose("params", ["adapter=frozen", "backbone=vfm_tiny"]))
    with_first = params.main(
        compose("params", ["adapter=frozen", "backbone=vfm_tiny", "backbone.train_patch_embed=true"])
    )
    assert both["unfrozen_params"] == 0
    assert with_first["unfrozen_params"] == 256 * (3 * 8 * 8 + 1)
    assert with_first["backbone_params"] == both["backbone_params"]


@pytest.mark.parametrize(
    ("adapter", "backbone", "trained"),
    [
        (["adapter=cloud"], "dinov2_large", 1_828_425),
        (["adapter=explora"], "dinov2_large", 18_627_584),
        (["adapter=explora"], "dinov2_base", 9_252_096),
        (["adapter=adaptformer"], "vit_base", 1_189_632),
        (["adapter=houlsby"], "vit_base", 2_379_264),
        (["adapter=vpt", "adapter.prompts=50"], "vit_base", 460_800),
        (["adapter=ssf", "backbone.final_norm=true"], "vit_base", 205_824),
        (["adapter=bitfit", "backbone.final_norm=true"], "vit_base", 102_912),
        (["adapter=hydra_lora", "adapter.rank=2"], "vit_base", 239_712),
        (["adapter=repadapter"], "vit_base", 239_808),
        (["adapter=conv_lora"], "samvit_huge", 514_560),
        (["adapter=lora", "adapter.options.r=3", "+adapter.roles=[qkv]"], "samvit_huge", 491_520),
        (["adapter=dylora", "adapter.rank=4"], "vit_base", 147_456),
        (["adapter=dylora", "adapter.rank=16"], "vit_base", 589_824),
        (["adapter=dd"], "sam2_hiera_tiny", 544_080),
        (["adapter=rein", "+adapter.link_queries=true"], "dinov2_large", 2_990_081),
        (["adapter=mosa", "adapter.experts=1"], "vit_base", 1_208_064),
        (["adapter=mosa", "adapter.experts=4", "adapter.share=down"], "vit_base", 3_005_184),
        (["adapter=bit_lora", "adapter.dim=1"], "vit_base", 36_864),
        (["adapter=pego"], "vit_base", 589_824),
        (["adapter=dv_lora"], "vit_base", 1_344_096),
    ],
)
def test_published_counts(adapter: list[str], backbone: str, trained: int) -> None:
    result = params.main(compose("params", [*adapter, f"backbone={backbone}"]))
    assert result["adapter_params"] + result["unfrozen_params"] == trained


@pytest.mark.parametrize("backbone", [name for name in names("backbone") if name != "timm"])
def test_every_backbone_is_built(backbone: str) -> None:
    assert params.main(compose("params", ["adapter=frozen", f"backbone={backbone}"]))["backbone_params"] > 4_000_000
