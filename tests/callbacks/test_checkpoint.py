"""Where the callback that saves must stand."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel

from sparse_lab.callbacks.checkpoint import Checkpoint
from sparse_lab.errors import SparseLabError


def test_it_stands_last_or_nothing_trains():
    save = Checkpoint(Mock(), 1, lambda: False, lambda: False, Mock(), {})
    module = BoringModel()
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", callbacks=[save, pl.Callback()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(SparseLabError, match="must stand last"):
        trainer.fit(module)
    assert trainer.global_step == 0
