"""What every room's tests share: one thread each, kernels compiled before they start, a tenth of the night by day."""

from __future__ import annotations

import csv
import gc
import json
import os
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# before torch is imported: tests run side by side, and so small networks are slower with more threads. Processes that
# a test starts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("WANDB_API_KEY", None)

import pytest

import sparse_lab  # noqa: F401  before torch is: how long its threads spin is read once
from sparse_lab.records.atomic_io import CHECKSUM, checksum

if TYPE_CHECKING:
    from rich.console import Console

    from sparse_lab.config import Config
    from sparse_lab.experiment.compose import Composer

HERE = Path(__file__).parent
SHARE = 10
# a run of a second or two; two steps an epoch
SMALL = (
    "dataset=digits",
    "training=digits",
    "model.width=0.0625",
    "dataset.train_limit=32",
    "dataset.eval_limit=30",
    "training.batch_size=16",
    "training.epochs=2",
    "training.finetune.epochs=2",
    "training.regrow.epochs=2",
    "trainer=cpu",
    "trainer.progress=false",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tenth",
        action="store_true",
        help="of the tests marked nightly only the tenth that this commit draws, and none that are long even there",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    # once, before workers start; a process that tests alone compiles what it needs as it goes
    alone = [] if config.getoption("numprocesses", None) else ["--forget"]
    subprocess.run([sys.executable, str(HERE / "compile_kernels.py"), *alone], check=True)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker a core, and two at least: tests wait for processes too."""
    return max(2, min(os.cpu_count() or 2, 16))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_cases_to_test_all(items)
    if config.getoption("--tenth"):
        night = [item for item in items if item.get_closest_marker("nightly")]
        today = tenth([item.nodeid for item in night if not _is_long(item)], commit())
        left = {id(item) for item in night if item.nodeid not in today}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left])
        items[:] = [item for item in items if id(item) not in left]


def leave_cases_to_test_all(items: list[pytest.Item]) -> None:
    """Of a test marked every(n) each n-th case is fast, in the order of its parameters; the others are full."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("every") and not item.get_closest_marker("full"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        marker = found[0].get_closest_marker("every")
        assert marker is not None
        for number, item in enumerate(found):
            if number % marker.args[0]:
                item.add_marker("full")


def _is_long(item: pytest.Item) -> bool:
    """A minute or more: two of them in one tenth would make that day's CI longer than it may be."""
    return any(marker.kwargs.get("long") for marker in item.iter_markers("nightly"))


def tenth(nodeids: list[str], commit: str) -> set[str]:
    """Of these tests those of the commit: each tenth one, so that of a table of long ones few meet. Another commit
    draws another tenth, so all are seen within days (but those that are long, which only the night sees).
    """
    return set(sorted(nodeids)[zlib.crc32(commit.encode()) % SHARE :: SHARE])


def commit() -> str:
    """The commit of this checkout; "" where it has none, which draws a tenth as well."""
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported and collected is no garbage: Python would look through all of it again and again


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or extension modules report what they take for leaks


@pytest.fixture(scope="module", autouse=True)
def _nor_is_what_a_module_has_imported_since() -> None:
    gc.collect()
    gc.freeze()


@cache
def composer() -> Composer:
    """As a sweep's jobs are composed: Hydra puts the same choices together once."""
    from sparse_lab.sweep.plan import Request

    return Request.read([]).composer()


def composed(*words: str) -> Config:
    return composer().config(dict(one.split("=", 1) for one in words))


@pytest.fixture
def small() -> tuple[str, ...]:
    """The words of a small run; a room that needs another one adds to them."""
    return SMALL


@pytest.fixture
def three_epochs(tmp_path: Path) -> tuple[str, ...]:
    """The words of three epochs of a step each, under tmp_path."""
    data = ("dataset.train_limit=64", "training.batch_size=64", "dataset.eval_limit=50")
    return (*SMALL, *data, "training.epochs=3", "training.finetune.epochs=1", f"paths.outputs={tmp_path}")


@pytest.fixture
def compose(small: tuple[str, ...], tmp_path: Path) -> Callable[..., Config]:
    """compose("method=oneshot", ...) -> the config of a small run under tmp_path."""
    return partial(composed, f"paths.outputs={tmp_path}", *small)


@pytest.fixture(scope="session")
def compose_under() -> Callable[..., Config]:
    """compose_under(folder, "method=oneshot", ...) -> the config of a small run whose outputs lie in `folder`."""
    return lambda outputs, *words: composed(f"paths.outputs={outputs}", *SMALL, *words)


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """plugin("import sparse_lab ...", name="mine") -> a file mine.py of these lines, in a folder of its own. What is
    loaded while a test runs is taken out again behind it.
    """
    from sparse_lab.experiment import plugins

    def write(text: str, name: str = "mine", folder: str = "plugins") -> Path:
        path = tmp_path / folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import sparse_lab\n{textwrap.dedent(text)}", encoding="utf-8")
        return path

    yield write
    plugins.forget()


@pytest.fixture
def quiet() -> Console:
    from rich.console import Console

    return Console(quiet=True)


@pytest.fixture
def wide_console() -> Console:
    """Says all that a run says, a line a line."""
    from rich.console import Console

    return Console(width=400)


@pytest.fixture
def metrics() -> Callable[[Config], list[dict[str, float]]]:
    """The rows of a run's metrics.csv, which dashboards have no hand in."""

    from sparse_lab.experiment.identity import run_dir

    def read(config: Config) -> list[dict[str, float]]:
        with open(run_dir(config).path / "metrics.csv", newline="") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    return read


@pytest.fixture
def updates() -> Callable[[Config], list[dict[str, Any]]]:
    """The lines of a run's updates.jsonl."""

    from sparse_lab.experiment.identity import run_dir

    def read(config: Config) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run_dir(config).path / "updates.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """plug(2): a run fails right after it has saved its second epoch. plug(0): runs go through again."""
    from sparse_lab.callbacks.checkpoint import Checkpoint

    original = Checkpoint.on_train_epoch_end

    def pull(epochs: int) -> None:
        def save_and_fail(self: Checkpoint, trainer: Any, module: Any) -> None:
            original(self, trainer, module)
            if trainer.current_epoch + 1 == epochs:
                raise RuntimeError("somebody pulled the plug")

        monkeypatch.setattr(Checkpoint, "on_train_epoch_end", save_and_fail)

    return pull


@pytest.fixture(scope="session")
def seal() -> Callable[[Path, dict[str, Any]], None]:
    """seal(path, record): the record as a run would leave it, with the checksum that is its own."""

    def write(path: Path, record: dict[str, Any]) -> None:
        content = {key: value for key, value in record.items() if key != CHECKSUM}
        path.write_text(json.dumps({**content, CHECKSUM: checksum(content)}))

    return write
