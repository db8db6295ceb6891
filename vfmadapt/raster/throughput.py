"""How many tiles fit through a model at once."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vfmadapt.raster.plan import Plan
from vfmadapt.raster.scoring import Scorer, TooLargeError, evaluation

_ON_CPU = 4  # more tiles only push each other out of the processor's caches
_MOST = 64  # more gain nothing on a GPU, and the logits of a batch lie in main memory too
_PADDED = 4  # times a batch fits into a block at least: its last batch is filled up with copies, at most a fourth more
_SHARE = 0.8  # of the GPU's free memory; the rest is for fragments and for who else works there


def largest_batch(model: Any, plan: Plan, device: torch.device) -> int:
    """Tiles per forward pass for batch=auto.

    On a GPU the largest of 1, 2, 4, ... that leaves a fifth of its free memory; 4 elsewhere.
    """
    if device.type != "cuda":
        return _ON_CPU
    tiles = len(plan.grid.rows_over(0, plan.block)) * len(plan.grid.columns_over(0, plan.block))
    batch = 1
    while 2 * batch <= min(_MOST, tiles // _PADDED) and _fits(model, replace(plan, batch=2 * batch), device):
        batch *= 2
    return batch


def _fits(model: Any, plan: Plan, device: torch.device) -> bool:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, before = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
    shape = (plan.batch, len(model.spec.bands), plan.tile, plan.tile)
    try:
        with evaluation(model):
            Scorer(model, plan, device).logits(np.zeros(shape, np.float32), np.ones((shape[0], *shape[2:]), np.bool_))
    except TooLargeError:
        return False
    finally:
        torch.cuda.empty_cache()
    return torch.cuda.max_memory_reserved(device) - before <= _SHARE * free
