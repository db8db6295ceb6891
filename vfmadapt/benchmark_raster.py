"""How fast is a raster mapped, how much memory does it take, and how much of the time is the model's?"""

import json
import logging
import multiprocessing
import resource
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vfmadapt.contracts import ClassSpec, DataSpec

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

_BANDS = 4
SPEC = DataSpec(
    name="benchmark",
    bands=("red", "green", "blue", "nir"),
    classes=tuple(ClassSpec(name, (60 * i, 80, 200)) for i, name in enumerate(("a", "b", "c", "d"))),
    mean=(0.5,) * _BANDS,
    std=(0.3,) * _BANDS,
)


class EmptyModel(nn.Module):
    """Gives the bands as logits: what is left is reading, blending, writing."""

    spec = SPEC

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        """Logits (B, 4, H, W) = image."""
        return image


def raster(cfg: "DictConfig") -> dict[str, Any]:
    """Map rasters of `cfg.sides` pixels per side with an empty model, and one of `cfg.model_side` with vfm_tiny.

    Each in a process of its own, with tiles of `cfg.tile` that overlap by a quarter; no tile is skipped.

    Returns:
        "empty": per side, seconds, mpx_per_s and the peak memory over that before the run, in GB; "memory_ratio": of
        the largest over the smallest side; "vfm_tiny": seconds, and the share of them outside the model.
    """
    from vfmadapt.raster.repeated import repeated_raster

    with tempfile.TemporaryDirectory() as folder:
        repeated_raster(Path(folder), int(cfg.tile))  # what making the file takes is no part of any measurement
        common = Path(folder), int(cfg.tile), int(cfg.threads)
        empty = {str(side): _apart("empty", side, *common) for side in cfg.sides}
        tiny = _apart("vfm_tiny", int(cfg.model_side), *common)
    for side, figures in empty.items():
        log.info("empty model, %s x %s x %d bands: %s", side, side, _BANDS, _line(figures))
    log.info("vfm_tiny, %d x %d: %s", cfg.model_side, cfg.model_side, _line(tiny))
    memory = [figures["memory_gb"] for figures in empty.values()]
    result = {"empty": empty, "memory_ratio": round(memory[-1] / max(memory[0], 1e-3), 3), "vfm_tiny": tiny}
    if cfg.output:
        Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _line(figures: dict[str, float]) -> str:
    return (
        f"{figures['seconds']:.1f} s, {figures['mpx_per_s']:.2f} Mpx/s, {figures['memory_gb']:.2f} GB more than "
        f"before, {figures['share_around_model']:.1%} of the time around the model"
    )


def _apart(name: str, side: int, folder: Path, tile: int, threads: int) -> dict[str, float]:
    """Measure in a new process, whose peak of memory is its own."""
    context = multiprocessing.get_context("fork")  # a new interpreter would run the tool's script again
    with context.Pool(1) as pool:
        return pool.apply(_measure, (name, side, folder, tile, threads))


def _measure(name: str, side: int, folder: Path, tile: int, threads: int) -> dict[str, float]:
    from vfmadapt.raster.predict import predict_raster
    from vfmadapt.raster.repeated import repeated_raster

    torch.set_num_threads(threads)
    model = EmptyModel() if name == "empty" else vfm_tiny()
    warm_up = repeated_raster(folder, tile)  # what is loaded once is not the raster's
    predict_raster(model, warm_up, folder / "map.tif", tile=tile, overlap=tile // 4)
    source, before = repeated_raster(folder, side), _peak_gb()
    result = predict_raster(model, source, folder / "map.tif", tile=tile, overlap=tile // 4)
    return {
        "seconds": round(result.seconds, 2),
        "mpx_per_s": round(side * side / 1e6 / result.seconds, 3),
        "memory_gb": round(_peak_gb() - before, 3),
        "share_around_model": round(1 - result.model_seconds / result.seconds, 4),
    }


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # Linux gives KiB


def vfm_tiny() -> nn.Module:
    """A segmenter of `SPEC` on the shipped frozen backbone, with an untrained head."""
    from vfmadapt.build import build_model, compose, plain

    config = plain(compose("train", ["task=cloudseg", "adapter=frozen"]))
    return build_model({name: config[name] for name in ("backbone", "adapter", "head")}, SPEC).eval()
