"""TensorBoard: event files in the run's own folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_lab.loggers.base import RunInfo, flat


class Tensorboard:
    """Scalars by step, the table as text, the config and the final figures under HPARAMS.

    A run that goes on tells TensorBoard to forget the steps that are trained again, so no step is shown twice.
    """

    def __init__(self) -> None:
        from torch.utils import tensorboard

        self.tensorboard = tensorboard
        self.writer: Any = None

    def open(self, about: RunInfo) -> None:
        self.config = flat(about.config)
        self.writer = self.tensorboard.SummaryWriter(about.folder / "tensorboard", purge_step=about.step + 1)

    def log(self, row: dict[str, float], step: int) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def summary(self, figures: dict[str, float], step: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        final = {f"final/{name}": value for name, value in figures.items()}
        plain = {
            name: value if isinstance(value, (int, float, str)) else str(value) for name, value in self.config.items()
        }
        # add_hparams would write into a folder of its own
        for part in hparams(plain, final):
            self.writer.file_writer.add_summary(part)
        self.log(final, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[float]], step: int) -> None:
        lines = [columns, ["---"] * len(columns), *([f"{value:g}" for value in row] for row in rows)]
        self.writer.add_text(name, "\n".join("| " + " | ".join(line) + " |" for line in lines), step)

    def close(self, failed: bool) -> None:
        if self.writer is not None:
            self.writer.close()
