"""The command: `sparse-lab KEY=VALUE ...` runs through Hydra; `sparse-lab VERB ...` does the rest.

torch is imported only when something runs, so that --help, --cfg and completion answer at once; and whatever is
imported here is imported before a signal is listened to.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import signal
import sys
from pathlib import Path

from sparse_lab.host import console
from sparse_lab.training.signals import AGAIN, Stopped, terminable

VERBS = {
    "report": "sparse_lab.cli.report:main",
    "collect": "sparse_lab.cli.collect:main",
    "status": "sparse_lab.cli.status:main",
    "methods": "sparse_lab.cli.methods:main",
    "keys": "sparse_lab.cli.config_keys:main",
    "bench": "sparse_lab.cli.bench:main",
    "export": "sparse_lab.cli.export:main",
    "evaluate": "sparse_lab.cli.evaluate:main",
    "reproduce": "sparse_lab.cli.reproduce:main",
    "doctor": "sparse_lab.cli.doctor.main:main",
}
FAILED, USER_ERROR = 1, 2
# a name that no file can have, or that is closed to this user: even to ask whether it is there raises these
CLOSED = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS}
# what is there for what it says alone: nothing is done where that is lost
ONLY_SAYS = {"status", "methods", "keys", "doctor", "--help", "-h", "--cfg", "-c", "--info", "-i"}


def main(argv: list[str] | None = None) -> int:
    """The console script. Returns the exit status.

    0 done, 1 a run failed, 2 the request was wrong; 143 stopped by SIGTERM, 130 by Ctrl-C and 129 with its terminal,
    after saving.
    """
    end = _End()
    if argv is None:  # the command of a process, which ends with it
        console.keep_going()
        argv = sys.argv[1:]
        atexit.register(end)
    try:
        with terminable():
            return _heard(_answer(argv), argv)
    except (Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT, AGAIN)
        print(f"sparse-lab: {stopped}", file=sys.stderr)
        end.status = stopped.status
        return stopped.status


class _End:
    """Is called last when Python ends, as it was registered first. After a signal the process is gone then: to take
    thousands of modules apart would take seconds.
    """

    status: int | None = None

    def __call__(self) -> None:
        if self.status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)


def _heard(status: int, argv: list[str]) -> int:
    """The exit status, once all is said."""
    sys.stdout.flush()
    error = console.lost()
    if error is None:
        return status
    print(f"sparse-lab: what was said is lost ({error.strerror} where standard output goes)", file=sys.stderr)
    return status or (FAILED if ONLY_SAYS.intersection(argv) else 0)


def _answer(argv: list[str]) -> int:
    from sparse_lab.records.atomic_io import printable
    from sparse_lab.records.redaction import redact

    try:
        from sparse_lab.experiment import plugins

        argv = plugins.start(argv)  # before anything is composed
        if any(word.startswith("query=") for word in argv) and "COMP_LINE" in os.environ:
            typed = plugins.start_completing(os.environ["COMP_LINE"])
            if typed is None:
                return 0
            os.environ["COMP_LINE"] = typed
        if argv and argv[0] in VERBS:
            module, function = VERBS[argv[0]].split(":")
            return getattr(importlib.import_module(module), function)(argv[1:])
        return _hydra(argv)
    except Exception as error:
        if (refused := _refusal(error)) is None:
            raise
        said, status = refused
        print(f"sparse-lab: {printable(redact(said))}", file=sys.stderr)  # it may tell of a stranger's file
        return status


def _refusal(error: Exception) -> tuple[str, int] | None:
    """What is said of an error that the user can mend, and the exit status; None for any other."""
    from sparse_lab.errors import SparseLabError, UserError
    from sparse_lab.host import full_disk
    from sparse_lab.records.lock import Moved

    if isinstance(error, SparseLabError):
        return str(error), FAILED if isinstance(error, Moved) else USER_ERROR
    if (full := full_disk.found_in(error)) is not None:
        return full_disk.what_of(full, Path.cwd()), FAILED
    if isinstance(error, OSError) and error.errno in CLOSED and error.filename is not None:
        return _refusal(UserError(f"{os.fsdecode(error.filename)}: {error.strerror}: name another file or folder"))
    return None


def _hydra(argv: list[str]) -> int:
    """Look at the request as a whole, then let Hydra compose and start each job."""
    from sparse_lab.records.atomic_io import printable_lines
    from sparse_lab.records.redaction import redact
    from sparse_lab.sweep.plan import Request

    request = Request.read(argv)
    if request.help:
        print(printable_lines(request.help_text()))
        return 0
    if request.cfg is not None:
        print(printable_lines(redact(request.config_text())), end="")
        return 0
    if request.runs:
        request.check()
        from sparse_lab.sweep.launch import start

        return start(request)
    import hydra

    sys.argv = [sys.argv[0], *request.argv]  # Hydra reads it
    hydra.main(version_base="1.3", config_path=str(request.source.conf), config_name="config")(lambda cfg: None)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
