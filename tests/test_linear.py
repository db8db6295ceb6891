"""Hydra, RepAdapter and ZeroI2V's linear adapters: counts, settings, the shift in time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vfmadapt.adapters._affine import AffineBottleneck
from vfmadapt.adapters.hydra_lora import HydraLora
from vfmadapt.adapters.linear import LinearAdapters, shift_frames
from vfmadapt.adapters.repadapter import RepAdapter
from vfmadapt.contracts import OnOutput, UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.testing import adapted, grids, perturb, tiny_backbone, vit_spec


@pytest.mark.parametrize(
    ("made", "parameters"),
    [(HydraLora, 239_712), (RepAdapter, 239_808), (LinearAdapters, 14_201_856)],
)
def test_published_parameter_counts(made, parameters):
    """ViT-B: 12 blocks of 768 channels."""
    with torch.device("meta"):
        adapter = made(vit_spec(768, 12))
    assert sum(p.numel() for p in adapter.parameters()) == parameters


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (HydraLora, {"rank": 0}, "rank=0 must be at least 1"),
        (HydraLora, {"scale": 0.0}, "scale=0.0 must be above 0"),
        (HydraLora, {"dropout": 1.0}, "dropout=1.0 must be"),
        (RepAdapter, {"scale": float("nan")}, "scale=nan"),
        (RepAdapter, {"dim": 0}, "dim=0"),
        (RepAdapter, {"groups": 0}, "groups=0"),
        (RepAdapter, {"dim": 7}, "groups=2 does not divide 7"),
        (RepAdapter, {"dim": 6, "groups": 3}, "groups=3 does not divide 16"),
        (LinearAdapters, {"ratio": 0.0}, "ratio=0.0 must be above 0"),
        (LinearAdapters, {"ratio": 0.05}, "ratio=0.05 .* leave a channel"),
        (LinearAdapters, {"dropout": -0.1}, "dropout=-0.1"),
        (LinearAdapters, {"frames": 0}, "frames=0"),
        (LinearAdapters, {"frames": 2, "shift_div": 1}, "shift_div=1"),
    ],
)
def test_settings_out_of_range(made, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        made(vit_spec(16), **settings)
    assert "\n" not in str(caught.value)


def filled(*sizes, **settings):
    layer = AffineBottleneck(*sizes, **{"scale": 0.7, "dropout": 0.0, **settings})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def test_groups_are_those_of_a_grouped_convolution():
    layer, x = filled(12, 6, 8, groups=2), torch.randn(3, 5, 12)
    kernel = layer.up.mT.reshape(6, 4, 1)
    convolved = F.conv1d(layer.down(x).mT, kernel, layer.up_bias, groups=2).mT
    torch.testing.assert_close(layer(x), 0.7 * convolved)


def test_dropout_acts_on_the_bottleneck_in_training_only():
    layer, x = filled(4, 4, 3, dropout=0.999), torch.randn(50, 4)
    torch.testing.assert_close(layer(x)[0], 0.7 * layer.up_bias)
    matrix, constant = layer.eval().folded()
    torch.testing.assert_close(layer(x), x @ matrix.T + constant)


def test_hydra_reads_the_input_beside_and_the_frozen_output_behind_the_layer():
    model = adapted("hydra_lora")
    perturb(model, amount=0.5)
    made = model.adapters["main"]
    parallel, sequential = made.parallel["fc2"][1], made.sequential["fc2"][1]
    linear, seen = model.backbone.place("fc2", 1).module, []
    linear.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 48), [2])
        x, y = seen
        frozen = F.linear(x, linear.weight, linear.bias)
        torch.testing.assert_close(y, frozen + sequential(frozen) + parallel(x))


def test_shift_takes_channels_from_both_neighbours_within_a_video():
    frame = torch.arange(6.0)[:, None, None].expand(6, 2, 7)  # two videos of three frames, each filled with its number
    got = shift_frames(frame, frames=3, div=3)
    assert torch.equal(got[:, 0, :2], torch.tensor([0, 0, 1, 3, 3, 4.0])[:, None].expand(6, 2))
    assert torch.equal(got[:, 0, 2:4], torch.tensor([1, 2, 2, 4, 5, 5.0])[:, None].expand(6, 2))
    assert torch.equal(got[:, :, 4:], frame[:, :, 4:])
    assert torch.equal(got[:, 0], got[:, 1])
    assert torch.equal(frame[:, 0, 0], torch.arange(6.0))  # the input is left as it was


def test_shift_of_fewer_images_than_frames():
    x = torch.randn(2, 3, 4)
    assert torch.equal(shift_frames(x[:1], frames=8, div=2), x[:1])
    assert torch.equal(shift_frames(x, frames=8, div=2), shift_frames(x, frames=2, div=2))
    with pytest.raises(UserError, match="5 images is no multiple of frames=2"):
        shift_frames(torch.zeros(5, 1, 4), frames=2, div=2)


def test_frames_shift_keys_and_values_of_every_block_and_refuse_to_merge():
    still, video = adapted("linear"), adapted("linear", settings={"frames": 2, "shift_div": 2})
    extra = [site for site in video.sites("main") if isinstance(site, OnOutput) and site.role in ("k", "v")]
    assert [(site.role, site.index) for site in extra] == [("k", 0), ("k", 1), ("k", 2), ("v", 0), ("v", 1), ("v", 2)]
    images = torch.randn(4, 3, 32, 48)
    with torch.no_grad():
        plain, shifted = grids(still, images)[0], grids(video, images)[0]
        alone = grids(video, images[2:])[0]
        same = grids(video, images[:1].expand(2, -1, -1, -1))[0]
    assert ((plain - shifted).abs().amax((1, 2, 3)) > 1e-3).all()
    torch.testing.assert_close(shifted[2:], alone)
    torch.testing.assert_close(same[:1], plain[:1])
    with pytest.raises(UserError, match="frames=2 shifts keys and values"):
        video.merge()


def test_frames_need_attention_over_the_whole_image():
    spec = replace(vit_spec(16, 2), windowed=(True, False))
    with pytest.raises(UserError, match="frames=2 needs attention over the whole image"):
        LinearAdapters(spec, frames=2)
    LinearAdapters(spec)


def test_merged_into_layers_without_a_bias_where_none_is_needed():
    frozen = tiny_backbone("dinov3")
    adapter = LinearAdapters(frozen.spec)
    model = AdaptedBackbone(frozen, {"main": adapter})
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("up"):
                parameter.normal_(std=0.02)
    image = torch.randn(1, 3, 32, 48)
    merged = tiny_backbone("dinov3")
    merged.net.load_state_dict(model.merge().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(merged(image, [2]).grids[0], grids(model, image)[-1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        adapter.bottlenecks["attn"][0].up_bias.fill_(1.0)
    with pytest.raises(UserError, match="has no bias at q of block 0"):
        model.merge()
