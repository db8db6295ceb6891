"""How much faster is an adapter's fast path than its direct formulation, and do both give the same?"""

import logging
import time
from collections.abc import Callable
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, Any

from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

OTHERS = {
    "adapters": "overheads",
    "heads": "heads",
    "kernels": "kernels",
    "raster": "raster",
    "tracking": "tracking",
}
"""What else is measured: the function of that module, vfmadapt/benchmark_*.py."""

Case = tuple[Callable[[], Any], Callable[[], Any]]  # (fast, direct)


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Time one layer of `cfg.adapter`, forward and forward + backward; other `what`: see `OTHERS`.

    The adapter's module offers `benchmark_pair(adapter, batch, (h, w)) -> (fast, direct, inputs)`.

    Returns:
        Median milliseconds, ratios (direct over fast), and the largest differences: `max_difference` of the results,
        `max_gradient_difference` of a gradient, over the largest gradient of the same tensor (or over 1).

    Raises:
        UserError: the adapter has no such function, or sizes that it refuses; a batch that is no number.
    """
    import torch

    if cfg.batch == "auto":  # which `predict` takes
        raise UserError("batch=auto: wanted is a whole number, for instance batch=2")
    if cfg.what in OTHERS:
        return getattr(import_module(f"vfmadapt.benchmark_{cfg.what}"), OTHERS[cfg.what])(cfg)
    if cfg.what != "layer":
        known = ", ".join(OTHERS)
        raise UserError(
            f"benchmark what={cfg.what}: choose layer (one adapter, fast against direct), or one of {known}"
        )
    fast, direct, inputs = _pair(cfg)
    before = torch.get_num_threads()
    torch.set_num_threads(int(cfg.threads))
    try:
        cotangent = torch.randn_like(inputs[0])

        def train(layer: Callable[..., Any]) -> Any:
            return torch.autograd.grad(layer(*inputs), inputs, cotangent)

        with torch.no_grad():
            ours, theirs = fast(*inputs), direct(*inputs)
            forward_ms = interleaved((lambda: fast(*inputs), lambda: direct(*inputs)), int(cfg.repeats))
        gradients = zip(train(fast), train(direct), strict=True)
        relative = [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in gradients]
        train_ms = interleaved((lambda: train(fast), lambda: train(direct)), int(cfg.repeats))
    finally:
        torch.set_num_threads(before)
    result = {
        "adapter": str(cfg.adapter["_target_"]).rpartition(".")[2],
        "batch": int(cfg.batch),
        "tokens": [int(n) for n in cfg.tokens],
        "channels": int(cfg.channels),
        "dim": int(cfg.dim),
        "threads": int(cfg.threads),
        **_times("forward", forward_ms),
        **_times("train", train_ms),
        "max_difference": float((ours - theirs).abs().max()),
        "max_gradient_difference": max(relative),
    }
    _report(result)
    return result


def _pair(cfg: "DictConfig") -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    import torch

    from vfmadapt.build import instantiate, plain
    from vfmadapt.testing import vit_spec

    sizes = {"batch": cfg.batch, "channels": cfg.channels, "threads": cfg.threads, "repeats": cfg.repeats}
    sizes.update(zip(("tokens[0]", "tokens[1]"), cfg.tokens, strict=False))
    if len(cfg.tokens) != 2 or (small := [k for k, v in sizes.items() if not isinstance(v, int) or v < 1]):
        what = "tokens" if len(cfg.tokens) != 2 else ", ".join(small)
        raise UserError(f"benchmark: {what} must be positive whole numbers, tokens two of them: tokens=[32,32]")
    module = import_module(str(cfg.adapter["_target_"]).rpartition(".")[0])
    make_pair = getattr(module, "benchmark_pair", None)
    if make_pair is None:
        raise UserError(f"{module.__name__} has no benchmark_pair, so nothing to time it against; try adapter=earth")
    torch.manual_seed(int(cfg.seed))
    node = plain(cfg.adapter)
    adapter = instantiate(node | ({"dim": int(cfg.dim)} if "dim" in node else {}), vit_spec(int(cfg.channels)))
    pair: tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]
    pair = make_pair(adapter, int(cfg.batch), (int(cfg.tokens[0]), int(cfg.tokens[1])))
    return pair


def interleaved(case: Case, repeats: int) -> tuple[float, float]:
    """Median milliseconds of both; run in turn, so that whatever else the machine does meets both alike."""
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):  # two turns to warm up
        pair = list(zip(case, taken, strict=True))
        for run, times in pair if turn % 2 else reversed(pair):  # a share of a CPU is cut off at even intervals
            start = time.perf_counter()
            run()
            if turn >= 2:
                times.append(1e3 * (time.perf_counter() - start))
    return median(taken[0]), median(taken[1])


def _times(name: str, ms: tuple[float, float]) -> dict[str, float]:
    fast, direct = ms
    return {
        f"{name}_ms": round(fast, 3),
        f"{name}_reference_ms": round(direct, 3),
        f"{name}_ratio": round(direct / fast, 2),
    }


def _report(result: dict[str, Any]) -> None:
    log.info("%s: one layer, batch %d, tokens %s, %d channels, dim %d, %d threads", *list(result.values())[:6])
    for name, title in (("forward", "forward"), ("train", "forward + backward")):
        ms, reference, ratio = (result[f"{name}_{key}"] for key in ("ms", "reference_ms", "ratio"))
        log.info("%-19s fast %8.2f ms   direct %8.2f ms   %.1f times as fast", title, ms, reference, ratio)
    difference, gradient = result["max_difference"], result["max_gradient_difference"]
    log.info("largest difference  %.2g (result)   %.2g (gradients, relative)", difference, gradient)
