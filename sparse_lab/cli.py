"""The command: `sparse-lab KEY=VALUE ...` runs through Hydra; `sparse-lab VERB ...` does the rest.

torch is imported only when something runs, so that --help, --cfg and completion answer at once.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import traceback
from typing import TYPE_CHECKING

from sparse_lab.config import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from sparse_lab.requests import Request

VERBS = {
    "report": "sparse_lab.report.cli:main",
    "status": "sparse_lab.report.status:main",
    "methods": "sparse_lab.gallery:main",
    "keys": "sparse_lab.keys:main",
    "bench": "sparse_lab.bench:main",
    "export": "sparse_lab.deploy.export:main",
    "doctor": "sparse_lab.doctor:main",
}
USER_ERROR, FAILED_RUN = 2, 1


def main(argv: list[str] | None = None) -> int:
    """The console script. Returns the exit status: 0 done, 1 a run failed, 2 the request was wrong."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in VERBS:
            module, function = VERBS[argv[0]].split(":")
            return getattr(importlib.import_module(module), function)(argv[1:])
        return _hydra(argv)
    except UserError as error:
        print(f"sparse-lab: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("sparse-lab: interrupted: start the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as in `sparse-lab methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _hydra(argv: list[str]) -> int:
    """Look at the request as a whole, then let Hydra compose and start each job."""
    import hydra

    from sparse_lab.requests import Request

    request = Request.read(argv)
    if request.runs:
        request.check()
    sweep = Sweep(request)

    def job(cfg: DictConfig) -> None:
        sweep.run(cfg)

    sys.argv = [sys.argv[0], *request.argv]  # Hydra reads it, and DDP starts its other processes by it
    hydra.main(version_base="1.3", config_path=str(request.conf), config_name="config")(job)()
    return sweep.finish()


class Sweep:
    """Runs the jobs of one command in this process; one that fails does not stop the others."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.started = 0
        self.failed: list[str] = []

    def run(self, cfg: DictConfig) -> None:
        from rich.console import Console

        from sparse_lab.check import check
        from sparse_lab.record import run_name
        from sparse_lab.requests import to_config
        from sparse_lab.run import run

        self.started += 1
        console = Console(width=None if sys.stdout.isatty() else 160)
        label = f"[{self.started}/{self.request.jobs}]" if self.request.jobs > 1 else ""
        config = to_config(cfg)
        try:
            check(config)
            run(config, shlex.join(["sparse-lab", *self.request.argv]), console, label)
        except UserError as error:
            self._fail(f"{run_name(config)}: {error}")
        except Exception as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._fail(
                f"{run_name(config)}: {type(error).__name__}: {line} "
                f"({os.path.basename(where.filename)}:{where.lineno}; "
                "the whole traceback is in the run folder's error.txt)"
            )

    def _fail(self, line: str) -> None:
        self.failed.append(line)
        print(f"sparse-lab: failed: {line}", file=sys.stderr, flush=True)

    def finish(self) -> int:
        if self.started > 1:
            print(f"{self.started} runs: {self.started - len(self.failed)} done, {len(self.failed)} failed")
            for line in self.failed:
                print(f"  failed: {line}")
        return FAILED_RUN if self.failed else 0


if __name__ == "__main__":
    sys.exit(main())
