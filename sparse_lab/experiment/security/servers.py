"""Who gets a password with what a run reports is for its owner to say, on the command line or in the environment."""

from __future__ import annotations

import os
import reprlib
from typing import Any

from sparse_lab.errors import UserError
from sparse_lab.records.redaction import is_secret

KEY = "logger.mlflow_uri"
SENT = ("MLFLOW_TRACKING_", "DATABRICKS_")  # MLflow sends these to its server


def sets_server(key: str) -> bool:
    """Is an override's key, with its signs, the server's?"""
    return key.lstrip("+") == KEY


def check_server(where: str, uri: Any) -> None:
    """Refuse a server that a file names, where a secret would be sent to it. Raises UserError with one line."""
    sent = [name for name, value in os.environ.items() if name.startswith(SENT) and is_secret(name, value)]
    if uri not in (None, "null") and sent:
        raise UserError(
            f"{where}: {KEY}={reprlib.repr(uri)} would be sent {sent[0]}: type it on the command line, or set "
            "MLFLOW_TRACKING_URI"
        )
