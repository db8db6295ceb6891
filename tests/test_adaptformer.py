"""AdaptFormer and Houlsby's adapters: where they act, how they start, what they refuse."""

import pytest
import torch

from vfmadapt.adapters.adaptformer import AdaptFormer
from vfmadapt.adapters.houlsby import Houlsby
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.testing import tiny_backbone, vit_spec


def last_block(kind):
    """The adapter, the last block of a tiny DINOv2 whose LayerScale is 0.5, and what enters and leaves it."""
    torch.manual_seed(0)
    frozen = tiny_backbone("dinov2_reg")
    block, seen = frozen.net.blocks[-1], []
    with torch.no_grad():
        block.ls1.gamma.fill_(0.5)
        block.ls2.gamma.fill_(0.5)
    model = AdaptedBackbone(frozen, {"main": kind(frozen.spec, dim=4)}).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    block.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    block.register_forward_hook(lambda _module, _args, y: seen.append(y))
    model(torch.randn(2, 3, 40, 24), [model.spec.depth - 1])
    model.detach()
    return model.adapters["main"], block, *seen


def test_adaptformer_joins_after_layer_scale():
    adapter, block, x, y = last_block(AdaptFormer)
    adapter.eval()
    h = x + block.ls1(block.attn(block.norm1(x)))
    torch.testing.assert_close(y, h + block.ls2(block.mlp(block.norm2(h))) + adapter.branches[-1](h))


def test_houlsby_joins_before_layer_scale():
    adapter, block, x, y = last_block(Houlsby)
    h = x + block.ls1(adapter.attention[-1](block.attn(block.norm1(x))))
    torch.testing.assert_close(y, h + block.ls2(adapter.mlp[-1](block.mlp(block.norm2(h)))))


def test_starts():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    adapter = AdaptFormer(vit_spec(32)).train()
    assert not adapter.sites()[0].fn(x).any()
    bottleneck = Houlsby(vit_spec(32)).mlp[0]
    assert 1.9e-3 < bottleneck.up.weight.abs().max() <= 2e-3
    assert not bottleneck.up.bias.any()
    assert 0 < (bottleneck(x) - x).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (AdaptFormer, {"dim": 0}, "dim=0"),
        (AdaptFormer, {"scale": 0.0}, "scale=0.0"),
        (AdaptFormer, {"dropout": 1.0}, "dropout=1.0"),
        (Houlsby, {"dim": 0}, "dim=0"),
    ],
)
def test_settings_out_of_range(kind, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        kind(vit_spec(8), **settings)
    assert "\n" not in str(caught.value)
