"""The tool `probe`: linear probes of several checkpoints on several tasks, with seeds."""

import csv
import logging
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmadapt.build import compose, plain
from vfmadapt.errors import UserError
from vfmadapt.files import atomic_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

_COLUMNS = ("task", "checkpoint", "seed", "metric", "value", "weights", "settings")


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Train the same head on every checkpoint of `cfg.checkpoints`, for every task and seed; keys: conf/probe.yaml.

    Rows of `probe.csv` in the run folder are kept: an interrupted table is continued, a checkpoint added.

    Returns:
        "table": {task: {checkpoint: {"mean", "deviation" (None for one seed), "seeds"}}}, and "csv" (path).

    Raises:
        UserError: no checkpoint, task or seed, or what tools/train.py refuses.
    """
    checkpoints, probes = plain(cfg.checkpoints), plain(cfg.probes)
    if not checkpoints or not cfg.tasks or not cfg.seeds:
        raise UserError("checkpoints, tasks and seeds: give at least one of each")
    if unknown := [task for task in cfg.tasks if task not in probes]:
        raise UserError(f"tasks: there is no {unknown[0]} among probes, which has {', '.join(probes)}")
    path = Path(cfg.output) / "probe.csv"
    rows = _read(path)
    for task, (checkpoint, weights), seed in product(cfg.tasks, checkpoints.items(), cfg.seeds):
        wanted, metric = _train_overrides(cfg, probes[task], weights, seed), cfg.metrics.get(task, cfg.metric)
        place = {"task": task, "checkpoint": checkpoint, "seed": str(seed), "settings": " ".join(wanted)}
        if any(all(row[k] == v for k, v in place.items()) for row in rows):
            continue
        row = place | {"metric": metric, "weights": str(weights), "value": _probe(wanted, metric, cfg, place)}
        rows = [r for r in rows if any(r[k] != place[k] for k in ("task", "checkpoint", "seed"))] + [row]
        _write(path, rows)
    table = summary([r for r in rows if int(r["seed"]) in cfg.seeds], list(checkpoints), list(cfg.tasks))
    text = as_markdown(table)
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text(text)
    log.info("%s\n%s", path, text)
    return {"table": table, "csv": str(path)}


def _train_overrides(cfg: "DictConfig", task: Sequence[str], weights: str | None, seed: int) -> list[str]:
    given = [] if weights is None else [f"backbone.weights={weights.replace('@', str(seed))}"]
    if weights == "random":
        given = ["backbone.pretrained=false"]
    return [*task, *cfg.train, f"trainer.max_steps={cfg.steps}", *given, f"seed={seed}", f"data_root={cfg.data_root}"]


def _probe(overrides: Sequence[str], metric: str, cfg: "DictConfig", place: Mapping[str, str]) -> float:
    """The metric of one training on the test split."""
    from vfmadapt import train

    name = "-".join((place["task"], place["checkpoint"], place["seed"]))
    result = train.main(compose("train", [*overrides, f"output={Path(cfg.output) / 'runs' / name}", "previews=0"]))
    if metric not in result:
        numbers = ", ".join(k for k, v in result.items() if isinstance(v, float))
        raise UserError(
            f"metric={metric}: task {place['task']} gives {numbers}; choose one with metric=, or for this task alone "
            f"with +metrics.{place['task']}=METRIC"
        )
    log.info("%s: %s %.4f", name, metric, result[metric])
    return float(result[metric])


def summary(
    rows: Sequence[Mapping[str, Any]], checkpoints: Sequence[str], tasks: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows -> {task: {checkpoint: mean, sample deviation and number of the seeds' values}}."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks:
        for checkpoint in checkpoints:
            values = [float(r["value"]) for r in rows if (r["task"], r["checkpoint"]) == (task, checkpoint)]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            entry = {"mean": statistics.fmean(values), "deviation": deviation, "seeds": len(values)}
            table.setdefault(task, {})[checkpoint] = entry
    return table


def as_markdown(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A row per checkpoint, a column per task: mean ± deviation."""
    lines = [f"| checkpoint | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    for checkpoint in next(iter(table.values())):
        cells = []
        for of_task in table.values():
            entry = of_task[checkpoint]
            spread = "" if entry["deviation"] is None else f" ± {entry['deviation']:.4f}"
            cells.append(f"{entry['mean']:.4f}{spread}")
        lines.append(f"| {checkpoint} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
