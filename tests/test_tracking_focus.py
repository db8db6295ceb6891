"""The window that a tracker looks at: where it lies, what comes back, and that it tracks as if cropped by hand."""

import numpy as np
import pytest
import torch

from vfmadapt.errors import UserError
from vfmadapt.frames.array import ArrayClip
from vfmadapt.testing_tracking import moving_frames, tiny_tracker
from vfmadapt.tracking.model import ABSENT, TrackingModel
from vfmadapt.tracking.prompts import Prompt
from vfmadapt.tracking.regions import around, focused, whole
from vfmadapt.tracking.tracker import StepResult, Tracker, track

FRAME = (90, 160)


@pytest.fixture(scope="module")
def model() -> TrackingModel:
    return tiny_tracker()


def disc(row: int, column: int, radius: int = 6) -> np.ndarray:
    y, x = np.mgrid[: FRAME[0], : FRAME[1]]
    return np.asarray((y - row) ** 2 + (x - column) ** 2 <= radius**2)


def followed(model: TrackingModel, frames: torch.Tensor, prompts: list[Prompt], focus: float | None) -> StepResult:
    """Of all frames, (T, O, H, W)."""
    found = dict(track(model, ArrayClip(frames.numpy(), name="here", window=(0, 1)), prompts, focus=focus))
    results = [found[index] for index in range(len(frames))]
    return StepResult(torch.stack([r.logits for r in results]), torch.stack([r.scores for r in results]))


@pytest.mark.parametrize(
    ("box", "focus", "window"),
    [
        ((70, 40, 90, 50), 3.0, (slice(15, 75), slice(50, 110))),  # in the middle
        ((0, 80, 20, 90), 3.0, (slice(30, 90), slice(0, 60))),  # moved into the frame
        ((80, 44, 82, 46), 3.0, (slice(38, 53), slice(74, 89))),  # a sixth of the shorter side
        ((70, 20, 110, 60), 3.0, (slice(0, 90), slice(30, 150))),  # as high as the frame
        ((10, 10, 150, 80), 3.0, (slice(0, 90), slice(0, 160))),
    ],
)
def test_windows_lie_around_their_boxes(box: tuple, focus: float, window: tuple) -> None:
    region = around(box, FRAME, focus)
    assert region.window == window
    assert region.size == (window[0].stop - window[0].start, window[1].stop - window[1].start)


def test_one_window_holds_all_prompts_and_points_alone_want_whole_frames() -> None:
    one = Prompt(0, 1, mask=disc(40, 50))
    other = Prompt(9, 2, box=(70, 30, 80, 36), points=((75, 20),))
    x0, y0, x1, y1 = 44, 20, 80, 47
    assert focused([one, other], FRAME, 2.0) == around((x0, y0, x1, y1), FRAME, 2.0)
    assert focused([one, Prompt(3, 1, points=((60, 40),))], FRAME, 2.0).size != FRAME  # its extent is known
    assert focused([one, Prompt(0, 2, points=((60, 40),))], FRAME, 2.0) == whole(FRAME)
    assert focused([one], FRAME, None) == focused([], FRAME, 2.0) == whole(FRAME)


@pytest.mark.parametrize("kind", ["mask", "box"])
def test_tracks_as_in_frames_cropped_by_hand(kind: str, model: TrackingModel) -> None:
    """Both ways, the window at the border of frames that are not square."""
    frames, shape = moving_frames(6, FRAME), disc(80, 12)
    if kind == "mask":
        prompt, by_hand = Prompt(2, mask=shape), Prompt(2, mask=shape[51:, :39])
    else:
        prompt, by_hand = Prompt(2, box=(6, 74, 19, 87)), Prompt(2, box=(6, 23, 19, 36))
    found = followed(model, frames, [prompt], 3.0)
    cropped = followed(model, frames[..., 51:, :39], [by_hand], None)
    inside = torch.zeros(FRAME, dtype=torch.bool)
    inside[51:, :39] = True
    torch.testing.assert_close(found.logits[..., 51:, :39], cropped.logits)
    torch.testing.assert_close(found.scores, cropped.scores)
    assert found.logits.shape == (6, 1, *FRAME)
    assert (found.logits[..., ~inside] == ABSENT).all()
    assert found.logits[..., inside].std() > 0.1


def test_no_focus_and_one_wider_than_the_frame_are_the_same(model: TrackingModel) -> None:
    frames, prompt = moving_frames(3, FRAME), Prompt(0, mask=disc(40, 50))
    found = [followed(model, frames, [prompt], focus).logits for focus in (None, 50.0)]
    assert torch.equal(*found)


def test_objects_share_the_window_and_later_prompts_must_lie_in_it(model: TrackingModel) -> None:
    frames = moving_frames(4, FRAME)
    tracker = Tracker(model, FRAME, (1, 2), window=(0, 1), focus=2.0)
    tracker.add(Prompt(0, 1, mask=disc(40, 50)))
    tracker.add(Prompt(2, 2, mask=disc(45, 70)))
    first = tracker.step(frames[0])
    assert first.logits.shape == (2, *FRAME)
    inside = (first.logits[0] != ABSENT).nonzero()
    assert (inside.amin(0) <= torch.tensor([34, 44])).all()
    assert (inside.amax(0) >= torch.tensor([51, 76])).all()
    assert tracker.add(Prompt(0, 1, points=((52, 41),))) is not None  # a correction within
    for prompt in (Prompt(0, 1, points=((150, 41),)), Prompt(3, 2, box=(60, 30, 150, 50))):
        with pytest.raises(UserError, match=r"outside the window that is followed, x 28 to 94, y 10 to 76"):
            tracker.add(prompt)


def test_a_focus_that_cannot_be_meant(model: TrackingModel) -> None:
    for focus in (0.5, float("nan")):
        with pytest.raises(UserError, match="at least as wide as the prompts"):
            Tracker(model, FRAME, focus=focus)
