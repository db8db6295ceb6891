"""The streaming tracker: the sam2 package's masks, memory of fixed size, objects that come, go and are corrected."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip, ClipInfo
from vfmadapt.testing_tracking import SCENES, moving_frames, tiny_tracker
from vfmadapt.tracking.memory import Bank, Limits, Memory
from vfmadapt.tracking.model import TrackingModel
from vfmadapt.tracking.prompts import Prompt, read_prompt
from vfmadapt.tracking.tracker import Tracker, pictures, spread, track

GOLDEN = load_file(Path(__file__).parent / "sam2" / "tracking.safetensors")
SIZE = (64, 64)


class Frames(Clip):
    """A clip of frames (T, C, H, W) at hand."""

    def __init__(self, frames: torch.Tensor, window: tuple[float, float] = (0.0, 1.0)) -> None:
        count, channels, height, width = frames.shape
        self.frames = frames.numpy()
        self.info = ClipInfo("here", "video", count, height, width, channels, window=window)

    def _read(self, index: int) -> np.ndarray:
        return self.frames[index]


@pytest.fixture(scope="module")
def model() -> TrackingModel:
    return tiny_tracker()


@pytest.fixture(scope="module")
def clip() -> Frames:
    return Frames(moving_frames(20))


def check(found: dict[int, torch.Tensor], scene: str) -> None:
    """Logits within 1e-4 of the sam2 package's, of masks that are neither empty, nor full, nor constant."""
    golden = GOLDEN[scene]
    ours = torch.stack([found[i] for i in range(len(golden))])[..., ::2, ::2]
    torch.testing.assert_close(ours, golden, atol=1e-4, rtol=0)
    share = (golden > 0).float().mean((-1, -2))
    assert ((share > 0.02) & (share < 0.98)).float().mean() > 0.8
    assert golden.std((0, 2, 3)).min() > 0.1
    assert (golden[1:] - golden[:-1]).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("scene", ["forward", "both_ways"])
def test_tracks_as_the_sam2_package_does(scene: str, model: TrackingModel, clip: Frames) -> None:
    check({index: result.logits for index, result in track(model, clip, SCENES[scene])}, scene)


def test_corrects_as_the_sam2_package_does(model: TrackingModel, clip: Frames) -> None:
    first, second = SCENES["corrected"]
    tracker = Tracker(model, SIZE, window=(0, 1), frames=len(clip))
    tracker.add(first)
    found = {}
    for index, frame in clip.iterate():
        found[index] = tracker.step(frame).logits
        if index == second.frame:
            corrected = tracker.add(second)
            assert corrected is not None
            assert not torch.equal(corrected.logits, found[index])
            found[index] = corrected.logits
    check(found, "corrected")


def test_encodes_each_frame_once_whatever_the_objects(model: TrackingModel, clip: Frames) -> None:
    calls = []
    handle = model.net.vision_encoder.backbone.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    tracker = Tracker(model, SIZE, (1, 2, 3, 4), window=(0, 1))
    for i in range(4):
        tracker.add(Prompt(0, i + 1, box=(10 + i, 10, 40 + i, 40)))
    for _, frame in clip.iterate(0, 3):
        tracker.step(frame)
    handle.remove()
    assert len(calls) == 3


def test_objects_in_a_batch_are_as_each_by_itself(model: TrackingModel, clip: Frames) -> None:
    prompts = [
        Prompt(0, 1, box=(8, 10, 40, 44)),
        Prompt(2, 2, points=((20, 24),)),
        Prompt(2, 3, mask=np.pad(np.ones((20, 16), bool), ((30, 14), (12, 36)))),
    ]
    together = Tracker(model, SIZE, (1, 2, 3), window=(0, 1))
    alone = [Tracker(model, SIZE, (i,), window=(0, 1)) for i in (1, 2, 3)]
    for prompt, one in zip(prompts, alone, strict=True):
        together.add(prompt)
        one.add(prompt)
    for index, frame in clip.iterate(0, 6):
        every = together.step(frame)
        each = torch.cat([one.step(frame).logits for one in alone])
        torch.testing.assert_close(every.logits, each, atol=1e-4, rtol=0)
        assert every.present.tolist() == [True, index >= 2, index >= 2]


@pytest.mark.parametrize("late", ["after its frame was seen", "before"])
@pytest.mark.parametrize("asked", [{"box": (20.0, 12.0, 50.0, 40.0)}, {"points": ((30.0, 30.0),)}])
def test_an_object_can_join_at_any_frame(late: str, asked: dict[str, Any], model: TrackingModel, clip: Frames) -> None:
    first, second = Prompt(0, 1, box=(8, 10, 40, 44)), Prompt(3, 7, **asked)
    together, declared, alone = (Tracker(model, SIZE, objects, window=(0, 1)) for objects in ((1,), (1, 7), (7,)))
    for tracker in (together, declared):
        tracker.add(first)
    for tracker in (declared, alone):
        tracker.add(second)
    for index, frame in clip.iterate(0, 8):
        if index == 3 and late == "before":
            assert together.add(second) is None
        found, wanted, own = (tracker.step(frame) for tracker in (together, declared, alone))
        if index < 3:
            assert len(found.logits) == 1
            continue
        if index == 3 and late != "before":
            assert len(found.logits) == 1
            joined = together.add(second)
            assert joined is not None
            found = joined
        assert together.objects == (1, 7)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.logits[1], own.logits[0], atol=1e-4, rtol=0)
        assert found.present.tolist() == [True, True]


def test_an_object_that_joins_in_vain_leaves_the_tracker_as_it_was(model: TrackingModel, clip: Frames) -> None:
    tracker = Tracker(model, SIZE, window=(0, 1))
    tracker.add(Prompt(0, 1, box=(8, 10, 40, 44)))
    tracker.step(clip.frame(0))
    tracker.step(clip.frame(1))
    for prompt in (Prompt(0, 2, box=(1, 1, 9, 9)), Prompt(1, 2, box=(1, 1, 99, 9))):
        with pytest.raises(UserError):
            tracker.add(prompt)
    assert tracker.objects == (1,)
    assert len(tracker.step(clip.frame(2)).logits) == 1


def test_follows_and_corrects_in_mixed_precision(model: TrackingModel, clip: Frames) -> None:
    prompts = [
        Prompt(0, 1, box=(8, 10, 40, 44)),
        Prompt(0, 2, mask=np.pad(np.ones((20, 16), bool), ((30, 14), (12, 36)))),
    ]
    whole = Tracker(model, SIZE, (1, 2), window=(0, 1))
    mixed = Tracker(model, SIZE, (1, 2), window=(0, 1))
    for prompt in prompts:
        whole.add(prompt)
        mixed.add(prompt)
    for _, frame in clip.iterate(0, 3):
        wanted = whole.step(frame)
        with torch.autocast("cpu", torch.bfloat16):
            found = mixed.step(frame)
            corrected = mixed.add(Prompt(mixed._seen.index, 1, points=((20, 24),)))
        assert corrected is not None
        assert found.logits.dtype == corrected.logits.dtype == torch.float32
        assert (found.masks == wanted.masks).float().mean() > 0.9
        whole.add(Prompt(whole._seen.index, 1, points=((20, 24),)))


def held(tracker: Tracker) -> int:
    """Bytes of what is remembered."""
    memories = [m for bank in tracker._propagation.banks for m in (*bank.prompted.values(), *bank.tracked.values())]
    tensors = [t for m in memories for t in (m.features, m.pointer) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_does_not_grow_with_the_frames(model: TrackingModel, clip: Frames) -> None:
    tracker = Tracker(model, SIZE, (1, 2), window=(0, 1))
    sizes = []
    for index in range(40):
        for i in (1, 2):
            if index % 3 == 0:  # prompts without end are bounded, too
                tracker.add(Prompt(index, i, box=(10, 10, 40, 40)))
        tracker.step(clip.frame(index % 20))
        sizes.append(held(tracker))
    assert max(sizes[30:]) == max(sizes[20:30])
    assert not tracker._waiting


@pytest.mark.slow
def test_peak_memory_after_1000_frames_is_that_after_50(model: TrackingModel, clip: Frames) -> None:
    import resource

    tracker = Tracker(model, SIZE, window=(0, 1))
    tracker.add(Prompt(0, 1, box=(10, 10, 40, 40)))
    peaks = []
    for index in range(1000):
        tracker.step(clip.frame(index % 20))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] <= 1.05 * peaks[49]


def test_a_bank_gives_what_sam2_reads() -> None:
    bank = Bank(Limits())
    for t in range(0, 60):
        bank.keep(
            t, Memory(torch.full((1,), float(t)), torch.full((1,), float(t))), prompted=t in (0, 10, 20, 30, 40, 50)
        )
        bank.forget(t, reverse=False, anchor=None)
    recalled = bank.read(60, reverse=False)
    prompted = [int(f) for slot, f in recalled.features if slot == 0]
    assert sorted(prompted) == [20, 30, 40, 50]
    assert [(slot, int(f)) for slot, f in recalled.features if slot] == [(age, 60 - age) for age in range(6, 0, -1)]
    ages = [age for age, _ in recalled.pointers]
    assert sorted(ages) == sorted([40, 30, 20, 10, *(a for a in range(1, 16) if a != 10)])
    assert all(int(p) == 60 - age for age, p in recalled.pointers)
    assert len(bank.tracked) <= 15


def test_what_is_not_there_is_absent(model: TrackingModel, clip: Frames) -> None:
    bias = model.net.mask_decoder.pred_obj_score_head.proj_out.bias
    tracker = Tracker(model, SIZE, window=(0, 1))
    tracker.add(Prompt(0, 1, box=(8, 10, 40, 44)))
    assert tracker.step(clip.frame(0)).present.all()
    with torch.no_grad():
        bias.fill_(-100)
        gone = tracker.step(clip.frame(1))
        bias.fill_(10)
    assert not gone.present.any()
    assert not gone.masks.any()
    assert gone.scores.tolist() == [0]
    assert tracker.step(clip.frame(2)).present.all()


def test_grey_frames_of_any_unit_are_shown_alike() -> None:
    frame = torch.rand(1, 40, 50) * 3000 - 1000
    frame[0, 3, 3] = torch.nan
    frame[0, 4, 4] = 1e6
    low, high = spread(frame)
    assert -1010 < low < -950
    assert 1950 < high < 2010
    shown = pictures(frame[None], (low, high), 64)
    assert shown.shape == (1, 3, 64, 64)
    assert shown.isfinite().all()
    assert 0 <= shown.min() < shown.max() <= 1
    torch.testing.assert_close(pictures(frame[None] * 2 + 5, (low * 2 + 5, high * 2 + 5), 64), shown)


def test_one_frame_and_small_prompts(model: TrackingModel) -> None:
    dot = np.zeros((300, 200), bool)
    dot[7, 8] = True
    (only,) = track(model, Frames(torch.rand(1, 1, 300, 200)), [Prompt(0, 1, mask=dot)])
    assert only[0] == 0
    assert only[1].logits.shape == (1, 300, 200)
    assert only[1].logits.max() > -9  # a pixel of 300 x 200 is seen in 64 x 64


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"frame": 0}, "nothing is asked"),
        ({"box": [1, 2, 3, 4]}, "frame is missing"),
        ({"frame": 0, "box": [5, 5, 5, 9]}, "is empty"),
        ({"frame": 0, "box": [5, 5, 9]}, "cannot be read"),
        ({"frame": 0, "points": [[1, 1]], "labels": [2]}, "1 on the object"),
        ({"frame": 0, "points": [[1, 1]], "labels": [1, 1]}, "one for each"),
        ({"frame": -1, "points": [[1, 1]]}, "count from 0"),
        ({"frame": 0, "mask": np.zeros((4, 4))}, "mask is empty"),
        ({"frame": 0, "mask": np.ones((4, 4)), "box": [0, 0, 1, 1]}, "leave points and box out"),
        ({"frame": 0, "bbox": [0, 0, 1, 1]}, "unknown key 'bbox'"),
    ],
)
def test_prompts_that_cannot_be_meant(settings: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        read_prompt(settings)


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        (Prompt(0, 1, box=(0, 0, 65, 10)), "outside the frame"),
        (Prompt(0, 1, points=((float("nan"), 1),)), "outside the frame"),
        (Prompt(20, 1, points=((1, 1),)), "there are 20 frames"),
        (Prompt(0, 1, mask=np.ones((4, 4), bool)), "frames are 64 x 64"),
    ],
)
def test_prompts_that_do_not_fit_the_clip(prompt: Prompt, line: str, model: TrackingModel, clip: Frames) -> None:
    with pytest.raises(UserError, match=line):
        next(track(model, clip, [prompt]))


def test_what_a_tracker_refuses(model: TrackingModel, clip: Frames) -> None:
    with pytest.raises(UserError, match="nothing to follow"):
        next(track(model, clip, []))
    tracker = Tracker(model, SIZE)
    with pytest.raises(UserError, match="one size"):
        tracker.step(np.zeros((1, 64, 60)))
    tracker.step(clip.frame(0))
    tracker.step(clip.frame(1))
    with pytest.raises(UserError, match="has passed"):
        tracker.add(Prompt(0, 1, box=(1, 1, 9, 9)))
