"""task=tracking: what is trained, what it is measured by, and the adapter file."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from vfmadapt.adapters.owned import TrainedTensors
from vfmadapt.checkpoint import load, save
from vfmadapt.contracts import ClassSpec, ClipSample
from vfmadapt.errors import UserError
from vfmadapt.tasks.clips import Pieces, TrackingData, lost_labels
from vfmadapt.tasks.data import Draw
from vfmadapt.tasks.tracking import TrackingTask, drawn_objects
from vfmadapt.testing_tracking import SPEC, moving_frames, tiny_tracker


class Discs:
    """One clip of a disc that crosses the picture: its own split, its own source."""

    spec = SPEC

    def prepare(self) -> None: ...

    def clips(self, name: str) -> "Discs":
        return self

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> ClipSample:
        return self.read(index, self.labelled(index))

    def labelled(self, index: int) -> Sequence[int]:
        return range(6)

    def read(self, index: int, frames: Sequence[int]) -> ClipSample:
        image = moving_frames(6)[list(frames)]
        return {"image": image, "mask": (image[:, 0] > 0.8).long(), "spacing": (None, None, None), "id": "disc"}


def pieces(**settings: object) -> Pieces:
    chosen = {
        "length": 4,
        "side": 64,
        "flips": False,
        "radiometric": 0.0,
        "focus": None,
        "gap": 1,
        "leave": 0.0,
        "seed": 0,
    }
    chosen |= {"clips": Discs(), "chosen": [0]} | settings
    return Pieces(**chosen)


def batch(length: int = 4) -> dict[str, torch.Tensor]:
    piece = pieces(length=length)[Draw(0, 0, 0)]
    return {key: value[None] for key, value in piece.items()}


def step(task: TrackingTask) -> torch.Tensor:
    task.complete = lambda loss: loss  # no trainer to log to
    return task.training_step(batch(), 0)


def task(adapter: str = "dd", **settings: object) -> TrackingTask:
    return TrackingTask(tiny_tracker(adapter, train_decoder=True), **settings)


@pytest.mark.parametrize("prompt", ["box", "point", "mask"])
def test_only_adapters_and_decoder_learn(prompt: str) -> None:
    torch.manual_seed(0)
    made = task(prompts=[prompt])
    before = {name: p.clone() for name, p in made.model.backbone.backbone.named_parameters()}
    step(made).backward()
    adapters = made.model.backbone.adapters
    assert isinstance(adapters["decoder"], TrainedTensors)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters["main"].parameters())
    learning = [name for name, p in adapters["decoder"].named_parameters() if p.grad is not None]
    assert any("conv_s0" in name for name in learning)
    assert any("output_hypernetworks" in name for name in learning)
    trained = {id(p) for p in made.model.trainable_parameters()}
    for name, parameter in made.model.backbone.backbone.named_parameters():
        assert id(parameter) in trained or parameter.grad is None, name
        assert torch.equal(parameter, before[name])


def test_full_trains_the_whole_model() -> None:
    made = task("full")
    step(made).backward()
    owned = made.model.backbone.adapters["main"].copies
    for part in ("memory_attention", "memory_encoder", "mask_decoder", "prompt_encoder", "vision_encoder"):
        assert any(f"/{part}/" in key and p.grad is not None for key, p in owned.items()), part


def test_learns_a_clip() -> None:
    torch.manual_seed(0)
    made = task(prompts=["box"], lr=2e-3)
    optimiser = torch.optim.AdamW(made.model.trainable_parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = step(made)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_the_adapter_file_gives_the_same_tracker(tmp_path: Path) -> None:
    made = task().model
    path = save(tmp_path / "a.safetensors", made)
    loaded = load(path)
    assert type(loaded) is type(made)
    assert {k: v.shape for k, v in loaded.adapter_state().items()} == {
        k: v.shape for k, v in made.adapter_state().items()
    }
    assert all(torch.equal(v, made.adapter_state()[k]) for k, v in loaded.adapter_state().items())


def test_measures_every_structure_but_not_its_prompt() -> None:
    made = task()
    found, truth, prompted = made.follow(Discs()[0])
    assert found.shape == truth.shape == (1, 6, 64, 64)
    assert prompted.tolist() == [3]
    made.log = lambda *_, **__: None
    made.on_test_epoch_start()
    made.test_step(Discs()[0])
    made._conclude("test")
    kept = [0, 1, 2, 4, 5]
    both = (found & truth)[:, kept].sum()
    assert made.results["test"]["dice"] == pytest.approx(
        float(2 * both / (found[:, kept].sum() + truth[:, kept].sum()))
    )
    assert "Dice" in made.table()


def test_each_structure_is_measured_by_itself() -> None:
    """Two clips of a disc and a bar, one without the bar; what is found is the truth, shifted by a column."""
    made = task()
    names = ("background", "disc", "bar")
    made.model.spec = replace(SPEC, classes=tuple(ClassSpec(name, (0, 0, 0)) for name in names))
    mask = torch.zeros(2, 4, 16, 16, dtype=torch.int64)
    mask[:, :, 2:6, 2:6] = 1
    mask[0, :, 10:12, 3:13] = 2

    def follow(sample: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        labels = [int(label) for label in sample["mask"].unique() if label]
        truth = torch.stack([sample["mask"] == label for label in labels])
        return truth.roll(int(sample["id"]), dims=-1), truth, torch.tensor([2] * len(labels))

    made.follow, made.log = follow, lambda *_, **__: None
    made.on_test_epoch_start()
    for index in range(2):
        made.test_step({"mask": mask[index], "id": str(index + 1)})
    made._conclude("test")
    result = made.results["test"]
    assert result["structure_dice"] == pytest.approx({"disc": (0.75 + 0.5) / 2, "bar": 0.9})
    assert result["dice"] == pytest.approx((0.75 + 0.5 + 0.9) / 3)
    assert made.table().splitlines()[1:] == ["  disc  Dice 0.625", "  bar   Dice 0.900"]


def test_previews(tmp_path: Path) -> None:
    (path,) = task().draw(Discs(), tmp_path, indices=[0])
    assert path.name == "disc.png"


def test_pieces_follow_the_seed_and_turn_round() -> None:
    first, again = (
        pieces(radiometric=0.5, flips=True)[Draw(0, 3, 1)],
        pieces(radiometric=0.5, flips=True)[Draw(0, 3, 1)],
    )
    assert torch.equal(first["image"], again["image"])
    assert first["image"].shape == (4, 3, 64, 64)
    assert 0 <= first["image"].min() < first["image"].max() <= 1
    long = pieces(length=9)[Draw(0, 0, 0)]
    assert long["mask"].shape == (9, 64, 64)
    steps = [float((a - b).abs().max()) for a, b in zip(long["image"], long["image"][1:], strict=False)]
    assert min(steps) > 0  # no frame twice in a row


@pytest.mark.parametrize("focus", [(1.0, 1.0), (2.0, 3.0)])
def test_windows_are_as_wide_as_asked_and_never_lose_their_structure(focus: tuple[float, float]) -> None:
    for epoch in range(8):
        mask = pieces(focus=focus)[Draw(0, epoch, 0)]["mask"][0]
        wide = max(int(mask.any(axis).sum()) for axis in (0, 1)) / 64
        assert 0.9 / focus[1] <= wide <= 1.1 / focus[0]


def test_slivers_are_no_structures() -> None:
    class Sliver(Discs):
        def read(self, index: int, frames: Sequence[int]) -> ClipSample:
            sample = super().read(index, frames)
            mask = sample["mask"].clone()
            mask[:, 0, :3] = 2
            return sample | {"mask": mask}

    assert set(pieces(clips=Sliver())[Draw(0, 0, 0)]["mask"].unique().tolist()) == {0, 1}


def test_gaps_make_faster_motion() -> None:
    near, far = (
        max(float((a - b).abs().mean()) for epoch in range(8) for a, b in pairwise(piece(epoch)["image"]))
        for piece in (lambda e, g=gap: pieces(length=3, gap=g)[Draw(0, e, 0)] for gap in (1, 2))
    )
    assert far > 1.2 * near


def test_pieces_in_which_a_structure_leaves() -> None:
    """A clip whose second structure is in its first three frames only."""

    class Leaving(Discs):
        def read(self, index: int, frames: Sequence[int]) -> ClipSample:
            sample = super().read(index, frames)
            mask = sample["mask"].clone()
            mask[torch.tensor([frame < 3 for frame in frames]), :4, :4] = 2
            return sample | {"mask": mask}

    def share(leave: float) -> float:
        """Of pieces that begin with the second structure and lose it."""
        drawn = pieces(clips=Leaving(), length=3, leave=leave)
        return sum(2 in lost_labels(drawn[Draw(0, epoch, 0)]["mask"]) for epoch in range(20)) / 20

    assert share(1.0) > 0.75 > 0.5 > share(0.0)
    mask = torch.tensor([[[1, 2, 3, 0]], [[1, 2, 0, 0]], [[1, 0, 3, 0]]])
    assert lost_labels(mask).tolist() == [2, 3]
    assert not any(drawn_objects(mask, 2, 255)[:, 0, 0, 0])  # those that leave come first
    assert len(drawn_objects(mask, 5, 255)) == 3


def test_impossible_settings() -> None:
    for focus in ((0.5, 2), (3, 2)):
        with pytest.raises(UserError, match=r"focus is null or the least"):
            TrackingData(Discs(), side=64, focus=focus)
    with pytest.raises(UserError, match="at least as wide as the prompts"):
        task(focus=0.5)
    with pytest.raises(UserError, match="leave is a share"):
        TrackingData(Discs(), side=64, leave=2)
    with pytest.raises(UserError, match="prompts are one or more"):
        task(prompts=["scribble"])
    with pytest.raises(UserError, match="clip is at least 2"):
        TrackingData(Discs(), side=64, clip=1)
    with pytest.raises(UserError, match="has 1 training clips; allowed are 1 to 1"):
        TrackingData(Discs(), side=64, shots=5).train_dataloader()


def test_shots_are_clips_that_the_seed_draws() -> None:
    class Many(Discs):
        """Ten of that clip, which remember what was read."""

        def __init__(self) -> None:
            self.seen: set[int] = set()

        def __len__(self) -> int:
            return 10

        def read(self, index: int, frames: Sequence[int]) -> ClipSample:
            self.seen.add(index)
            return super().read(index, frames)

    def used(**settings: int) -> set[int]:
        source = Many()
        data = TrackingData(source, side=64, clip=2, steps_per_epoch=8, **settings)
        assert len(list(data.train_dataloader())) == 8
        return source.seen

    two, four, again, other = used(shots=2), used(shots=4), used(shots=4), used(shots=4, seed=1)
    assert (len(two), len(four)) == (2, 4)
    assert two < four == again != other
    assert len(used()) == 10
