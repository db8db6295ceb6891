"""The tool `track` on long and on damaged clips: memory does not grow, the first result is there at once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vfmadapt.frames.array import ArrayClip
from vfmadapt.testing_tracking import moving_frames, tiny_tracker
from vfmadapt.tracking.prompts import Prompt
from vfmadapt.tracking.tracker import track

ROOT = Path(__file__).resolve().parents[1]
# the smallest that still is SAM2's video model
TINY = [
    "backbone.pretrained=false", "backbone.size=64", "backbone.trunk.width=16", "backbone.trunk.blocks=[1,1,1,1]",
    "backbone.memory_layers=1", "backbone.hidden=64", "backbone.decoder_hidden=64", "device=cpu",
]  # fmt: skip
PROMPT = "prompt=[{frame: 0, box: [10,12,40,30]}]"

# The tool with a model that finds the same in every frame: what is left is to read, to keep and to write.
PEAK = """
import sys
import torch
import vfmadapt.track
import vfmadapt.tracking.tracker
from vfmadapt.build import compose
from vfmadapt.tracking.tracker import StepResult
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # kB; ru_maxrss would count the parent's
def followed(model, clip, prompts, **_):
    found = torch.zeros(1, *clip.info.size)
    found[:, 12:30, 10:40] = 1
    for index, _ in clip.iterate():
        yield index, StepResult(found, torch.ones(1))
vfmadapt.track.tracking_model, vfmadapt.tracking.tracker.track = print, followed
for path in sys.argv[1:3]:
    before = peak()
    for ending in (".nii.gz", ".csv"):
        vfmadapt.track.main(compose("track", [*sys.argv[3:], f"input={path}", f"output={path}{ending}"]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel must tell the peak of memory")
def test_memory_of_the_tool_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    clips = {frames: tmp_path / f"{frames}.npz" for frames in (10, 150)}
    for frames, path in clips.items():
        np.savez_compressed(path, imgs=np.zeros((frames, 512, 512), np.uint8))  # 39 MB, and as much of labels
    command = [sys.executable, "-c", PEAK, *map(str, clips.values()), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(done.stdout.splitlines()[-1]) < 15_000  # kB


class Counted(ArrayClip):
    """A clip that counts the frames that are read."""

    reads = 0

    def _read(self, index: int) -> np.ndarray:
        self.reads += 1
        return super()._read(index)


@pytest.mark.parametrize("prompt", [0, 20])
@pytest.mark.parametrize(("window", "most"), [((0.0, 1.0), 1), (None, 1 + 8)])  # 8 frames tell what is black and white
def test_the_first_result_is_there_after_the_first_frame(
    prompt: int, window: tuple[float, float] | None, most: int
) -> None:
    clip = Counted(moving_frames(40).numpy(), name="made", window=window)
    steps = track(tiny_tracker(), clip, [Prompt(prompt, 1, box=(10, 10, 40, 40))])
    assert clip.reads == 0
    index, found = next(steps)
    assert (index, found.logits.shape) == (prompt, (1, 64, 64))
    assert clip.reads <= most
    next(steps)
    assert clip.reads <= most + 1


def test_a_video_that_is_cut_off_is_followed_as_far_as_it_goes(tmp_path: Path) -> None:
    import av
    import nibabel

    noise = np.random.default_rng(0)
    with av.open(str(tmp_path / "whole.mp4"), "w", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for _ in range(11):
            values = noise.integers(0, 255, (48, 64, 3)).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        file.mux(stream.encode(None))
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * 0.97)])
    command = [sys.executable, str(ROOT / "tools" / "track.py"), "input=cut.mp4", "output=out.nii.gz", *TINY, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "early" in line or "damaged" in line]
    assert len(warnings) == 1
    frames = nibabel.load(tmp_path / "out.nii.gz").shape[3]
    assert f"cut.mp4 ends early: {frames} of 11 frames are there" in warnings[0]
    assert frames in (9, 10)
