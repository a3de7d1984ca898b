"""What is said can get lost in every way that a shell knows: the work goes on, and ends as it would have."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SAYS = """
import sys
from sparse_lab.host import console
console.keep_going()
for _ in range(3):
    print("acc 93 \\xb1 1 \\u2500 \\udc80", flush=True)
    print("err \\xb1", file=sys.stderr, flush=True)
print("x" * 100_000)
import warnings, logging
warnings.warn("a warning")
logging.warning("a line")
open("done", "w").write(str(console.lost()))
"""


def shell(folder: Path, redirection: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = f"{sys.executable} -c '{SAYS.replace(chr(39), chr(34))}' {redirection}"
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, timeout=60,
    )  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "redirection",
    ["| true", "2>&1 | true", "| head -c 1", ">&-", "2>&-", "<&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full",
     ">/dev/full 2>&1"],
)  # fmt: skip
def test_the_work_goes_on_without_its_console(redirection, tmp_path):
    done = shell(tmp_path, redirection)
    assert done.returncode == 0 and b"Exception ignored" not in done.stderr
    lost = (tmp_path / "done").read_text()
    assert ("No space left" in lost) == (">/dev/full" in redirection and "2>/dev/full" not in redirection)


def test_what_an_encoding_lacks_is_spelled_out(tmp_path):
    done = shell(tmp_path, "", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and done.stdout.startswith(b"acc 93 \\xb1 1 \\u2500 \\udc80\n")
    assert done.stderr.startswith(b"err \\xb1\n")


def test_in_utf_8_signs_are_themselves(tmp_path):
    done = shell(tmp_path, "", PYTHONIOENCODING="utf-8")
    assert done.stdout.startswith("acc 93 ± 1 ─ \\udc80\n".encode()) and done.stdout.count(b"x") == 100_000


def test_a_descriptor_that_was_closed_is_no_file_that_is_opened_later(tmp_path):
    """Or what a library writes to standard error would land in a checkpoint."""
    program = (
        "import os\nfrom sparse_lab.host import console\nconsole.keep_going()\nfile = open('kept', 'w')\n"
        "os.write(1, b'said')\nos.write(2, b'said')\nfile.write('own')\n"
    )
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{program}" <&- >&- 2>&-'], cwd=tmp_path, check=True)
    assert (tmp_path / "kept").read_text() == "own"


def test_a_pipe_that_somebody_made_non_blocking_gets_all_of_it(tmp_path):
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    process = subprocess.Popen([sys.executable, "-c", SAYS], cwd=tmp_path, stdout=writes, stderr=subprocess.DEVNULL)
    os.close(writes)
    time.sleep(0.5)
    with open(reads, "rb") as file:
        said = file.read()
    assert process.wait(60) == 0 and said.count(b"x") == 100_000


def test_a_terminal_that_is_gone_takes_what_is_said_with_it(tmp_path):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SAYS], cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    os.close(master)
    assert process.wait(60) == 0 and (tmp_path / "done").exists()


def said(redirection: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m sparse_lab {' '.join(words)} {redirection}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("words", "status"), [(("--help",), 0), (("status", "/nowhere"), 2), (("method=none",), 2)])
def test_a_command_keeps_its_exit_status(words, status):
    assert said(">&-", *words).returncode == status
    assert said("2>&-", *words).returncode == status


def test_where_nothing_but_what_is_said_was_asked_for_a_full_disk_is_a_failure():
    done = said(">/dev/full", "--help")
    assert done.returncode == 1
    assert done.stderr == "sparse-lab: what was said is lost (No space left on device where standard output goes)\n"


def test_a_hangup_stops_as_sigterm_does_unless_it_is_ignored():
    program = (
        "import os, signal, time\nfrom sparse_lab.training.signals import Stopped, StopRequest, terminable\n"
        "with terminable(), StopRequest(print) as stop:\n    try:\n        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        time.sleep(0)\n        print('went on')\n    except Stopped as stopped:\n"
        "        print(stopped, stopped.status)\n"
    )
    heeds = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert heeds.stdout == "stopped by SIGHUP: start the same command again to go on 129\n"
    under_nohup = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, text=True)
    assert under_nohup.stdout == "went on\n"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
