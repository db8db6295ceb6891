"""The tool `train`: a config in; adapter file, metrics, logs and previews out."""

import json
import logging
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vfmadapt._settings import check_arguments
from vfmadapt.build import build_model, data_source, instantiate, plain
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from omegaconf import DictConfig

    from vfmadapt.model import AdaptedModel
    from vfmadapt.tasks.clips import TrackingData
    from vfmadapt.tasks.data import SegmentationData
    from vfmadapt.tasks.scenes import SceneData
    from vfmadapt.tasks.training import AdapterTask

    Loaders = SegmentationData | TrackingData | SceneData

log = logging.getLogger(__name__)

START_BATCHES = 8
"""Batches shown to adapters that start from data: with the default crops 2048 tokens or more."""


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Train adapter and head, measure them on the test split, and write everything into the run folder.

    The keys are those of conf/train.yaml. The weights kept are those of the epoch that is best on the val split, by
    mIoU or what else the task is judged by.

    Returns:
        "miou", "iou", "f1", "mean_f1", "boundary_f1", "accuracy" and, where classes are lines, "completeness",
        "correctness", "quality", "skeleton_recall" (test split; see `SegmentationMetrics`), of depth and other values
        what `DepthMetrics` or `ValueMetrics` gives,
        "trainable" (parameters), "adapter_bytes", "train_seconds", "steps" and the paths "run", "adapter_file",
        "previews" (of several processes only the first writes, and gives the paths of, adapter file and previews).

    Raises:
        UserError: an impossible setting, nothing to resume from, an adapter file that does not fit, a loss that is not
            finite.
        KeyboardInterrupt: Ctrl-C; the checkpoint of the last whole epoch is kept.
    """
    from vfmadapt.checkpoint import read_header

    run = run_folder(cfg)
    resumed = checkpoint_to_resume(cfg.resume, run)
    source = data_source(cfg)
    data = make_data(cfg, source)
    if cfg.adapter_file:
        read_header(cfg.adapter_file)  # a wrong path fails before the data are prepared
    source.prepare()
    from lightning.pytorch import seed_everything

    for part in ("pytorch", "fabric"):  # devices and tips: our own lines say what matters
        logging.getLogger(f"lightning.{part}").setLevel(logging.WARNING)
    seed_everything(cfg.seed, verbose=False)
    model = build_model(cfg, source.spec)
    if cfg.remember:
        model.keep_features(cfg.loader.cache_mb)
    task: AdapterTask = instantiate(cfg.task, model, packages=("vfmadapt.tasks.",))
    trainer = make_trainer(cfg, run, _callbacks(cfg, run, monitor=task.monitor, better=task.better))
    trainable = sum(p.numel() for p in model.trainable_parameters())
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    log.info("%s: %d trainable parameters on %d frozen ones; run folder %s", task.name, trainable, frozen, run)
    for adapter in model.backbone.active_adapters():
        if adapter.hint:
            log.info("note: %s", adapter.hint)
    start = time.perf_counter()
    if cfg.adapter_file:
        start_from_file(model, cfg.adapter_file)
    elif resumed is None:
        start_from_data(trainer, task, data)
    fit(trainer, task, data, resumed)
    seconds = time.perf_counter() - start
    _load_best(trainer, task)
    result = {
        **measure(trainer, task, data),
        "trainable": trainable,
        "train_seconds": round(seconds, 1),
        "steps": trainer.global_step,
        "run": str(run),
    }
    if trainer.is_global_zero:  # the processes of a distributed run hold the same weights and counts: one writes
        result |= _write(cfg, task, data, run)
        (run / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def run_folder(cfg: "DictConfig") -> Path:
    """`cfg.output`, by default runs/train/TASK-ADAPTER (the adapter by PEFT's name for it, or that of its module)."""
    adapter = cfg.adapter.get("tuner") or cfg.adapter._target_.split(".")[-2]
    return Path(cfg.output or Path("runs") / "train" / f"{cfg.task.name}-{adapter}")


def checkpoint_to_resume(resume: bool | str | None, run: Path) -> Path | None:
    """The checkpoint that `resume` means: True for the run folder's last one, or a path; None for a fresh start."""
    if resume is None or resume is False:
        return None
    path = run / "checkpoints" / "last.ckpt" if resume is True else Path(str(resume))
    if not path.is_file():
        raise UserError(
            f"resume={str(resume).lower()}: there is no {path}; leave resume= out to start anew, "
            "or give output= or a .ckpt file"
        )
    return path


def make_data(cfg: "DictConfig", source: Any) -> "Loaders":
    """Loaders and augmentation as `cfg.loader` and `cfg.augment` say; of clips where `cfg.loader` has `clip`.

    Raises:
        UserError: settings that they do not take; no window size.
    """
    from vfmadapt.contracts import ValueSource
    from vfmadapt.tasks.augment import Augment
    from vfmadapt.tasks.augment_values import ValueAugment
    from vfmadapt.tasks.data import SegmentationData
    from vfmadapt.tasks.values import ValueData

    loader, changes = plain(cfg.loader), plain(cfg.augment)
    if "clip" in loader:
        return _make_clips(cfg, source, loader)
    if "needs" in loader:
        return _make_scenes(cfg, source, loader)
    of_values = isinstance(source, ValueSource)
    if "crop" not in loader:
        raise UserError("loader.crop is missing; write loader.crop=128, the side of a training window in pixels")
    crop = {"crop": loader.pop("crop")}
    for made, name, settings in (
        (Augment, "augment", changes),
        (Augment, "loader", crop),
        (SegmentationData, "loader", loader),
    ):
        check_arguments(made, name, settings)
    augment = (ValueAugment if of_values else Augment)(**crop, **changes)
    made_data = ValueData if of_values else SegmentationData
    return made_data(source, augment=augment, shots=cfg.data.get("shots"), seed=cfg.seed, **loader)


def _make_clips(cfg: "DictConfig", source: Any, loader: dict[str, Any]) -> "TrackingData":
    """Loaders over clips; their frames are resized and read anew each time."""
    from vfmadapt.tasks.clips import TrackingData

    settings = {k: v for k, v in loader.items() if k not in ("crop", "cache_mb")}
    changes = ("flips", "radiometric", "focus", "gap", "leave")
    settings |= {"side": cfg.backbone.size} | {key: plain(cfg.augment)[key] for key in changes}
    check_arguments(TrackingData, "loader", settings)
    return TrackingData(source, shots=cfg.data.get("shots"), seed=cfg.seed, **settings)


def _make_scenes(cfg: "DictConfig", source: Any, loader: dict[str, Any]) -> "SceneData":
    """Loaders over samples with depth and the like; they come whole."""
    from vfmadapt.tasks.scenes import SceneData

    settings = {k: v for k, v in loader.items() if k != "crop"}
    check_arguments(SceneData, "loader", settings)
    return SceneData(source, shots=cfg.data.get("shots"), seed=cfg.seed, **settings)


def make_trainer(cfg: "DictConfig", run: Path, callbacks: "list[Callback]") -> "Trainer":
    """Lightning's trainer with the settings `cfg.trainer`, these callbacks, CSV and TensorBoard logs.

    Raises:
        UserError: settings that it refuses.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    settings = plain(cfg.trainer)
    check_arguments(Trainer, "trainer", settings)
    logs = [CSVLogger(run, name="logs"), TensorBoardLogger(run, name="tensorboard")]
    try:
        return Trainer(
            **settings,
            default_root_dir=run,
            logger=logs,
            callbacks=callbacks,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            use_distributed_sampler=False,  # ours takes each process's share itself
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error


def _callbacks(cfg: "DictConfig", run: Path, *, monitor: str, better: Literal["max", "min"]) -> list["Callback"]:
    """A progress bar, checkpoints of the last epoch and, with validation, of that with the best val metric."""
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    from vfmadapt.tasks.progress import ProgressBar

    if cfg.trainer.get("fast_dev_run"):
        return [ProgressBar()]
    judged: dict[str, Any] = {"monitor": f"val/{monitor}", "mode": better}
    to: dict[str, Any] = {"dirpath": run / "checkpoints", "enable_version_counter": False}
    callbacks: list[Callback] = [ProgressBar()]
    if cfg.trainer.get("limit_val_batches") != 0:
        callbacks.append(ModelCheckpoint(**to, filename="best", **judged))
    callbacks.append(ModelCheckpoint(**to, filename="last", save_on_train_epoch_end=True))
    if cfg.early_stop is not None:
        callbacks.append(EarlyStopping(patience=cfg.early_stop, **judged))
    return callbacks


def start_from_file(model: "AdaptedModel", path: str) -> None:
    """Load the weights of an earlier run; raises UserError unless backbone, adapter and head are the same."""
    from vfmadapt.checkpoint import check_hash, read_file

    header, state = read_file(path)
    check_hash(path, header, model.backbone.spec)
    model.load_adapter_state(state)


def start_from_data(trainer: "Trainer", task: "AdapterTask", data: "Loaders") -> None:
    """Show adapters whose start depends on data the first training batches, normalised.

    Before the trainer starts other processes, so that all of them see the same batches.
    """
    if not list(task.model.backbone.from_data()):
        return
    from torch import Tensor

    device = trainer.strategy.root_device
    model = task.model.to(device)
    first = list(islice(data.train_dataloader(), START_BATCHES))
    tensors = ({k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)} for batch in first)
    model.backbone.initialise([task.images(batch) for batch in tensors])


def fit(trainer: "Trainer", task: "AdapterTask", data: "LightningDataModule", resumed: Path | None) -> None:
    """Train to the end, from the checkpoint `resumed` if given, of which only plain values and tensors are read."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    with _quiet():
        try:
            trainer.fit(task, datamodule=data, ckpt_path=resumed, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C, after it has set SIGINT to be ignored
            signal.signal(signal.SIGINT, on_interrupt)
            last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
            kept = (
                f"{last} holds the last whole epoch, resume=true goes on from it"
                if last.is_file()
                else "no epoch was finished"
            )
            log.info("stopped at step %d; %s", trainer.global_step, kept)
            raise KeyboardInterrupt from None


def measure(trainer: "Trainer", task: "AdapterTask", data: "Loaders") -> dict[str, Any]:
    """Metrics of the test split, also logged as a table."""
    with _quiet():
        trainer.test(task, datamodule=data, verbose=False)
    log.info("test split of %s:\n%s", data.source.spec.name, task.table())
    return task.results["test"]


def _load_best(trainer: "Trainer", task: "AdapterTask") -> None:
    import torch

    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best:
        checkpoint = torch.load(best, map_location="cpu", weights_only=True)
        task.model.load_adapter_state(checkpoint["state_dict"])


def _write(cfg: "DictConfig", task: "AdapterTask", data: "Loaders", run: Path) -> dict[str, Any]:
    """Adapter file and previews of test images."""
    from vfmadapt.checkpoint import save
    from vfmadapt.tasks.previews import evenly

    file = save(run / "adapter.safetensors", task.model, training=plain(cfg))
    samples: Any = data.samples("test")
    pictures = task.draw(samples, run / "previews", indices=evenly(samples, cfg.previews))
    log.info("adapter file: %s (%.2f MB)\npreviews: %s", file, file.stat().st_size / 1e6, run / "previews")
    return {"adapter_file": str(file), "adapter_bytes": file.stat().st_size, "previews": [str(p) for p in pictures]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Lightning's advice that does not apply here, and its own use of deprecated calls."""
    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers.*",  # the cache makes up for them
            ".*number of training batches.*",
            ".*Checkpoint directory.*",  # resume and repeated runs write into the same folder on purpose
            ".*in eval mode at the start of training.*",  # the frozen backbone
            ".*treespec.*",
            ".*sync_dist=True.*",  # the metrics are of counts that were summed over all processes
        ):
            warnings.filterwarnings("ignore", text)
        yield
