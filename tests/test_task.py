"""Loaders and the Lightning task, on a tiny ViT and generated images."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.contracts import Adapter, AfterBlock, ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.heads.linear import LinearHead
from vfmadapt.host import AdaptedBackbone
from vfmadapt.model import AdaptedModel
from vfmadapt.tasks.augment import Augment
from vfmadapt.tasks.augment_values import ValueAugment
from vfmadapt.tasks.data import EpochSampler, SegmentationData, collate
from vfmadapt.tasks.scenes import SceneData
from vfmadapt.tasks.segmentation import SegmentationTask
from vfmadapt.tasks.training import lr_factor
from vfmadapt.tasks.values import ValueData
from vfmadapt.tasks.windows import whole_image

CLASSES = (ClassSpec("dark", (0, 0, 0)), ClassSpec("bright", (255, 255, 255)), ClassSpec("absent", (255, 0, 0)))
SPEC = DataSpec("blobs", ("a", "b"), CLASSES, (0.5, 0.5), (0.3, 0.3))


class Blobs:
    """Smooth noise in two bands; bright where the first is above 0.5."""

    spec = SPEC

    def __init__(self, counts=(10, 2, 2), size=(24, 32), ignore_all=False):
        self.counts = dict(zip(("train", "val", "test"), counts, strict=True))
        self.size, self.ignore_all, self.reads = size, ignore_all, 0

    def prepare(self):
        pass

    def split(self, name):
        return _Split(self, name)


class _Split:
    def __init__(self, source, name):
        self.source, self.name = source, name

    def __len__(self):
        return self.source.counts[self.name]

    def __getitem__(self, index):
        self.source.reads += 1
        g = torch.Generator().manual_seed(index + 100 * len(self.name))
        coarse = torch.rand(1, 2, 3, 4, generator=g)
        image = torch.nn.functional.interpolate(coarse, size=self.source.size, mode="bilinear")[0]
        mask = (image[0] > 0.5).long()
        mask[:3] = 255
        if self.source.ignore_all:
            mask[:] = 255
        return {
            "image": image,
            "mask": mask,
            "valid": torch.ones_like(mask).bool(),
            "id": f"{self.name}{index}",
            "bands": ("a", "b"),
        }


class Heights(Blobs):
    """What the blobs' first band is, as a value."""

    def split(self, name):
        return [{**s, "values": s["image"][:1]} for s in map(super().split(name).__getitem__, range(self.counts[name]))]


class Bias(Adapter):
    """A vector after the first block; remembers its life."""

    def __init__(self, aux=None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(32))
        self.register_buffer("seen", torch.zeros(1))
        self.aux, self.steps = aux, []

    def sites(self):
        return [AfterBlock(0, self.add)]

    def add(self, grid):
        return grid + self.bias

    def aux_loss(self):
        return None if self.aux is None else self.aux * self.bias.sum()

    def after_step(self, step, total):
        self.steps.append((step, total))


class Twice(Bias):
    """Wants two forwards of each batch and minimises the second."""

    forwards_per_step = 2

    def consistency(self, first, second):
        assert first is not second
        assert first.shape == second.shape
        return second.mean()


def make_model(aux=None, adapter=Bias, spec=SPEC):
    torch.manual_seed(0)
    backbone = timm_backbone(
        "vit_tiny_patch16_224",
        pretrained=False,
        bands=SPEC.bands,
        settings={"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32},
    )
    adapted = AdaptedBackbone(backbone, {"main": adapter(aux)})
    return AdaptedModel(adapted, LinearHead(adapted.spec, num_classes=len(spec.classes)), spec=spec)


def make_data(source=None, **settings):
    return SegmentationData(
        source or Blobs(), augment=Augment(crop=16), **{"batch_size": 4, "steps_per_epoch": 3, **settings}
    )


def train(task, data, **settings):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **{"max_epochs": 1, **settings},
    )
    trainer.fit(task, datamodule=data)
    return trainer


def batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(epoch)
    return list(loader)


def same(one, other):
    return all(
        a["id"] == b["id"] and torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])
        for a, b in zip(one, other, strict=True)
    )


# --- loaders


def test_shots_are_the_first_of_an_order_that_the_seed_draws():
    def used(**settings):
        return {i for epoch in range(3) for batch in batches(make_data(**settings), epoch) for i in batch["id"]}

    two, five, again, other = used(shots=2), used(shots=5), used(shots=5), used(shots=5, seed=1)
    assert (len(two), len(five)) == (2, 5)
    assert two < five == again != other
    few = make_data(shots=2)
    assert sum(few.class_pixels()) < sum(make_data().class_pixels()) / 4
    assert (len(few.samples("train")), len(few.samples("val"))) == (2, 2)


@pytest.mark.parametrize("kind", ["scenes", "values"])
def test_shots_of_other_loaders_are_drawn_as_well(kind):
    def used(**settings):
        settings = {"batch_size": 4, "steps_per_epoch": 9, **settings}
        if kind == "scenes":
            data = SceneData(Blobs(), needs=["mask"], **settings)
        else:
            data = ValueData(Heights(), augment=ValueAugment(crop=16), **settings)
        assert len(data.samples("val")) == 2
        return {i for batch in batches(data) for i in batch["id"]}

    two, five, again, other = used(shots=2), used(shots=5), used(shots=5), used(shots=5, seed=1)
    assert (len(two), len(five)) == (2, 5)
    assert two < five == again != other
    assert len(used()) == 10


@pytest.mark.parametrize("shots", [0, 11])
def test_shots_that_the_data_do_not_have(shots):
    with pytest.raises(UserError, match=f"data.shots={shots}: blobs has 10 training images") as caught:
        make_data(shots=shots).train_dataloader()
    assert "\n" not in str(caught.value)


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch, **settings):
        sampler = EpochSampler(10, seed=seed, **settings)
        sampler.set_epoch(epoch)
        return [d.sample for d in sampler]

    assert sorted(order(0, 0)) == list(range(10))
    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9
    long = order(0, 0, draws=25)
    assert sorted(long[:10]) == sorted(long[10:20]) == list(range(10))
    assert long[:10] != long[10:20]
    assert len(order(0, 0, draws=4)) == 4


def test_batches_are_a_function_of_seed_and_epoch_with_and_without_workers():
    first = batches(make_data(), 2)
    assert [b["image"].shape for b in first] == [(4, 2, 16, 16)] * 3
    assert same(first, batches(make_data(cache_mb=0), 2))
    assert same(first, batches(make_data(num_workers=1), 2))
    assert not same(first, batches(make_data(), 3))
    assert not same(first, batches(make_data(seed=1), 2))


def test_a_sample_that_comes_twice_in_an_epoch_is_augmented_anew():
    one = [b["image"] for b in batches(make_data(Blobs((1, 1, 1)), batch_size=1))]
    assert len({float(i.sum()) for i in one}) == 3


def test_the_cache_reads_once_and_keeps_to_its_limit():
    source = Blobs()
    data = make_data(source)
    batches(data), batches(data, 1)
    assert source.reads == 10
    source = Blobs()
    data = make_data(source, cache_mb=0)
    batches(data), batches(data, 1)
    assert source.reads > 10


def test_val_comes_whole_and_untouched():
    data = make_data(Blobs(size=(19, 45)))
    (batch, _) = list(data.val_dataloader())
    assert batch["image"].shape == (1, 2, 19, 45)
    assert torch.equal(batch["image"][0], data.source.split("val")[0]["image"])


def test_one_pass_over_few_samples():
    assert [len(b["id"]) for b in batches(make_data(Blobs((3, 1, 1)), steps_per_epoch=None))] == [3]
    assert [len(b["id"]) for b in batches(make_data(steps_per_epoch=None))] == [4, 4]


def test_class_pixels_leave_out_the_ignored():
    pixels = make_data().class_pixels()
    masks = torch.stack([Blobs().split("train")[i]["mask"] for i in range(10)])
    assert pixels == [int((masks == c).sum()) for c in range(3)]
    assert pixels[2] == 0


def test_empty_split_and_impossible_settings():
    with pytest.raises(UserError, match="train split holds no sample"):
        make_data(Blobs((0, 1, 1))).train_dataloader()
    with pytest.raises(UserError, match="batch_size=0"):
        make_data(batch_size=0)


def test_collate_stacks():
    samples = [Blobs().split("val")[i] for i in range(2)]
    assert collate(samples)["id"] == ["val0", "val1"]


# --- task


def test_learning_rate():
    cosine = partial(lr_factor, total=100, warmup=0.1, schedule="cosine")
    assert [cosine(0), cosine(9), cosine(10)] == pytest.approx([0.1, 1, 1])
    assert cosine(55) == pytest.approx(0.5)
    assert cosine(100) == pytest.approx(0)
    assert lr_factor(50, 100, warmup=0, schedule="poly") == pytest.approx(0.5**0.9)
    assert lr_factor(99, 100, warmup=0, schedule="constant") == 1


def test_training_changes_only_what_is_trainable():
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    task = SegmentationTask(model, lr=1e-2)
    train(task, make_data())
    trained = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    owned = {id(p) for p in model.trainable_parameters()}
    assert trained == {k for k, p in model.named_parameters() if id(p) in owned}
    assert not model.backbone.backbone.training
    assert task.results["val"]["miou"] is not None
    assert set(task.results["val"]["iou"]) == {"dark", "bright", "absent"}


def test_it_learns():
    task = SegmentationTask(make_model(), lr=3e-3)
    augment = Augment(crop=16, scale=(1, 1), affine=0, radiometric=0, display=0)
    data = SegmentationData(Blobs((30, 4, 1)), augment=augment, batch_size=8, steps_per_epoch=80)
    train(task, data)
    dark, bright = (torch.stack([data.samples("val")[i]["mask"] == c for i in range(4)]).sum() for c in (0, 1))
    constant = float(max(dark, bright) / (dark + bright)) / 2  # mIoU of the best constant map
    # the bare random ViT of width 32 keeps half of a patch's variance, so it cannot go far above
    assert task.results["val"]["miou"] > constant + 0.1


def test_adapters_hear_of_optimiser_steps_not_of_batches():
    task = SegmentationTask(make_model())
    train(task, make_data(steps_per_epoch=4), accumulate_grad_batches=2, max_epochs=2)
    assert task.model.backbone.adapters["main"].steps == [(i + 1, 4) for i in range(4)]


def test_auxiliary_loss_counts():
    """All pixels ignored: what moves the bias is the auxiliary loss alone."""
    for aux, moves in ((None, False), (1.0, True)):
        task = SegmentationTask(make_model(aux), weight_decay=0)
        train(task, make_data(Blobs(ignore_all=True)))
        bias = task.model.backbone.adapters["main"].bias
        assert bool((bias < 0).all()) is moves
        assert bool((bias != 0).any()) is moves


def test_the_consistency_of_two_forwards_counts():
    """All pixels ignored: what moves the bias is the second forward alone."""
    for kind, moves in ((Bias, False), (Twice, True)):
        task = SegmentationTask(make_model(adapter=kind), weight_decay=0)
        train(task, make_data(Blobs(ignore_all=True)))
        assert bool(task.model.backbone.adapters["main"].bias.any()) is moves


def test_class_weights_from_the_training_masks():
    task = SegmentationTask(make_model())
    train(task, make_data())
    dark, bright, _ = make_data().class_pixels()
    weights = task.loss.class_weights
    assert float(weights[1] / weights[0]) == pytest.approx((dark / bright) ** 0.5, rel=1e-4)
    assert weights[2] == 1
    assert SegmentationTask(make_model(), class_weights=None).loss.class_weights is None


def test_a_loss_that_is_not_finite_names_the_step():
    task = SegmentationTask(make_model())
    original = task.model.head.forward
    task.model.head.forward = lambda f, size: original(f, size) * (float("nan") if task.global_step == 2 else 1)
    with pytest.raises(UserError, match=r"nan at step 2.*task\.lr") as raised:
        train(task, make_data())
    assert "\n" not in str(raised.value)


def test_training_without_an_end():
    with pytest.raises(UserError, match="max_steps"):
        train(SegmentationTask(make_model()), make_data(), max_epochs=-1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"schedule": "step"},
        {"class_weights": [1, 2]},
        {"class_weights": "balanced"},
        {"class_weights": [-1, 1, 1]},
        {"warmup": 1},
    ],
)
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SegmentationTask(make_model(), **wrong)


def test_one_class_is_refused():
    """The softmax over one class is 1 everywhere: loss and gradients would be 0."""
    spec = dataclasses.replace(SPEC, classes=(ClassSpec("road", (0, 0, 0)),))
    message = r"blobs has one class, road: a label map needs at least two; .*data.classes=\[background,road\]"
    with pytest.raises(UserError, match=message) as raised:
        SegmentationTask(make_model(spec=spec))
    assert "\n" not in str(raised.value)


def test_decay_is_for_matrices_only():
    task = SegmentationTask(make_model(), weight_decay=0.3)
    trainer = train(task, make_data())
    decayed, plain = trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(task.model.trainable_parameters())


def test_checkpoint_holds_no_frozen_tensor_and_loads_strictly(tmp_path):
    task = SegmentationTask(make_model())
    trainer = train(task, make_data())
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(task.model.adapter_state())
    assert "adapters.main.seen" in checkpoint["state_dict"]
    held = sum(t.numel() for t in checkpoint["state_dict"].values())
    assert held < 0.05 * sum(p.numel() for p in task.model.parameters())
    other = SegmentationTask(make_model())
    other.on_load_checkpoint(checkpoint)
    assert all(torch.equal(v, other.model.adapter_state()[k]) for k, v in task.model.adapter_state().items())
    for broken in ({}, {**task.model.adapter_state(), "head.more": torch.zeros(1)}):
        with pytest.raises(UserError, match="does not fit"):
            other.on_load_checkpoint({"state_dict": broken})


# --- whole images


class Pixelwise(nn.Module):
    """Logits that depend on each pixel alone, so windows must not show."""

    spec = SPEC

    def forward(self, image, valid):
        assert max(image.shape[-2:]) <= 16
        return torch.cat([image * valid[:, None], 1 - image], 1)


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (5, 33), (50, 3)], ids=str)
def test_windows_cover_and_sum_to_one(size):
    image = torch.rand(2, 1, *size)
    valid = torch.rand(2, *size) > 0.2
    expected = torch.cat([image * valid[:, None], 1 - image], 1)
    torch.testing.assert_close(whole_image(Pixelwise(), image, valid, side=16), expected)


def test_previews_show_image_truth_and_prediction(tmp_path):
    from PIL import Image

    from vfmadapt.tasks.previews import evenly, write_previews

    samples = Blobs().split("train")
    assert evenly(samples, 3) == [0, 4, 9]
    files = write_previews(make_model(), samples, tmp_path / "p", indices=[0, 9], side=512)
    assert [f.name for f in files] == ["train0.png", "train9.png"]
    assert np.asarray(Image.open(files[0])).std() > 0
