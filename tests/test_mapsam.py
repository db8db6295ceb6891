"""MapSAM: published counts, where its prompts lie, what its masked attention can see, and how its parts are trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from vfmadapt.adapters.mapsam_dora import ColumnDora, MapSamDora
from vfmadapt.contracts import ClassSpec, DataSpec, Features, UserError
from vfmadapt.heads._mapsam import attended_cells, margin, mean_where, select_points, two_way
from vfmadapt.heads._resize import to_image
from vfmadapt.heads._sam import make_mask_decoder
from vfmadapt.heads._specks import without_specks
from vfmadapt.heads.mapsam import MapSamHead
from vfmadapt.heads.sam import SamHead
from vfmadapt.losses import SegmentationLoss
from vfmadapt.model import AdaptedModel
from vfmadapt.tasks.segmentation import SegmentationTask
from vfmadapt.testing import adapted, vit_spec

SMALL = {"width": 32, "mlp_width": 64, "heads": 2}


def make_head(classes: int = 3, **settings) -> MapSamHead:
    torch.manual_seed(0)
    return MapSamHead(vit_spec(8, 4), num_classes=classes, **{**SMALL, **settings})


def make_features(head: MapSamHead, cells: tuple[int, int] = (3, 5), batch: int = 2) -> Features:
    g = torch.Generator().manual_seed(1)
    grids = tuple(torch.randn(batch, 8, *cells, generator=g) for _ in head.layers)
    return Features(grids, tuple(x.new_zeros(batch, 0, 8) for x in grids), head.layers, (16,) * len(grids))


def test_published_counts() -> None:
    spec = vit_spec(768, 12)  # as far as they go, ViT-B's
    with torch.device("meta"):
        adapter, head = MapSamDora(spec), MapSamHead(spec, num_classes=1, train_neck=False)
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in [("adapter", adapter), *head.named_children()]
    }
    del parts["neck"]  # SAM's own, frozen
    assert parts == {
        "adapter": 147_456 + 18_432,
        "prompt_encoder": 6_220,
        "mask_decoder": 3_637_377,
        "generators": 4 * 17_665,
    }
    assert sum(parts.values()) == 3_880_145
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == 3_577_220
    assert head.layers == (0, 4, 8, 11)


def test_column_lengths_are_the_trained_ones() -> None:
    torch.manual_seed(0)
    layer, weight = ColumnDora(6, 9, rank=2), torch.randn(9, 6)
    weight[:, 4] = 0
    with torch.no_grad():
        layer.magnitude.uniform_(1, 2)
        layer.down.normal_()
        layer.down[:, 4] = 0
    found = layer(weight)
    found.sum().backward()
    want = layer.magnitude.detach()[0] * (torch.arange(6) != 4)
    torch.testing.assert_close(found.norm(dim=0), want)
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_new_adapter_changes_no_bit_and_rank_0_is_refused() -> None:
    weight = torch.randn(9, 6)
    layer = ColumnDora(6, 9, rank=2)
    layer.magnitude.data.copy_(weight.norm(dim=0, keepdim=True))
    assert torch.equal(layer(weight), weight)
    with pytest.raises(UserError, match="rank=0 must be at least 1"):
        MapSamDora(vit_spec(8), rank=0)


def test_a_class_is_where_it_exceeds_the_others() -> None:
    scores = torch.randn(2, 4, 5, 7)
    likeliest = torch.nn.functional.one_hot(scores.argmax(1), 4).movedim(-1, 1).bool()
    assert torch.equal(attended_cells(scores), likeliest.flatten(2))
    torch.testing.assert_close(margin(scores + torch.randn(2, 1, 5, 7)), margin(scores))
    assert torch.equal(margin(scores[:, :1]), scores[:, :1])


def test_points_lie_where_the_scores_say_in_any_shape() -> None:
    scores = torch.rand(1, 1, 4, 11)
    scores[0, 0, 3, 9], scores[0, 0, 1, 10], scores[0, 0, 2, 0], scores[0, 0, 0, 7] = 5, 4, -5, -4
    points, labels = select_points(scores)
    assert points.tolist() == [[[[9, 3], [10, 1], [0, 2], [7, 0]]]]
    assert labels.tolist() == [[[1, 1, 0, 0]]]


@pytest.mark.parametrize("classes", [1, 3])
def test_rounding_does_not_choose_among_the_pixels_of_a_plateau(classes: int) -> None:
    """Outside the outermost cells' centres upsampling repeats them: 8 x 8 pixels in a corner are the same."""
    torch.manual_seed(0)
    coarse = torch.randn(1, classes, 3, 5)
    coarse[0, :, 0, 4], coarse[0, :, 2, 0] = torch.linspace(9, 4, classes), torch.linspace(-9, 3, classes)
    wide = to_image(coarse, (3, 5), 16, (48, 80))
    assert margin(wide)[0, 0].eq(margin(wide)[0, 0].amax()).sum() == 64
    rounded = wide * (1 + 1e-6 * torch.rand(20, *wide.shape[1:]))
    points, _ = select_points(rounded)
    assert torch.equal(points, select_points(wide)[0].expand_as(points))
    assert points[0, 0].tolist() == [[72, 0], [73, 0], [0, 40], [1, 40]]
    by_topk, _ = select_points(rounded, published=True)
    assert not torch.equal(by_topk, by_topk[:1].expand_as(by_topk))


def test_without_plateaus_points_are_the_published_ones() -> None:
    scores = torch.stack([torch.randperm(77) for _ in range(6)]).view(6, 1, 7, 11).float()
    assert torch.equal(select_points(scores)[0], select_points(scores, published=True)[0])


def test_semantic_prompt_is_a_mean_over_the_class_or_nothing() -> None:
    cells = torch.tensor([[[True, False, True, False], [False] * 4]])
    embedding = torch.arange(8.0).view(1, 2, 2, 2)
    assert mean_where(cells, embedding).tolist() == [[[1, 5], [0, 0]]]


def decoded(image: torch.Tensor, cells: torch.Tensor, *, published: bool = False) -> torch.Tensor:
    """Tokens of two classes after one layer, without the last attention, which is not masked."""
    torch.manual_seed(0)
    transformer = make_mask_decoder(32, 64, 2, 1).transformer
    transformer.layers = transformer.layers[:1]
    for parameter in transformer.final_attn_token_to_image.out_proj.parameters():
        nn.init.zeros_(parameter)
    owners = torch.tensor([[0.5, 0.5], [1, 0], [0, 1]])
    places, tokens, none = torch.randn(1, 12, 32), torch.randn(1, 3, 32), torch.zeros(1, 1, 32)
    return two_way(transformer, image, places, tokens, none, owners=owners, cells=cells, published=published)[0]


def test_tokens_see_the_cells_of_their_class_alone() -> None:
    image, cells = torch.randn(1, 12, 32), torch.zeros(1, 2, 12, dtype=torch.bool)
    cells[0, 0, :4], cells[0, 1, 4:7] = True, True
    before = decoded(image, cells)
    image[0, 5] += 1
    after = decoded(image, cells)
    assert torch.equal(before[0, 1], after[0, 1])
    assert not torch.allclose(before[0, 0], after[0, 0])  # the token of no class sees both
    assert not torch.allclose(before[0, 2], after[0, 2])
    image[0, 8:] = 9
    assert torch.equal(decoded(image, cells), after)


def test_published_attention_hardly_tells_the_cells_inside_apart() -> None:
    """A softmax of values in 0..1: no cell weighs more than e times another, however well it fits."""
    image, cells = 30 * torch.randn(1, 12, 32), torch.ones(1, 2, 12, dtype=torch.bool)
    mean, spread = decoded(image.mean(1, keepdim=True).expand_as(image), cells), {}
    for published in (False, True):
        spread[published] = (decoded(image, cells, published=published) - mean).norm()
    assert spread[True] < 0.6 * spread[False]


def test_a_class_without_a_cell_attends_everywhere() -> None:
    image, cells = torch.randn(1, 12, 32), torch.ones(1, 2, 12, dtype=torch.bool)
    everywhere = decoded(image, cells)
    cells[0, 1] = False
    assert torch.equal(decoded(image, cells), everywhere)


@pytest.mark.parametrize("classes", [1, 3])
def test_images_of_a_batch_are_independent(classes: int) -> None:
    head = make_head(classes)
    both = make_features(head)
    for alone, together in zip(
        head.supervised(both.rows(1, 2), (43, 75)), head.supervised(both, (43, 75)), strict=True
    ):
        torch.testing.assert_close(alone, together[1:], atol=1e-5, rtol=1e-4)


def test_the_generator_learns_from_the_coarse_logits_alone() -> None:
    head = make_head()
    masks, coarse = head.supervised(make_features(head), (43, 75))
    masks.square().mean().backward(retain_graph=True)
    assert all(p.grad is None for p in head.generators.parameters())
    coarse.square().mean().backward()
    assert all(p.grad.any() for p in head.generators.parameters())


@pytest.mark.parametrize("detail", [False, True])
def test_masks_see_the_image_for_detail(detail: bool) -> None:
    head = make_head(detail=detail)
    image = torch.randn(2, 3, 43, 75, requires_grad=True)
    features = replace(make_features(head), image=image)
    assert head(features, (43, 75)).shape == (2, 3, 43, 75)
    head(features, (43, 75)).square().mean().backward()
    assert (image.grad is not None and bool(image.grad.any())) == detail


def a_map_with_specks() -> torch.Tensor:
    """Logits (1, 3, 12, 16) of a class 1 with a line, a speck in the middle of 0, and a corner of 2 pixels."""
    labels = torch.zeros(12, 16, dtype=torch.int64)
    labels[5] = 1
    labels[2:4, 7:9] = 1
    labels[:2, 0] = 1
    logits = torch.nn.functional.one_hot(labels, 3).movedim(-1, 0)[None].float()
    logits[0, 2, 2:4, 7] = 0.5  # the next likely there
    return logits


def test_specks_get_the_next_likely_class() -> None:
    logits = a_map_with_specks()
    before, after = logits.argmax(1), without_specks(logits, 5).argmax(1)
    assert after[0, 2:4, 7].tolist() == [2, 2]
    assert after[0, 2:4, 8].tolist() == [0, 0]
    changed = torch.zeros(1, 12, 16, dtype=torch.bool)
    changed[0, 2:4, 7:9] = True
    assert torch.equal(before != after, changed)  # the line is long, and the corner may go on beyond the border
    assert torch.equal(without_specks(logits, 4), logits)


def test_pieces_that_touch_at_corners_are_one_region() -> None:
    logits = a_map_with_specks()
    logits[0, :, 4, 9] = torch.tensor([0.0, 1.0, 0.0])  # between the speck and the line
    assert torch.equal(without_specks(logits, 5), logits)


def test_specks_stay_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    head, logits = make_head(smallest=5), a_map_with_specks()
    monkeypatch.setattr(head, "supervised", lambda *_: (logits, logits))
    features = make_features(head)
    assert torch.equal(head.train()(features, (12, 16)), logits)
    assert torch.equal(head.eval()(features, (12, 16)), without_specks(logits, 5))
    head.smallest = 0
    assert torch.equal(head(features, (12, 16)), logits)


def test_learns_to_tell_classes_apart() -> None:
    head, loss = make_head(), SegmentationLoss()
    features, size = make_features(head, (4, 6)), (64, 96)
    labels = features.grids[-1][:, :3].argmax(1).repeat_interleave(16, 1).repeat_interleave(16, 2)
    optimiser = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=6e-3)
    for _ in range(30):
        optimiser.zero_grad()
        torch.stack([loss(found, labels)["loss"] for found in head.supervised(features, size)]).sum().backward()
        optimiser.step()
    assert (head(features, size).argmax(1) == labels).float().mean() > 0.9  # by chance: 0.33


def test_the_task_adds_the_loss_of_the_coarse_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = adapted("mapsam_dora")
    classes = tuple(ClassSpec(name, (0, 0, 0)) for name in "abc")
    spec = DataSpec("noise", ("r", "g", "b"), classes, (0.0,) * 3, (1.0,) * 3)
    model = AdaptedModel(backbone, MapSamHead(backbone.spec, num_classes=3, **SMALL), spec=spec)
    task = SegmentationTask(model, class_weights=None)
    task.trainer = Trainer(max_steps=1, logger=False, accelerator="cpu", enable_checkpointing=False)
    monkeypatch.setattr(task, "complete", lambda loss: loss)
    monkeypatch.setattr(task, "log_dict", lambda _: None)
    image, mask = torch.randn(2, 3, 48, 64), torch.randint(0, 3, (2, 48, 64))
    batch = {"image": image, "valid": torch.ones(2, 48, 64).bool(), "mask": mask}
    first, coarse = model.head.supervised(model.features(image), (48, 64))
    assert torch.equal(first, model(image))
    want = task.loss(first, mask)["loss"] + task.loss(coarse, mask)["loss"]
    torch.testing.assert_close(task.training_step(batch, 0), want)


def test_weights_of_sam(tmp_path: Path) -> None:
    sam = SamHead(vit_spec(8, 4), num_classes=2, **SMALL)
    official = {f"image_encoder.{k}" if k.startswith("neck") else k: v for k, v in sam.state_dict().items()}
    torch.save(official, path := tmp_path / "sam.pth")
    head = make_head(weights=str(path), train_neck=False)
    found, fresh = head.state_dict(), ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")
    for name, tensor in sam.state_dict().items():
        if not any(part in name for part in fresh):
            assert torch.equal(found[name], tensor), name
    assert not any(p.requires_grad for p in head.neck.parameters())
    torch.save({k: v for k, v in official.items() if "no_mask" not in k}, path)
    with pytest.raises(UserError, match=r"no_mask_embed.weight is missing"):
        make_head(weights=str(path))


def test_a_negative_size_of_specks_is_refused() -> None:
    with pytest.raises(UserError, match=r"head\.smallest=-1"):
        make_head(smallest=-1)


def test_blocks_that_one_neck_cannot_read_are_refused() -> None:
    spec = replace(vit_spec(8, 6), dims=(4, 8, 8, 8, 8, 16), strides=(8, 16, 16, 16, 16, 32))
    assert MapSamHead(spec, num_classes=2, **SMALL).layers == (1, 2, 3, 4)
    assert MapSamHead(spec, num_classes=2, layers=(2, -2), **SMALL).layers == (2, 4)
    with pytest.raises(UserError, match=r"head.layers=\[0, 4\].*like block 4 are 1, 2, 3, 4"):
        MapSamHead(spec, num_classes=2, layers=(0, 4), **SMALL)
