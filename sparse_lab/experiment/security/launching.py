"""What a launcher hands to a shell, to a batch script or to the program that a worker starts."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparse_lab.errors import UserError
from sparse_lab.experiment.security.interpolations import texts

# Lines for a shell, and ways to replace the program that is started. No file may set them (`allowed`), and none has a
# part in them: what is typed there is written out.
SHELL = (
    *("launcher.setup", "launcher.teardown", "launcher.srun_args", "launcher.additional_parameters"),
    *("launcher.ray.init.runtime_env", "launcher.ray.remote.runtime_env", "job.env_set"),
)
SHELL_LINES = ("setup", "teardown", "srun_args")
FOLDER = "submitit_folder"
BATCH = ("SlurmLauncher", "LocalLauncher")
SIGNS = frozenset("`$;<>\\\"'#")


def check_launching(config: DictConfig) -> None:
    """Refuse a composed config of which a value could run what nobody typed. Raises UserError with one line."""
    plain: Any = OmegaConf.to_container(config.hydra, resolve=False)
    for key in SHELL:
        node: Any = plain
        for part in key.split("."):
            if isinstance(node, str) and "${" in node:
                break
            node = node.get(part) if isinstance(node, dict) else None
        for text in texts(node):
            if "${" in text:
                raise UserError(f"hydra.{key} is put together from other values: write it out")
    if str(config.hydra.launcher.get("_target_")).endswith(BATCH):
        check_batch(resolved(config.hydra.launcher))


def resolved(launcher: DictConfig) -> dict[str, Any]:
    """A launcher's settings, those left out that only a job knows."""
    found = {}
    for key in launcher:
        if not OmegaConf.is_missing(launcher, key):
            value = OmegaConf.select(launcher, str(key), throw_on_resolution_failure=False)
            found[str(key)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return found


def check_batch(settings: dict[str, Any]) -> None:
    """Refuse settings, interpolations resolved, that would end their line of a batch script. Raises UserError.

    Also what a shell would heed, though submitit quotes it: no partition or comment needs it.
    """
    for key, value in settings.items():
        for text in texts({key: value}):
            if not text.isprintable():
                raise UserError(
                    f"hydra.launcher.{key} holds several lines, and a batch script would run them: give one line"
                )
            if "#SBATCH" in text:
                raise UserError(f"hydra.launcher.{key}: for sbatch's own there is hydra.launcher.additional_parameters")
            if key not in (*SHELL_LINES, FOLDER) and (signs := SIGNS & set(text)):
                raise UserError(
                    f"hydra.launcher.{key} holds {' '.join(sorted(signs))}, which a shell would heed: leave it out"
                )
