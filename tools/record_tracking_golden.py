"""Record what the sam2 package tracks: python tools/record_tracking_golden.py tests/sam2/tracking.safetensors.

Needs sam2 1.1.0 beside the project, in an environment of its own; see vfmadapt/interop/sam2.py.
"""

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vfmadapt.interop.sam2 import predictor, start
from vfmadapt.testing_tracking import SCENES, moving_frames, tiny_tracker
from vfmadapt.tracking.prompts import Prompt

FRAMES = 20
STEP = 2  # every second pixel of every second row is kept


def tell(made: Any, state: Any, prompt: Prompt) -> Tensor:
    """Give a prompt to sam2 and return its masks (O, 1, H, W) in that frame."""
    if prompt.mask is not None:
        return made.add_new_mask(state, prompt.frame, prompt.object, torch.from_numpy(prompt.mask))[2]
    asked: dict[str, Any] = {"box": prompt.box}
    if prompt.points:
        asked |= {"points": prompt.points, "labels": torch.tensor(prompt.labels, dtype=torch.int32)}
    return made.add_new_points_or_box(state, prompt.frame, prompt.object, **asked)[2]


def main(path: str) -> None:
    """Write the logits of every scene and frame, float32 (T, O, H / 2, W / 2)."""
    model = tiny_tracker()
    made = predictor(model)
    made.fill_hole_area = 0
    frames = (moving_frames(FRAMES) - model.mean) / model.std
    found = {}
    for name, prompts in SCENES.items():
        state, masks = start(made, frames, (model.size, model.size)), {}
        for prompt in sorted(prompts, key=lambda p: p.object) if name != "corrected" else prompts[:1]:
            tell(made, state, prompt)
        first = min(prompt.frame for prompt in prompts)
        if name == "corrected":
            last = prompts[1].frame
            masks |= {i: m for i, _, m in made.propagate_in_video(state, first, last)}
            masks[last] = tell(made, state, prompts[1])
            first = last + 1
        masks |= {i: m for i, _, m in made.propagate_in_video(state, first)}
        if name != "corrected" and first:
            masks |= {i: m for i, _, m in made.propagate_in_video(state, first - 1, reverse=True)}
        found[name] = torch.stack([masks[i][:, 0, ::STEP, ::STEP] for i in range(FRAMES)]).contiguous()
    save_file(found, path)


if __name__ == "__main__":
    main(sys.argv[1])
