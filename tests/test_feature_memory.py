"""Features that are computed once: the same as ever, in the batch's order, within their limit."""

import pytest
import torch

from vfmadapt.build import build_model, compose, data_source
from vfmadapt.errors import UserError
from vfmadapt.feature_memory import FeatureMemory
from vfmadapt.testing import tiny_backbone


@pytest.fixture
def counted():
    """A tiny backbone's features and the number of images that it was given each time."""
    backbone, given = tiny_backbone("vit").eval(), []

    def compute(image):
        given.append(len(image))
        return backbone(image, (0, 1))

    return compute, given


def test_each_image_is_computed_once_and_comes_back_in_its_place(counted):
    compute, given = counted
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    memory = FeatureMemory(compute, limit=2**20)
    memory(images[:2])
    mixed = images[[2, 0, 3, 0, 1]]
    found = memory(mixed)
    assert given == [2, 2]
    assert len(memory) == 4
    expected = compute(mixed)
    for ours, theirs in zip((*found.grids, *found.prefix), (*expected.grids, *expected.prefix), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (found.layers, found.strides) == (expected.layers, expected.strides)
    assert found.image is mixed


def test_what_does_not_fit_is_computed_again(counted):
    compute, given = counted
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one = compute(images[:1])
    size = sum(t.numel() * 4 for t in (*one.grids, *one.prefix))
    memory = FeatureMemory(compute, limit=2 * size)
    memory(images)
    memory(images)
    assert len(memory) == 2
    assert given == [1, 3, 1]


def model_of(tmp_path, *more):
    cfg = compose("train", ["task=cloudseg", f"data_root={tmp_path}", *more])
    return build_model(cfg, data_source(cfg).spec)


def test_a_model_that_remembers_gives_what_it_gave(tmp_path):
    model = model_of(tmp_path, "adapter=frozen").eval()
    image, valid = torch.rand(2, 6, 64, 64)[:, : len(model.spec.bands)], torch.rand(2, 64, 64) > 0.1
    with torch.no_grad():
        before = model(image, valid)
        model.keep_features(64)
        torch.testing.assert_close(model(image, valid), before)
        torch.testing.assert_close(model(image, valid), before)


@pytest.mark.parametrize("more", [["adapter=lora"], ["adapter=full"], ["adapter=frozen", "head=eomt"]])
def test_features_that_training_changes_are_not_kept(tmp_path, more):
    with pytest.raises(UserError, match="remember=true") as error:
        model_of(tmp_path, *more).keep_features(64)
    assert "\n" not in str(error.value)
