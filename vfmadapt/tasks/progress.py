"""The progress bar of training."""

import sys
from contextlib import redirect_stdout
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, on standard error since standard output ends with the result; drawn rarely where nobody sees."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 50)

    def init_train_tqdm(self) -> Any:
        """The bar of an epoch."""
        with redirect_stdout(sys.stderr):  # the bar keeps the stream that it was made with
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Any:
        """The bar of the val split."""
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def init_test_tqdm(self) -> Any:
        """The bar of the test split."""
        with redirect_stdout(sys.stderr):
            return super().init_test_tqdm()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What is shown beside the bar: the logged values, without the log's version number."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
