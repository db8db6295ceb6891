"""Depth from video without labels, as a Lightning module."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor

from vfmadapt._state import load_state
from vfmadapt.contracts import Samples, ValueSpec
from vfmadapt.depth_metrics import DepthMetrics, as_table, focal_error, trajectory_error
from vfmadapt.errors import UserError
from vfmadapt.heads.endodac import EndoDACHead
from vfmadapt.model import AdaptedModel
from vfmadapt.self_depth.geometry import pose_matrix
from vfmadapt.self_depth.networks import FOCAL, STAGES
from vfmadapt.self_depth.objective import SCALES, Camera, Neighbours, Phase
from vfmadapt.tasks.training import AdapterTask, Optimizer, Schedule


class SelfDepthTask(AdapterTask):
    """Trains a model to give depths with which neighbouring frames of a video predict one another.

    One optimiser trains the model and the networks of `Neighbours`; these are kept in checkpoints, in no adapter file.
    Depths and motions have a scale of their own, so every image's depths are brought to the truth's median before they
    are measured. All settings are keyword-only and appear under `task.` on the command line.

    Args:
        model: backbone, adapter and head=endodac, whose depths are above 0.
        name: name of the task, for the run folder.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (biases, norms, scales) are not decayed.
        warmup: share of all steps in which the learning rate rises.
        schedule: "cosine", "poly" or "constant".
        optimizer: "adamw" or "muon", see `AdapterTask`.
        intrinsics: "learned" with the rest, or as "given" by the data.
        appearance: learn optical flow and the change of light between frames, too.
        width: of the networks that see two frames (published: 64, of ResNet-18).
        blocks: of each of their stages (published: 2).
        stages: of the motion's network (published: 4); fewer for small frames, whose last map needs four cells a side.
        focal: to begin with, in widths and heights of a frame (published: 1.19; endoscopes: about 0.7).
        motion_first: share of the steps in which every depth is one and the same, with intrinsics as they begin: only
            rotations are learnt in the first half of them, then translations, too. They cost little; without them large
            motions are never found, or explained by translations that shift the whole picture (published: 0).

    Raises:
        UserError: data with classes or several values, another head, an impossible setting.
    """

    monitor = "abs_rel"
    better: Literal["max", "min"] = "min"

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str = "self_depth",
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        optimizer: Optimizer = "adamw",
        intrinsics: Literal["learned", "given"] = "learned",
        appearance: bool = True,
        width: int = 64,
        blocks: int = 2,
        stages: int = STAGES,
        focal: float = FOCAL,
        motion_first: float = 0.0,
    ) -> None:
        super().__init__(
            model, name=name, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule, optimizer=optimizer
        )
        if model.spec.outputs != 1 or not model.spec.values:
            raise UserError(f"task=self_depth learns one depth, {model.spec.name} has none; take data=endo_synthetic")
        if not isinstance(model.head, EndoDACHead):
            raise UserError("task=self_depth needs a head whose depths are all above 0: take head=endodac")
        if not 0 <= motion_first < 1:
            raise UserError(f"task.motion_first={motion_first}: a share of the steps, from 0 to less than 1")
        self.motion_first = motion_first
        model.spec = replace(model.spec, values=(ValueSpec("depth, its scale unknown"),))
        channels = len(model.spec.bands)
        self.neighbours = Neighbours(
            channels,
            learned=intrinsics == "learned",
            appearance=appearance,
            width=width,
            blocks=blocks,
            stages=stages,
            focal=focal,
        )
        self.metrics, self.mean_metrics = DepthMetrics(align="median"), DepthMetrics(align="median")
        self._seen: list[dict[str, float]] = []
        self._mean: Tensor | None = None

    def trained(self) -> list[torch.nn.Parameter]:
        """The model's parameters and those of the networks that help."""
        return [*super().trained(), *(p for p in self.neighbours.parameters() if p.requires_grad)]

    def training_step(self, batch: dict[str, Any], _index: int) -> Tensor:
        """Loss of a batch, with the adapters' auxiliary losses.

        Raises:
            UserError: the loss is not finite.
        """
        image, head = batch["image"], self.model.head
        assert isinstance(head, EndoDACHead)
        depths: Sequence[Tensor] = SCALES * [torch.full_like(image[:, :1], head.middle)]
        if (phase := self._phase()) == "depths":
            depths = head.supervised(self.model.features(image), (image.shape[-2], image.shape[-1]))
        parts = self.neighbours(image, batch["sources"], depths, batch["intrinsics"], phase=phase)
        self.log_dict({f"train/{name}": part for name, part in parts.items() if name != "loss"})
        return self.complete(parts["loss"])

    def _phase(self) -> Phase:
        """What is learnt in this step."""
        if not self.motion_first or (done := self.global_step / self._total_steps()) >= self.motion_first:
            return "depths"
        return "turns" if done < self.motion_first / 2 else "motions"

    def validation_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Measure a frame of the val split."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Measure a frame of the test split."""
        self._evaluate(batch)

    def on_test_epoch_start(self) -> None:
        """Start counting; the mean of the training depths is measured, too, as what is to be beaten."""
        super().on_test_epoch_start()
        self._mean = self._data().mean_depth()

    def table(self) -> str:
        """The metrics of the test split as text."""
        return as_table(self.results["test"])

    def draw(self, samples: Samples, folder: Path, *, indices: Sequence[int]) -> list[Path]:
        """Write one picture per sample: frame, true depth and the model's."""
        from vfmadapt.tasks.scene_previews import write_depth_previews

        return write_depth_previews(self.model, samples, folder, indices=indices)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, the helping networks included."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["neighbours"] = self.neighbours.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what was trained; raises UserError unless it is exactly what this task trains."""
        super().on_load_checkpoint(checkpoint)
        load_state(self.neighbours.state_dict(), checkpoint["neighbours"])

    def _start(self) -> None:
        self.metrics.reset()
        self.mean_metrics.reset()
        self._seen, self._mean = [], None

    def _evaluate(self, batch: dict[str, Any]) -> None:
        """Count a batch of frames: their depths, and what is found of the camera."""
        truth = batch["depth"]
        known = batch["valid"] & truth.isfinite() & (truth > 0)
        self.metrics.update(self.model(batch["image"]), truth, known)
        if self._mean is not None:
            self.mean_metrics.update(self._mean.to(truth).expand_as(truth), truth, known)
        width = batch["image"].shape[-1]
        for image, sources, matrix, poses in zip(
            batch["image"], batch["sources"], batch["intrinsics"], batch["poses"], strict=True
        ):
            camera = self.neighbours.camera(image.expand_as(sources), sources, matrix.expand(len(sources), 3, 3))
            error = trajectory_error(path(pose_matrix(camera.motion)), path(poses))
            self._seen.append({**error, "focal": width * focal(camera), "true_focal": float(matrix[0, 0])})

    def _conclude(self, split: str) -> None:
        """The depth's metrics, the errors of three cameras in a row, and the median focal length."""
        self.metrics.sync(self.device)
        result = self.metrics.compute()
        if self._seen:
            result |= {key: fmean(seen[key] for seen in self._seen) for key in ("ate", "rpe_degrees")}
            result["focal"] = median(seen["focal"] for seen in self._seen)
            result["focal_error"] = focal_error(result["focal"], median(seen["true_focal"] for seen in self._seen))
        if self._mean is not None:
            result["abs_rel_of_mean"] = self.mean_metrics.compute()["abs_rel"]
        self.results[split] = result
        self.log_dict({f"{split}/{key}": value for key, value in result.items() if isinstance(value, float)})


def path(poses: Tensor) -> Tensor:
    """Poses (S, 4, 4) from a frame's camera to its neighbours' -> all cameras in the frame's, itself second."""
    cameras = torch.linalg.inv(poses)
    return torch.cat([cameras[:1], torch.eye(4).to(cameras)[None], cameras[1:]])


def focal(camera: Camera) -> float:
    """Mean over a frame's neighbours of the horizontal focal length, in widths of the picture."""
    return float(camera.focal[:, 0].mean())
