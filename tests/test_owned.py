"""Trained copies of frozen tensors: BitFit, full fine-tuning, and tensors by role."""

from typing import Any

import pytest
import torch

from vfmadapt.adapters.bitfit import BitFit
from vfmadapt.adapters.full import Full
from vfmadapt.adapters.owned import TrainedTensors
from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.contracts import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.testing import loss, perturb, tiny_backbone

FAMILIES = ("no_prefix", "vit", "dinov2_reg", "clip", "dinov3", "samvit", "sam2_hiera")
IMAGE = (2, 3, 37, 52)


def trained(made: Any, family: str, **settings: Any) -> AdaptedBackbone:
    frozen = tiny_backbone(family, **settings)
    return AdaptedBackbone(frozen, {"main": made(frozen.spec)})


def test_published_parameter_count_of_bitfit() -> None:
    with torch.device("meta"):
        backbone = timm_backbone("vit_base_patch16_224", pretrained=False, final_norm=True)
        model = AdaptedBackbone(backbone, {"main": BitFit(backbone.spec)})
    assert sum(p.numel() for p in model.trainable_parameters()) == 102_912


@pytest.mark.parametrize("family", FAMILIES)
def test_full_trains_all_that_a_forward_reads_and_nothing_else(family: str) -> None:
    model = trained(Full, family)
    perturb(model)
    loss(model, torch.randn(*IMAGE)).backward()
    without = [n for n, p in model.adapters.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    unread = {n.split(".")[1] for n, p in model.backbone.named_parameters() if not p.requires_grad}
    assert unread <= {"norm", "fc_norm", "head", "neck"}


def test_full_reads_the_final_norm_where_it_is_used() -> None:
    keys = set(trained(Full, "vit", final_norm=True).adapters["main"].copies)
    assert keys - set(trained(Full, "vit").adapters["main"].copies) == {"net/norm/weight", "net/norm/bias"}


def test_trained_position_embeddings_act_at_once_and_are_gone_afterwards() -> None:
    """The backbone keeps frozen position embeddings of a grid; a trained copy must neither use nor leave one there."""
    model = trained(Full, "vit").eval()
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        start = model(image, [2]).grids[0]
        model.adapters["main"].copies["net/pos_embed"].add_(torch.randn(32))
        assert not torch.allclose(model(image, [2]).grids[0], start, atol=1e-3)
        assert torch.equal(model.detach()(image, [2]).grids[0], start)


def test_bitfit_trains_biases_only() -> None:
    model = trained(BitFit, "sam2_hiera")
    assert all(key.endswith("bias") for key in model.adapters["main"].copies)
    assert len(model.trainable_parameters()) == 1 + 6 * 5 + 3  # patch embedding, blocks, shortcuts that change width


def test_merging_puts_the_copies_in() -> None:
    model = trained(Full, "samvit")
    perturb(model)
    image = torch.randn(*IMAGE)
    plain = tiny_backbone("samvit")
    plain.net.load_state_dict(model.merge().state_dict())
    with torch.no_grad():
        assert torch.equal(plain(image, [2]).grids[0], model(image, [2]).grids[0])


def test_a_role_without_tensors_is_refused() -> None:
    frozen = tiny_backbone("no_prefix")
    with pytest.raises(UserError, match="no tensors of role 'cls_token'"):
        AdaptedBackbone(frozen, {"main": TrainedTensors(frozen.spec, role="cls_token")})
