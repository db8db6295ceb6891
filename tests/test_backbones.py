"""The backbone contract on each class of timm model, at tiny widths: against timm itself."""

from pathlib import Path

import pytest
import timm
import torch

from vfmadapt.backbones._weights import RGB, widen_patch_embed
from vfmadapt.backbones.timm_models import timm_backbone, wrap_timm
from vfmadapt.backbones.timm_vit import TimmBackbone
from vfmadapt.backbones.vfm_tiny import vfm_tiny, vfm_tiny_net
from vfmadapt.contracts import Backbone
from vfmadapt.errors import UserError

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}
MODELS = {
    "vit": "vit_tiny_patch16_224",
    "dinov2": "vit_small_patch14_dinov2",
    "dinov2_reg": "vit_small_patch14_reg4_dinov2",
    "dinov3": "vit_small_patch16_dinov3",
    "clip": "vit_base_patch16_clip_quickgelu_224",
}
PREFIX = {"vit": 1, "dinov2": 1, "dinov2_reg": 5, "dinov3": 5, "clip": 1}


def build(kind: str, **kwargs: object) -> TimmBackbone:
    return timm_backbone(MODELS[kind], pretrained=False, settings=TINY, **kwargs)


@pytest.mark.parametrize("kind", MODELS)
def test_features_equal_timms(kind: str) -> None:
    backbone = build(kind)
    patch = backbone.spec.strides[0]
    image = torch.randn(2, 3, 3 * patch, 5 * patch)
    with torch.no_grad():
        theirs = backbone.net.forward_intermediates(
            image, indices=[0, 2], return_prefix_tokens=True, intermediates_only=True
        )
        ours = backbone(image, [0, 2])
    for (grid, prefix), own_grid, own_prefix in zip(theirs, ours.grids, ours.prefix, strict=True):
        torch.testing.assert_close(own_grid, grid)
        torch.testing.assert_close(own_prefix, prefix)


@pytest.mark.parametrize("kind", MODELS)
def test_contract(kind: str) -> None:
    backbone = build(kind)
    assert isinstance(backbone, Backbone)
    spec = backbone.spec
    assert spec.prefix_tokens == PREFIX[kind]
    assert spec.dims == (32, 32, 32)
    assert len(backbone.blocks()) == spec.depth == 3
    for height, width in ((37, 71), (8, 100), (64, 50)):  # smaller than a patch, no multiples, H != W
        features = backbone(torch.randn(1, 3, height, width), [2, 0])
        h, w = backbone.grid_size(height, width)
        assert [g.shape for g in features.grids] == [(1, 32, h, w)] * 2
        assert h * spec.strides[0] >= height > (h - 1) * spec.strides[0]
        assert features.layers == (2, 0)
        assert features.prefix[0].shape == (1, spec.prefix_tokens, 32)


@pytest.mark.parametrize("kind", MODELS)
def test_split_and_join_are_inverse(kind: str) -> None:
    backbone = build(kind)
    tokens = torch.randn(2, backbone.spec.prefix_tokens + 6, 32)
    prefix, grid = backbone.split(tokens, (2, 3))
    assert grid.shape == (2, 2, 3, 32)
    assert torch.equal(backbone.join(prefix, grid), tokens)


def test_padding_repeats_the_border() -> None:
    backbone = build("vit")
    image = torch.randn(1, 3, 32, 24)
    padded = torch.nn.functional.pad(image, (0, 8, 0, 0), mode="replicate")
    assert torch.equal(backbone(image, [2]).grids[0], backbone(padded, [2]).grids[0])


@pytest.mark.parametrize("kind", ["dinov2_reg", "dinov3"])
def test_positions_are_computed_once_per_grid(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build(kind)
    calls = []
    if kind == "dinov3":
        real = backbone.net.rope.get_embed
        monkeypatch.setattr(backbone.net.rope, "get_embed", lambda shape: calls.append(shape) or real(shape))
    else:
        import timm.layers

        real = timm.layers.resample_abs_pos_embed
        monkeypatch.setattr(timm.layers, "resample_abs_pos_embed", lambda *a: calls.append(a) or real(*a))
    for size in ((64, 96), (96, 64), (64, 96), (96, 64)):
        backbone(torch.randn(1, 3, *size), [0])
    assert len(calls) == 2


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, saving = build("dinov2"), build("dinov2", gradient_checkpointing=True)
    image = torch.randn(1, 3, 28, 42)
    grads = []
    for backbone in (plain, saving):
        leaf = image.clone().requires_grad_()
        backbone(leaf, [2]).grids[0].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("bands", "count"), [(1, 1), (6, 6), (("nir", "red", "green", "blue"), 4)])
def test_any_number_of_bands_answers_grey_like_rgb(bands: object, count: int) -> None:
    rgb, other = build("vit"), build("vit", bands=bands)
    assert other.spec.bands == count
    grey = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(
        other(grey.expand(-1, count, -1, -1), [2]).grids[0],
        rgb(grey.expand(-1, 3, -1, -1), [2]).grids[0],
        atol=1e-4,
        rtol=1e-4,
    )


def test_named_bands_keep_their_filters() -> None:
    net = vfm_tiny_net()
    before = net.patch_embed.proj.weight.clone()
    widen_patch_embed(net, ("nir", "blue"))
    torch.testing.assert_close(net.patch_embed.proj.weight[:, 1], before[:, 2] * 1.5)
    torch.testing.assert_close(net.patch_embed.proj.weight[:, 0], before.mean(1) * 1.5)
    assert build("vit", bands=RGB).spec.weights_hash == build("vit").spec.weights_hash


def test_wrong_bands_say_what_to_do() -> None:
    with pytest.raises(UserError, match=r"takes images \(B, 3, H, W\).*bands=5"):
        build("vit")(torch.zeros(1, 5, 16, 16), [0])


def test_weights_are_never_silently_random() -> None:
    with pytest.raises(UserError, match=r"has no weights: pass backbone\.weights"):
        timm_backbone("vit_tiny_patch16_224")


def test_unknown_model_names_close_ones() -> None:
    with pytest.raises(UserError, match="vit_small_patch14_dinov2"):
        timm_backbone("vit_small_patch14_dinov22", pretrained=False)


def test_unfit_models_are_refused() -> None:
    with pytest.raises(UserError, match="is a ResNet"):
        wrap_timm(timm.create_model("resnet18", num_classes=0))
    with pytest.raises(UserError, match="dynamic_img_size"):
        wrap_timm(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY))


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(
        UserError, match=r"the hub gave no weights \(no route to host\); pass backbone\.weights=FILE"
    ) as error:
        timm_backbone("vit_tiny_patch16_224", pretrained=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_from_file_and_folder(suffix: str, tmp_path: Path) -> None:
    source = build("dinov2_reg", seed=7)
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(source.net.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(source.net.state_dict(), path)
    for where in (path, tmp_path):
        loaded = timm_backbone(MODELS["dinov2_reg"], weights=str(where), settings=TINY)
        assert loaded.spec.weights_hash == source.spec.weights_hash != build("dinov2_reg").spec.weights_hash


def test_unfit_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {k: v for k, v in build("vit").net.state_dict().items() if "blocks.1" not in k}, tmp_path / "part.safetensors"
    )
    with pytest.raises(UserError, match="tensors are missing"):
        timm_backbone(MODELS["vit"], weights=str(tmp_path / "part.safetensors"), settings=TINY)
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="does not fit"):
        timm_backbone(MODELS["vit"], weights=str(tmp_path / "broken.safetensors"), settings=TINY)
    with pytest.raises(UserError, match="2 weights files"):
        timm_backbone(MODELS["vit"], weights=str(tmp_path), settings=TINY)
    with pytest.raises(UserError, match="no such file"):
        timm_backbone(MODELS["vit"], weights=str(tmp_path / "none.pth"), settings=TINY)


def test_vfm_tiny_is_small_and_versioned() -> None:
    backbone = vfm_tiny()
    assert backbone.spec.name == "vfm_tiny@1"
    assert sum(p.numel() for p in backbone.parameters()) <= 6_000_000
    second = vfm_tiny(version=2)
    assert second.spec.name == "vfm_tiny@2"
    hashes = {b.spec.weights_hash for b in (backbone, second, vfm_tiny(pretrained=False))}
    assert len(hashes) == 3
    with pytest.raises(UserError, match="versions 1, 2"):
        vfm_tiny(version=99)


def test_positions_of_a_trained_copy_are_not_kept() -> None:
    from vfmadapt.testing import adapted, perturb

    image = torch.randn(1, 3, 40, 56)
    model = adapted("full")
    frozen = adapted("frozen")
    perturb(model, amount=0.1)
    with torch.no_grad():
        model.requires_grad_(False)(image, [2])
        after = model.detach()(image, [2]).grids[0]
        assert torch.equal(after, frozen(image, [2]).grids[0])
