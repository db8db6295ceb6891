"""Simulated prompts, their loss and metrics, the task, and models that are asked."""

import numpy as np
import pytest
import torch

import vfmadapt
from vfmadapt.build import build_model, compose, instantiate
from vfmadapt.contracts import ClassSpec, DataSpec, MaskPrompts, PromptedMasks
from vfmadapt.errors import UserError
from vfmadapt.losses import PromptLoss, mask_iou
from vfmadapt.metrics import PromptMetrics
from vfmadapt.promptable import PromptableModel
from vfmadapt.tasks import clicks
from vfmadapt.tasks.promptable import PromptableTask

SPEC = DataSpec(
    name="shapes",
    bands=("red", "green", "blue"),
    classes=(ClassSpec("ground", (0, 0, 0)), ClassSpec("road", (1, 1, 1), line=True), ClassSpec("lake", (2, 2, 2))),
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
)
SMALL = ["backbone=vfm_tiny", "head=sam_tiny", "head.width=32", "head.mlp_width=64", "head.heads=2"]


@pytest.fixture(scope="module")
def model() -> PromptableModel:
    torch.manual_seed(0)
    made = build_model(compose("train", ["adapter=frozen", *SMALL]), SPEC)
    return made.eval()


def label_map():
    """Two lakes that touch at a corner, one apart, one too small, a road, an ignored corner."""
    mask = torch.zeros(24, 32, dtype=torch.int64)
    mask[2:6, 2:6] = 2
    mask[6:10, 6:10] = 2
    mask[14:20, 20:28] = 2
    mask[22, 2] = 2
    mask[12] = 1
    mask[20:, 28:] = 255
    return mask


def test_objects_are_connected_regions():
    found = clicks.find_objects(label_map(), [2], smallest=2)
    assert [(value, int(region.sum())) for value, region in found] == [(2, 32), (2, 48)]
    stacked = clicks.stack_objects([found, found[:1], []], (24, 32), most=5)
    assert stacked.masks.shape == (3, 2, 24, 32)
    assert stacked.present.tolist() == [[True, True], [True, False], [False, False]]
    assert stacked.masks[2].all()
    assert clicks.boxes_of(stacked.masks)[0].tolist() == [[2, 2, 9, 9], [20, 14, 27, 19]]


def test_jittered_boxes_stay_in_the_image_and_in_order():
    boxes = torch.tensor([[[0.0, 0.0, 31.0, 23.0], [5.0, 6.0, 5.0, 6.0]]]).repeat(200, 1, 1)
    moved = clicks.jitter(boxes, (24, 32))
    assert (moved[..., 2:] >= moved[..., :2]).all()
    assert moved.min() >= 0
    assert moved[..., 0::2].max() <= 31
    assert moved[..., 1::2].max() <= 23
    assert torch.equal(moved[:, 1], boxes[:, 1])
    assert (moved[:, 0] != boxes[:, 0]).any(0).all()


def test_places_lie_in_their_region():
    regions = torch.zeros(2, 3, 20, 30, dtype=torch.bool)
    regions[..., 4:9, 10:21] = True
    drawn = torch.stack([clicks.random_place(regions) for _ in range(100)])
    assert drawn[..., 0].min() == 10
    assert drawn[..., 0].max() == 20
    assert drawn[..., 1].min() == 4
    assert drawn[..., 1].max() == 8
    assert (clicks.central_place(regions)[..., 1] == 6).all()
    regions[..., :, :] = True  # the image's frame is a boundary, too
    assert clicks.central_place(regions)[0, 0, 1] in (9, 10)


def test_the_next_click_says_what_is_wrong():
    truth = torch.zeros(1, 3, 16, 16, dtype=torch.bool)
    truth[..., 4:12, 4:12] = True
    found = truth.clone()
    found[0, 0, 4:12, 8:12] = False  # half is missing
    found[0, 1, 0:3] = True  # too much above
    counted = torch.ones(1, 16, 16, dtype=torch.bool)
    first = clicks.first_click(truth, clicks.central_place)
    following = clicks.next_click(first, found, truth, counted, clicks.central_place)
    assert following.points.shape == (1, 3, 2, 2)
    assert following.labels[0, :, 1].tolist() == [1, 0, -1]
    x, y = following.points[0, 0, 1].int().tolist()
    assert not found[0, 0, y, x]
    assert truth[0, 0, y, x]
    counted[:, :3] = False
    assert clicks.next_click(first, found, truth, counted, clicks.central_place).labels[0, 1, 1] == -1
    with_box = clicks.next_click(MaskPrompts(boxes=clicks.boxes_of(truth)), found, truth, counted, clicks.random_place)
    assert with_box.boxes is not None
    assert with_box.points.shape == (1, 3, 1, 2)


def answer_of(logits, scores):
    return PromptedMasks(logits=logits, scores=scores, coarse=logits)


def test_loss_trains_the_best_alternative_and_every_score():
    truth = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    truth[..., 2:6, 2:6] = True
    signed = truth.float() * 2 - 1
    logits = torch.stack([signed, -signed], 2).requires_grad_()
    scores = torch.zeros(1, 1, 2, requires_grad=True)
    counted, present = torch.ones(1, 8, 8, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    parts = PromptLoss()(answer_of(logits, scores), truth, counted, present)
    parts["loss"].backward()
    assert logits.grad[:, :, 0].any()
    assert not logits.grad[:, :, 1].any()
    assert scores.grad[0, 0, 0] < 0
    assert parts["iou"] == pytest.approx(0.5)  # expected 0 and 0, found 1 and 0
    perfect = PromptLoss()(answer_of(40 * signed[:, :, None], torch.ones(1, 1, 1)), truth, counted, present)
    assert perfect["loss"] == pytest.approx(0.0, abs=1e-4)


def test_ignored_pixels_and_absent_objects_count_nowhere():
    truth = torch.rand(1, 2, 8, 8) > 0.5
    logits = torch.randn(1, 2, 3, 8, 8)
    scores = torch.randn(1, 2, 3)
    counted, present = torch.rand(1, 8, 8) > 0.4, torch.tensor([[True, False]])
    changed = logits.masked_fill(~counted[:, None, None], float("nan"))
    changed[:, 1] += 3
    leaf = changed.requires_grad_()
    first = PromptLoss()(answer_of(logits, scores), truth, counted, present)["loss"]
    second = PromptLoss()(answer_of(leaf, scores), truth ^ ~counted[:, None], counted, present)["loss"]
    torch.testing.assert_close(first, second)
    second.backward()
    assert not leaf.grad[:, 1].any()
    assert not leaf.grad[(~counted)[:, None, None].expand_as(leaf)].any()
    none = PromptLoss()(answer_of(logits, scores), truth, counted, torch.zeros_like(present))["loss"]
    assert none == 0


def test_what_is_no_object_has_an_expected_iou_of_0():
    truth = torch.ones(1, 2, 8, 8, dtype=torch.bool)
    logits, scores = torch.randn(1, 2, 3, 8, 8, requires_grad=True), torch.full((1, 2, 3), 0.5, requires_grad=True)
    counted, present = torch.ones(1, 8, 8, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    parts = PromptLoss()(answer_of(logits, scores), truth, counted, present, torch.tensor([[True, False]]))
    parts["loss"].backward()
    assert parts["loss"].item() == pytest.approx(0.25)
    assert (scores.grad[0, 0] > 0).all()
    assert not scores.grad[0, 1].any()
    assert not logits.grad.any()


def test_many_points_on_nothing_weigh_no_more_than_one():
    truth = torch.ones(1, 4, 8, 8, dtype=torch.bool)
    logits, scores = torch.full((1, 4, 3, 8, 8), 40.0), torch.tensor([0.5, 0.2, 0.2, 0.2]).view(1, 4, 1).expand(1, 4, 3)
    counted, present = torch.ones(1, 8, 8, dtype=torch.bool), torch.tensor([[True, False, False, False]])
    for nothing in ([[False, True, False, False]], [[False, True, True, True]]):
        parts = PromptLoss()(answer_of(logits, scores), truth, counted, present, torch.tensor(nothing))
        assert parts["iou"].item() == pytest.approx(0.5**2 + 0.2**2)


def test_points_on_nothing_lie_beside_all_objects(model):
    task = PromptableTask(model, classes=["lake"], smallest=2, objects=4)
    mask = torch.stack([label_map(), torch.zeros_like(label_map())])
    counted = mask != 255
    objects = task.drawn_objects(mask)
    places, nothing = task._places(objects, mask, counted)
    assert nothing.tolist() == [[False, False], [True, True]]
    assert torch.equal(places[0], objects.masks[0])
    assert torch.equal(places[1, 0], counted[1])


def test_iou_against_counting():
    found, truth = torch.rand(2, 5, 9, 9) > 0.5, torch.rand(2, 5, 9, 9) > 0.5
    counted = torch.rand(2, 1, 9, 9) > 0.2
    ours = mask_iou(found, truth, counted)
    for i in range(2):
        for j in range(5):
            f, t = (set(np.flatnonzero((m[i, j] & counted[i, 0]).numpy().ravel())) for m in (found, truth))
            assert ours[i, j] == pytest.approx(len(f & t) / len(f | t))


def test_metrics_are_means_over_objects():
    metrics = PromptMetrics(["a", "b"], clicks=2)
    for value in (0.2, 0.4):
        metrics.update(torch.tensor([0]), dict.fromkeys(("box", "point", "clicks"), torch.tensor([value])))
    metrics.update(torch.tensor([1]), {"box": torch.tensor([0.9]), "point": torch.zeros(1), "clicks": torch.ones(1)})
    result = metrics.compute()
    assert result["miou"] == result["box_iou"] == pytest.approx(0.5)
    assert result["point_iou"] == pytest.approx(0.2)
    assert result["iou"] == pytest.approx({"a": 0.3, "b": 0.9})
    assert result["objects"] == 3
    metrics.reset()
    assert metrics.compute()["miou"] is None


def test_asking_a_model(model):
    image = torch.rand(3, 40, 56)
    with pytest.raises(UserError, match="call set_image"):
        build_like(model).predict(points=[[1, 1]])
    model.set_image(image)
    one = model.predict(points=np.array([[10, 12]]))
    assert one.masks.shape == (1, 1, 40, 56)
    assert one.masks.dtype == torch.bool
    several = model.predict(points=[[10, 12]], labels=[1], several=True)
    assert several.masks.shape == (1, 3, 40, 56)
    assert one.scores[0, 0] == several.scores.max()
    both = model.predict(points=[[[10, 12]], [[50, 3]]], boxes=[[4, 5, 20, 30], [40, 0, 56, 20]])
    assert both.masks.shape == (2, 1, 40, 56)
    again = model.predict(boxes=[[4, 5, 20, 30], [40, 0, 56, 20]], masks=both.coarse[:, 0])
    assert again.masks.shape == (2, 1, 40, 56)
    with torch.no_grad():
        embedding = model.encode(image[None])
        asked = MaskPrompts(boxes=torch.tensor([[[4.0, 5.0, 20.0, 30.0]]]))
        direct = model.answer(embedding, asked, (40, 56))
    assert torch.equal(direct.logits[0] > 0, model.predict(boxes=[4, 5, 20, 30]).masks)


def build_like(model):
    return PromptableModel(model.backbone, model.asked, spec=model.spec)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "nothing is asked"),
        (
            {"points": [[60, 3]]},
            r"points: \(60, 3\) lies outside the image; x is -0.5 to below 55\.5, y -0.5 to below 39\.5",
        ),
        ({"points": [[-1, 3]]}, "outside"),
        ({"points": [[55.5, 3]]}, "outside"),
        ({"points": [[3, 40]]}, "outside"),
        ({"points": "here"}, "points: 'here' given; give real numbers"),
        ({"points": [["1", "2"]]}, "points: .*give real numbers"),
        ({"points": [[1, 2], [3]]}, r"points: \[\[1, 2\], \[3\]\] given; give real numbers"),
        ({"points": [[None, 2]]}, "points: .*give real numbers"),
        ({"points": {"x": 1, "y": 2}}, "points: .*give real numbers"),
        ({"points": [[10**30, 2]]}, "points: .*give real numbers"),
        ({"points": [[1e300, 2]]}, "points: a value is NaN or infinite"),
        ({"points": [[1 + 2j, 2]]}, "points: .*give real numbers"),
        ({"points": torch.ones(1, 2, dtype=torch.complex64)}, "points: .*give real numbers"),
        ({"points": np.array([[1, {}]])}, "points: .*give real numbers"),
        ({"points": np.zeros((1, 0, 2))}, r"points: the shape is \(1, 0, 2\); give at least one for each object"),
        ({"points": []}, r"points: the shape is \(0,\)"),
        ({"points": 3}, r"points: the shape is \(\)"),
        ({"points": [[float("nan"), 3]]}, "points: a value is NaN"),
        ({"points": [1, 2, 3]}, r"points: the shape is \(3,\); give \(M, N, 2\)"),
        ({"points": [[1, 2]], "labels": [2]}, "labels: 2 is not known"),
        ({"points": [[1, 2]], "labels": [float("nan")]}, "labels: nan"),
        ({"points": [[1, 2]], "labels": [1, 0]}, "give one for each"),
        ({"points": [[1, 2]], "labels": "on"}, "labels: 'on' given; give real numbers"),
        ({"points": [[1, 2]], "labels": [None]}, "labels: .*give real numbers"),
        ({"points": [[[1, 2], [3, 4]]], "labels": [[1], [0, 1]]}, "labels: .*give real numbers"),
        ({"points": [[1, 2]], "labels": [10**30]}, "labels: .*give real numbers"),
        ({"points": [[1, 2]], "labels": [1j]}, "labels: .*give real numbers"),
        ({"labels": [1], "boxes": [1, 1, 5, 5]}, "give points="),
        ({"boxes": [5, 5, 5, 9]}, r"boxes: \(5, 5, 5, 9\) is empty"),
        ({"boxes": [9, 9, 3, 12]}, "is empty"),
        ({"boxes": [1, 1, 5, 41]}, r"boxes: \(1, 1, 5, 41\) lies outside the image; .*x1 at most 56, y1 at most 40"),
        ({"boxes": [55.7, 1, 56, 4]}, "outside"),
        ({"boxes": [-1, 1, 5, 4]}, "outside"),
        ({"boxes": "all"}, "boxes: 'all' given; give real numbers"),
        ({"boxes": [[1, 1, 5, 5], [1, 1, 5]]}, "boxes: .*give real numbers"),
        ({"boxes": [1, 1, 5, float("inf")]}, "boxes: a value is NaN or infinite"),
        ({"boxes": [1, 1, float("nan"), 5]}, "boxes: a value is NaN or infinite"),
        ({"boxes": [1, 1, 5, 5], "masks": np.full((20, 28), np.nan)}, "masks: a value is NaN or infinite"),
        ({"boxes": np.zeros((0, 4))}, "at least one"),
        ({"boxes": [[1, 1, 5, 5]], "points": [[[1, 1]], [[2, 2]]]}, "points of 2, boxes of 1 objects"),
        ({"boxes": [1, 1, 5, 5], "masks": np.zeros((1, 3, 3))}, "masks: the shape"),
        ({"masks": {}}, "masks: .*give real numbers"),
    ],
    ids=str,
)
def test_bad_prompts_are_refused_in_one_line(model, prompts, message):
    model.set_image(torch.rand(3, 40, 56))
    with pytest.raises(UserError, match=message) as raised:
        model.predict(**prompts)
    assert "\n" not in str(raised.value)


def test_places_on_the_outermost_pixels_are_in_the_image(model):
    model.set_image(torch.rand(3, 40, 56))
    for prompts in (
        {"points": [[-0.5, -0.5]]},
        {"points": [[55.4, 39.4]]},
        {"boxes": [0, 0, 56, 40]},
        {"boxes": [-0.5, -0.5, 55.5, 39.5]},
    ):
        assert model.predict(**prompts).scores.isfinite().all()


@pytest.mark.parametrize(
    ("image", "valid", "message"),
    [
        ("scene.tif", None, "image: 'scene.tif' given; give real numbers"),
        (None, None, "image: None given"),
        ([[[1, 2], [3]]], None, "image: .*give real numbers"),
        (np.ones((3, 8, 8), complex), None, "image: .*give real numbers"),
        (
            np.ones((3, 0, 8)),
            None,
            r"image: the shape is \(3, 0, 8\); give \(3, H, W\) with the bands red, green, blue",
        ),
        (np.ones((8, 8, 3)), None, r"image: the shape is \(8, 8, 3\); give \(3, H, W\)"),
        (np.ones((8, 8)), None, r"image: the shape is \(8, 8\)"),
        (np.ones((1, 3, 8, 8)), None, r"image: the shape is \(1, 3, 8, 8\)"),
        (np.full((3, 8, 8), np.nan), None, "image: no pixel is both valid and finite"),
        (np.ones((3, 8, 8)), np.zeros((8, 8), bool), "image: no pixel is both valid and finite"),
        (np.ones((3, 8, 8)), np.ones((8, 9), bool), r"valid: the shape is \(8, 9\); give .*\(8, 8\)"),
        (np.ones((3, 8, 8)), np.ones((1, 8, 8), bool), r"valid: the shape is \(1, 8, 8\)"),
        (np.ones((3, 8, 8)), "all", "valid: 'all' given"),
    ],
    ids=range(13),
)
def test_bad_images_are_refused_in_one_line(model, image, valid, message):
    with pytest.raises(UserError, match=message) as raised:
        model.set_image(image, valid)
    assert "\n" not in str(raised.value)


def test_images_of_any_numbers_are_read(model):
    image = np.random.default_rng(0).integers(0, 200, (3, 40, 56), dtype=np.uint8)
    found = []
    for same in (image, image.astype(">f8"), image[:, ::-1].copy()[:, ::-1], image.tolist(), torch.from_numpy(image)):
        model.set_image(same, np.ones((40, 56), np.uint8))
        found.append(model.predict(boxes=[3, 3, 20, 20]).coarse)
    assert all(torch.equal(first, found[0]) for first in found)


def test_wrong_tasks_are_refused(model):
    plain = build_model(compose("train", ["head=linear", "adapter=frozen"]), SPEC)
    for made, settings, message in (
        (plain, {}, "head=sam"),
        (model, {"classes": ["lakes"]}, "'lakes' is no class of shapes"),
        (model, {"classes": []}, "is no class"),
        (model, {"objects": 0}, "task.objects=0"),
        (model, {"lr": 0.0}, "lr is above 0"),
    ):
        with pytest.raises(UserError, match=message):
            PromptableTask(made, **settings)
    assert PromptableTask(model).classes == [0, 2]


def test_training_step_learns_one_picture(model):
    """Lakes are bright: a few steps on one picture lower the loss of its objects."""
    torch.manual_seed(0)
    made = build_model(compose("train", ["adapter=frozen", *SMALL]), SPEC)
    node = compose("train", ["task=promptable", "task.classes=[lake]", "task.smallest=2", "task.clicks=0"]).task
    task = instantiate(node, made, packages=("vfmadapt.tasks.",))
    task.log_dict = lambda *_: None
    task.complete = lambda loss: loss
    mask = torch.stack([label_map(), torch.zeros_like(label_map())])  # the second picture holds no object
    image = (mask == 2).float()[:, None].expand(-1, 3, -1, -1).contiguous()
    batch = {"image": image, "mask": mask, "valid": torch.ones_like(mask, dtype=torch.bool)}
    optimizer = torch.optim.AdamW(made.trainable_parameters(), lr=1e-2)
    losses = []
    for step in range(25):
        loss = task.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_saved_and_loaded_it_answers_the_same(model, tmp_path):
    loaded = vfmadapt.load(vfmadapt.save(tmp_path / "adapter.safetensors", model))
    assert isinstance(loaded, PromptableModel)
    image = torch.rand(3, 50, 60)
    for asked in (model, loaded):
        asked.set_image(image)
    first, second = (asked.predict(boxes=[3, 3, 20, 20]) for asked in (model, loaded))
    assert torch.equal(first.coarse, second.coarse)
    with pytest.raises(UserError, match="labels no pixels"):
        loaded(image[None])


def test_an_adapter_file_does_not_need_the_weights_that_the_head_began_with(tmp_path):
    cfg = compose("train", ["adapter=frozen", *SMALL])
    made = build_model(cfg, SPEC)
    assert "weights" not in made.backbone.config["head"]


def test_measured_by_windows_and_drawn(tmp_path):
    """A label map larger than the window: objects are cut by it, as they are in the picture."""
    torch.manual_seed(0)
    task = PromptableTask(
        build_model(compose("train", ["adapter=frozen", *SMALL]), SPEC), window=16, smallest=2, classes=["lake"]
    ).eval()
    mask = label_map()
    image = torch.rand(3, *mask.shape)
    sample = {"image": image, "mask": mask, "valid": torch.ones_like(mask, dtype=torch.bool), "id": "a/b"}
    task._evaluate({k: v[None] for k, v in sample.items() if k != "id"})
    assert task.metrics.compute()["objects"] == 3  # the two that touch are one, the third is cut in two
    files = task.draw([{**sample, "bands": SPEC.bands}], tmp_path / "pictures", indices=[0])
    assert [f.name for f in files] == ["a_b.png"]
