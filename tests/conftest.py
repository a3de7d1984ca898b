"""What every room's tests share: nothing shows a picture, nothing asks for an account."""

import os

import sparse_lab  # noqa: F401  before torch is: how long its threads spin is read once

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("WANDB_API_KEY", None)
