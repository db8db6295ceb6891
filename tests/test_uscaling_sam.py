"""The side branch on SAM's encoder, windowed and global blocks alike: scale equivariance, both of SAM's heads."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.build import build_backbone, build_model, compose, entry, plain
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.host import AdaptedBackbone

BANDS = ("red", "green", "blue")
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "window_size": 4, "global_attn_indexes": [2], "neck_chans": 16}


def sam() -> dict[str, Any]:
    """The config of a SAM encoder of three blocks."""
    node = plain(compose("train", ["backbone=sam_tiny"]).backbone)
    return node | {"settings": node["settings"] | SMALL | {"img_size": 64}}


def encoder(adapter: str, seed: int, **settings: int) -> AdaptedBackbone:
    """The same random trunk for every adapter; the branch speaks up, which at the start it does not."""
    torch.manual_seed(seed)
    made = build_backbone(sam(), entry("adapter", adapter) | settings, BANDS)
    torch.manual_seed(seed)
    for name, parameter in made.named_parameters():
        if name.endswith(".out.weight"):
            nn.init.normal_(parameter)
    return made


def natural(height: int, width: int) -> Tensor:
    """Waves of every length, as photographs have them."""
    waves = [torch.randn(1, 3, height // s, width // s) for s in (2, 4, 8, 16, 32)]
    return sum((F.interpolate(wave, size=(height, width), mode="bicubic") for wave in waves), torch.zeros(()))


def equivariance_error(backbone: AdaptedBackbone, image: Tensor) -> float:
    """How far the features of the image scaled by 2, halved, are from the image's, over what varies in space."""
    scaled = F.interpolate(image, scale_factor=2, mode="bicubic")
    with torch.no_grad():
        features, others = (backbone(i, [2]).grids[0] for i in (image, scaled))
    centred = [t - t.mean((2, 3), keepdim=True) for t in (features, F.avg_pool2d(others, 2))]
    return float((centred[0] - centred[1]).norm() / centred[0].norm())


@pytest.mark.parametrize("seed", range(3))
def test_features_of_a_scaled_image_differ_less_with_the_branch(seed: int) -> None:
    torch.manual_seed(seed)
    image = natural(96, 128)
    without = equivariance_error(encoder("frozen", seed), image)
    pyramid, single = (equivariance_error(encoder("uscaling", seed, levels=n), image) for n in (4, 1))
    assert pyramid < 0.97 * without
    assert single > 1.2 * without  # a branch as wide that looks at one scale only makes it worse


@pytest.mark.parametrize("head", ["sam_decoder", "sam_tiny"])
def test_the_branch_learns_through_sams_heads(head: str) -> None:
    sizes = {"width": 16, "mlp_width": 32, "heads": 1}
    spec = DataSpec("d", BANDS, (ClassSpec("off", (0, 0, 0)), ClassSpec("on", (255, 0, 0))), (0.5,) * 3, (0.2,) * 3)
    config = {"backbone": sam(), "adapter": entry("adapter", "uscaling"), "head": entry("head", head) | sizes}
    model = build_model(config, spec)
    for name, parameter in model.backbone.named_parameters():
        if name.endswith(".out.weight"):
            nn.init.normal_(parameter)
    features = model.backbone(torch.randn(2, 3, 64, 48), model.head.layers)
    answer = model.head(features, (64, 48)) if head == "sam_decoder" else model.head.embed(features)
    answer.square().mean().backward()
    trained = {n: p for n, p in model.backbone.named_parameters() if ".response." in n}
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
