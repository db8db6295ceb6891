"""What every adapter costs: time and memory of a forward and of a training step beside the bare frozen backbone."""

import gc
import json
import logging
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vfmadapt.build import adapter, entry, names
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, parameters not at all."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._skip = {p.untyped_storage().data_ptr() for p in parameters}
        self._seen: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Hook of `torch.autograd.graph.saved_tensors_hooks`."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._skip:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(self._seen.values())


def overheads(cfg: "DictConfig") -> dict[str, Any]:
    """Forward and training-step time and training memory of each adapter, relative to the bare backbone.

    The training step is forward, backward and AdamW; the bare backbone's is a linear probe's: forward, then backward
    through one linear layer. Times are medians of interleaved pairs (bare, adapted). Training memory is what is kept
    for the backward pass plus trained weights, their gradients and AdamW's two moments, beside the frozen weights.

    Returns:
        {adapter: {"forward", "train": ratios to bare, "memory": ratio, "params", "unfrozen"}}, and the set-up.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(int(cfg.threads))
    try:
        chosen = list(cfg.only) if cfg.only else [n for n in names("adapter") if n != "frozen"]
        image = torch.randn(int(cfg.batch), 3, int(cfg.size), int(cfg.size))
        found: dict[str, Any] = {}
        log.info("%-18s%10s%10s%10s", "relative to bare", "forward", "step", "memory")
        bare = _model("frozen", cfg)
        for name in chosen:
            gc.collect()  # hooks and backbone refer to each other
            try:
                found[name] = _cost(name, bare, cfg, image)
            except UserError as error:
                found[name] = {"refused": str(error)}
                log.info("%-18srefused: %s", name, error)
                continue
            ratios = (found[name][key] for key in ("forward", "train", "memory"))
            log.info("%-18s%10.2f%10.2f%10.2f", name, *ratios)
    finally:
        torch.set_num_threads(before)
    setup = {key: cfg[key] for key in ("network", "size", "batch", "threads", "repeats")}
    result = {"setup": setup, "adapters": found}
    if cfg.output:
        Path(cfg.output).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _model(name: str, cfg: Any) -> AdaptedBackbone:
    from vfmadapt.backbones.timm_models import timm_backbone

    frozen = timm_backbone(cfg.network, pretrained=False)
    torch.manual_seed(int(cfg.seed))
    return AdaptedBackbone(frozen, {"main": adapter(entry("adapter", name), frozen)})


def _cost(name: str, bare: AdaptedBackbone, cfg: Any, image: Tensor) -> dict[str, Any]:
    model = _model(name, cfg).train()
    model.initialise([image])
    probe = torch.nn.Linear(bare.spec.dims[-1], 8)
    runs = {
        "forward": (lambda: _forward(bare, image), lambda: _forward(model, image)),
        "train": (lambda: _step(bare, probe, image), lambda: _step(model, probe, image)),
    }
    cost: dict[str, Any] = {}
    for key, pair in runs.items():
        taken: tuple[list[float], list[float]] = ([], [])
        for turn in range(int(cfg.repeats) + 1):  # one turn to warm up
            for run, times in zip(pair, taken, strict=True):
                start = time.perf_counter()
                run()
                if turn:
                    times.append(time.perf_counter() - start)
        cost[key] = round(median(taken[1]) / median(taken[0]), 3)
    cost["memory"] = round(_memory(model, probe, image) / _memory(bare, probe, image), 3)
    cost["params"] = sum(p.numel() for p in model.trainable_parameters())
    return cost


@torch.no_grad()
def _forward(model: AdaptedBackbone, image: Tensor) -> None:
    model(image, [model.spec.depth - 1])


def _loss(model: AdaptedBackbone, probe: torch.nn.Linear, image: Tensor) -> Tensor:
    grid = model(image, [model.spec.depth - 1]).grids[0]
    loss = probe(grid.permute(0, 2, 3, 1)).square().mean()
    aux = model.aux_loss()
    return loss if aux is None else loss + aux


def _step(model: AdaptedBackbone, probe: torch.nn.Linear, image: Tensor) -> None:
    parameters = [*probe.parameters(), *model.trainable_parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-6)
    _loss(model, probe, image).backward()
    optimiser.step()
    optimiser.zero_grad()


def _memory(model: AdaptedBackbone, probe: torch.nn.Linear, image: Tensor) -> int:
    trained = [*probe.parameters(), *model.trainable_parameters()]
    frozen = [p for p in model.backbone.parameters() if not p.requires_grad]
    kept = Kept([*trained, *frozen])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, _same):
        _loss(model, probe, image)
    weights = sum(p.numel() * p.element_size() for p in frozen)
    return weights + kept.bytes + 4 * sum(p.numel() * p.element_size() for p in trained)


def _same(tensor: Tensor) -> Tensor:
    return tensor
