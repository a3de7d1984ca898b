"""What every room's tests share: nothing shows a picture, nothing asks for an account."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("WANDB_API_KEY", None)
