"""The whole way in one command: train with an adapter, train the frozen control, map a GeoTIFF that was generated."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt._settings import check_arguments
from vfmadapt.build import compose, plain
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

SMALLEST = 8  # pixels of a scene's side: slopes and shadows need neighbours


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Train `adapter=earth` and `adapter=frozen` on generated scenes, map one large scene, and say where everything is.

    Returns:
        miou, frozen_miou, trainable, adapter_bytes, train_seconds, map, preview, adapter_file.
    """
    from vfmadapt import predict, train

    check_arguments(_write_scene, "scene", plain(cfg.scene))
    if min(cfg.scene.size) < SMALLEST:
        raise UserError(f"scene.size={list(cfg.scene.size)}: a scene has at least {SMALLEST} pixels on each side")
    start, output = time.perf_counter(), Path(cfg.output)
    common = ["task=cloudseg", f"data_root={cfg.data_root}", f"seed={cfg.seed}", *cfg.train]
    runs = {}
    for adapter in ("earth", "frozen"):
        overrides = [*common, f"adapter={adapter}", f"output={output / adapter}"]
        log.info("\n$ python tools/train.py %s", " ".join(overrides))
        runs[adapter] = train.main(compose("train", overrides))
    scene = _write_scene(output / "scene.tif", tuple(cfg.scene.size), cfg.scene.seed)
    overrides = [
        f"adapter_file={runs['earth']['adapter_file']}",
        f"input={scene}",
        f"output={output / 'scene_mask.tif'}",
    ]
    log.info("\n$ python tools/predict.py %s", " ".join(overrides))
    mapped = predict.main(compose("predict", overrides))
    result = {
        "miou": runs["earth"]["miou"],
        "frozen_miou": runs["frozen"]["miou"],
        "trainable": runs["earth"]["trainable"],
        "adapter_bytes": runs["earth"]["adapter_bytes"],
        "train_seconds": runs["earth"]["train_seconds"],
        "map": mapped["map"],
        "preview": mapped["preview"],
        "adapter_file": runs["earth"]["adapter_file"],
    }
    log.info(
        "\nmIoU on unseen scenes of another sensor: %.3f with the adapter, %.3f frozen",
        result["miou"],
        result["frozen_miou"],
    )
    for key, what in (("map", "map (GeoTIFF)"), ("preview", "preview picture"), ("adapter_file", "adapter file")):
        log.info("%-16s%s", what, result[key])
    log.info("%-16s%.0f s", "in all", time.perf_counter() - start)
    return result


def _write_scene(path: Path, size: tuple[int, int], seed: int) -> Path:
    """A generated scene of the sensor that the training never saw, as a GeoTIFF."""
    from vfmadapt.datasets.clouds_synthetic import TEST_PRESET, render_scene, write_scene

    path.parent.mkdir(parents=True, exist_ok=True)
    write_scene(path, render_scene(seed, size=size, preset=TEST_PRESET))
    return path
