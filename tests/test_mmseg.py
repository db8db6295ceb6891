"""Decode heads of mmsegmentation behind our contract, and ours against its own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vfmadapt.adapters.frozen import Frozen
from vfmadapt.contracts import ClassSpec, DataSpec, Features
from vfmadapt.errors import UserError
from vfmadapt.heads.mmseg import MmsegHead
from vfmadapt.heads.segformer import SegFormerHead
from vfmadapt.heads.upernet import UPerNetHead
from vfmadapt.host import AdaptedBackbone
from vfmadapt.losses import SegmentationLoss
from vfmadapt.model import AdaptedModel
from vfmadapt.testing import tiny_backbone, vit_spec

mmseg = pytest.importorskip("mmseg", reason="install the extra mmseg")

NAMES = ("UPerHead", "SegformerHead", "FCNHead", "DepthwiseSeparableASPPHead", "PSPHead")
CLASSES = tuple(ClassSpec(name, (0, 0, 0)) for name in "abc")
SPEC = DataSpec(name="three", bands=("red", "green", "blue"), classes=CLASSES, mean=(0.0,) * 3, std=(1.0,) * 3)


def make_features(spec, cells, batch=2):
    made = torch.Generator().manual_seed(0)
    grids = [
        torch.randn(batch, c, -(-4 * cells[0] // s), -(-4 * cells[1] // s), generator=made)
        for c, s in zip(spec.dims, spec.strides, strict=True)
    ]
    layers = tuple(range(spec.depth))
    return Features(tuple(grids), tuple(g.new_zeros(batch, 0, 1) for g in grids), layers, spec.strides)


HIERARCHY = replace(vit_spec(8, 4), dims=(8, 16, 24, 32), strides=(4, 8, 16, 32))


@pytest.mark.parametrize("own_loss", [False, True], ids=["task", "own"])
@pytest.mark.parametrize("name", NAMES)
def test_one_step(name, own_loss):
    """Everything that is trained moves, on an image whose sides are no multiple of the patch."""
    frozen = tiny_backbone("vit")
    head = MmsegHead(frozen.spec, num_classes=3, type=name, channels=16, own_loss=own_loss).train()
    model = AdaptedModel(AdaptedBackbone(frozen, {"main": Frozen(frozen.spec)}), head, spec=SPEC)
    image, mask = torch.randn(2, 3, 72, 100), torch.randint(0, 3, (2, 72, 100))
    mask[:, :9] = 255
    before = {key: value.clone() for key, value in head.state_dict().items()}
    features = model.features(image)
    if (parts := head.loss(features, mask, ignore_index=255)) is None:
        parts = SegmentationLoss()(head(features, (72, 100)), mask)
    assert own_loss == ("loss_ce" in parts)
    parts["loss"].backward()
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    assert [k for k, v in head.named_parameters() if v.grad is None] == []
    moved = [key for key, value in head.state_dict().items() if not torch.equal(value, before[key])]
    assert len(moved) > 0.8 * len(before)
    assert model(image).shape == (2, 3, 72, 100)


def test_own_loss_is_cross_entropy_of_what_counts():
    head = MmsegHead(HIERARCHY, num_classes=3, type="FCNHead", channels=8, own_loss=True).eval()
    features, mask = make_features(HIERARCHY, (16, 24)).only(head.layers), torch.randint(0, 3, (2, 61, 90))
    mask[:, 40:] = 7
    loss = head.loss(features, mask, ignore_index=7)["loss"]
    labels = torch.where(mask == 7, -100, mask)
    sums = F.cross_entropy(head(features, (61, 90)), labels, reduction="sum")
    padded = 2 * 64 * 96  # mmseg averages over all pixels, ignored ones too
    torch.testing.assert_close(loss, sums / padded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "Mask2FormerHead"}, "compiled operations.*head=eomt"),
        ({"type": "PointHead"}, "compiled operations"),
        ({"type": "UperHead"}, "did you mean UPerHead"),
        ({"type": "OCRHead"}, "OCRHead"),
        ({"options": {"pool_scale": [1]}}, "no setting 'pool_scale'.*pool_scales"),
        ({"options": {"in_channels": 3}}, "no setting 'in_channels'"),
        ({"type": "FCNHead", "options": {"num_convs": "many"}}, "FCNHead cannot be built: TypeError"),
        ({"type": "FPNHead"}, "FPNHead cannot be built: .*feature_strides"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_is_refused(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        MmsegHead(vit_spec(16, 4), num_classes=2, **{"channels": 16, **settings})
    assert "\n" not in str(caught.value)


def test_options_reach_the_head():
    options = {"norm_cfg": {"type": "BN"}, "pool_scales": [1, 2], "dropout_ratio": 0.5}
    head = MmsegHead(vit_spec(16, 4), num_classes=2, channels=16, options=options)
    assert isinstance(head.decode.bottleneck.bn, torch.nn.BatchNorm2d)
    assert len(head.decode.psp_modules) == 2
    assert head.decode.dropout.p == 0.5


def test_a_head_of_one_map_reads_the_last_block():
    plain = MmsegHead(vit_spec(16, 4), num_classes=2, type="FCNHead", channels=16)
    assert (plain.layers, plain.pyramid.strides, plain.decode.in_channels) == ((3,), (16,), 16)
    finer = MmsegHead(HIERARCHY, num_classes=2, type="DepthwiseSeparableASPPHead", channels=16)
    assert (finer.layers, finer.pyramid.strides) == ((0, 3), (4, 32))


def test_nothing_is_printed(capfd):
    MmsegHead(vit_spec(16, 4), num_classes=2, channels=16)
    assert capfd.readouterr() == ("", "")


def copy(ours, theirs):
    """The weights of our convolution, norm, ReLU into a ConvModule."""
    conv, norm, _ = ours
    theirs.conv.load_state_dict(conv.state_dict())
    theirs.gn.load_state_dict(norm.state_dict())


def perturbed(head):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head.eval()


def test_segformer_is_mmsegs():
    ours = perturbed(SegFormerHead(HIERARCHY, num_classes=3, width=16))
    theirs = MmsegHead(HIERARCHY, num_classes=3, type="SegformerHead", channels=16).eval()
    theirs.pyramid.load_state_dict(ours.pyramid.state_dict())
    for linear, conv in zip(ours.linears, theirs.decode.convs, strict=True):
        copy(linear, conv)
    copy(ours.fuse, theirs.decode.fusion_conv)
    theirs.decode.conv_seg.load_state_dict(ours.classifier.state_dict())
    features = make_features(HIERARCHY, (16, 24))
    torch.testing.assert_close(ours(features, (61, 90)), theirs(features, (61, 90)), atol=1e-5, rtol=1e-4)


def test_upernet_is_mmsegs():
    ours = perturbed(UPerNetHead(HIERARCHY, num_classes=3, width=16))
    theirs = MmsegHead(HIERARCHY, num_classes=3, type="UPerHead", channels=16).eval()
    theirs.pyramid.load_state_dict(ours.pyramid.state_dict())
    decode = theirs.decode
    for pool, module in zip(ours.pools, decode.psp_modules, strict=True):
        copy(pool, module[1])
    pairs = [(ours.top, decode.bottleneck), (ours.fuse, decode.fpn_bottleneck)]
    pairs += zip(ours.laterals, decode.lateral_convs, strict=True)
    pairs += zip(ours.smooth, decode.fpn_convs, strict=True)
    for block, module in pairs:
        copy(block, module)
    decode.conv_seg.load_state_dict(ours.classifier.state_dict())
    features = make_features(HIERARCHY, (16, 24))
    torch.testing.assert_close(ours(features, (61, 90)), theirs(features, (61, 90)), atol=1e-5, rtol=1e-4)
