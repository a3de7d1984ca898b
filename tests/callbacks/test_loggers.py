"""What dashboards are sent: the rows of metrics.csv, the masks, the levels. A board in the test writes it down."""

from __future__ import annotations

import threading
from importlib.machinery import ModuleSpec

import pytest
from rich.console import Console

from sparse_lab import loggers
from sparse_lab.config import LoggerConfig
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.experiment.identity import settings
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.validate import check_loggers
from sparse_lab.loggers import thread
from sparse_lab.sweep.plan import Request


class Book:
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.closed: list[bool] = []

    def open(self, about):
        self.about = about

    def log(self, row, step):
        assert step not in self.rows
        self.rows[step] = row

    def summary(self, figures, step):
        self.figures = figures

    def table(self, name, columns, rows, step):
        self.tables = {name: [dict(zip(columns, row, strict=True)) for row in rows]}

    def close(self, failed):
        self.closed.append(failed)


@pytest.fixture
def books(monkeypatch):
    """Every run's board, in order."""
    made: list[Book] = []

    def make() -> Book:
        made.append(Book())
        return made[-1]

    monkeypatch.setattr(loggers, "factories", lambda names, outputs: {"fake": make})
    return made


def test_a_row_an_epoch_with_masks_and_levels(compose, quiet, books, metrics, updates):
    config = compose("method=iterative", "sparsity=s90", "schedule.iterative.share=0.6", "diagnostics.layers=true")
    result = run(config, "x", quiet)
    book = books[-1]
    written = metrics(config)
    assert [row["step"] for row in written] == list(book.rows)
    for row in written:
        sent = book.rows[int(row["step"])]
        assert all(sent[key] == pytest.approx(value, rel=1e-9) for key, value in row.items() if key != "step")
    for line, sent in zip(updates(config), book.rows.values(), strict=True):  # one change a round, one epoch a round
        assert sent["masks/effective_share"] == pytest.approx(line["effective"] / line["kept"])
        for name, layer in line["layers"].items():
            assert sent[f"density/{name}"] == pytest.approx(layer["kept"] / layer["total"])
    keys = ("level", "sparsity", "kept", "validation_accuracy", "test_accuracy")
    levels = [{key: level[key] for key in keys} for level in result["levels"]]
    assert len(levels) == 3 and book.tables == {"levels": levels}
    assert [row["level/kept"] for row in book.rows.values()] == [level["kept"] for level in levels]
    assert book.figures == {key: result[key] for key in ("test_accuracy", "validation_accuracy", "kept", "sparsity")}
    assert book.closed == [False]
    assert book.about.config == settings(config) and book.about.name == result["name"]
    assert (book.about.hash, book.about.group) == (result["hash"], "iterative-0.9")


def test_masks_are_sent_when_they_have_changed(compose, quiet, books, updates):
    exchange = ("method.drop_and_grow.update_every=1", "method.drop_and_grow.end=0.5")
    config = compose("method=rigl", "sparsity=s90", "training.epochs=8", *exchange)
    run(config, "x", quiet)
    rows, lines = list(books[-1].rows.values()), updates(config)
    epochs = {max(line["step"] - 1, 0) for line in lines}  # an epoch is one step, and exchanges stand behind it
    assert 3 <= len(epochs) <= 4
    # the last row is that of a level, whose network may be an earlier epoch's
    assert {number for number, row in enumerate(rows[:-1]) if "masks/explored" in row} == epochs
    assert rows[max(epochs)]["masks/explored"] == pytest.approx(lines[-1]["explored"])


def test_a_run_that_fails_closes_as_failed_and_goes_on_behind_its_last_row(compose, quiet, books, plug, metrics):
    config = compose("method=dense")
    plug(2)
    with pytest.raises(RuntimeError, match="plug"):
        run(config, "x", quiet)
    plug(0)
    run(config, "x", quiet)
    first, second = books
    assert first.closed == [True] and second.closed == [False] and not hasattr(first, "tables")
    assert (first.about.step, second.about.step) == (0, list(first.rows)[-1])
    assert [*first.rows, *second.rows] == [row["step"] for row in metrics(config)]


def test_a_run_killed_behind_its_last_epoch_still_sends_its_end(compose, quiet, books, plug):
    config = compose("method=dense")
    plug(3)
    with pytest.raises(RuntimeError, match="plug"):
        run(config, "x", quiet)
    plug(0)
    result = run(config, "x", quiet)
    assert books[1].figures["test_accuracy"] == result["test_accuracy"] and len(books[1].tables["levels"]) == 1
    assert not books[1].rows and books[1].closed == [False]


def test_one_that_never_answers_does_not_hold_training_up(compose, monkeypatch, capsys, metrics):
    released = threading.Event()

    class Deaf(Book):
        def open(self, about):
            released.wait()

    monkeypatch.setattr(loggers, "factories", lambda names, outputs: {"deaf": Deaf})
    monkeypatch.setattr(thread, "PATIENCE", 0.2)
    config = compose("method=dense")
    run(config, "x", Console(width=200))
    assert not released.is_set() and len(metrics(config)) == 3
    assert capsys.readouterr().out.count("logger=deaf is left out") == 1
    released.set()


def test_one_whose_package_is_broken_is_said_once(compose, monkeypatch, capsys):
    def broken():
        raise ImportError("libsomething.so is missing")

    monkeypatch.setattr(loggers, "factories", lambda names, outputs: {"broken": broken})
    run(compose("method=dense"), "x", Console(width=200))
    assert capsys.readouterr().out.count("logger=broken is left out from here on: ImportError libsomething.so") == 1


@pytest.mark.parametrize("found", [None, ModuleSpec("mlflow", None)], ids=["nothing", "a folder of that name"])
def test_one_whose_package_is_not_there_is_refused_with_the_line_that_mends_it(found, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: found)
    check_loggers(LoggerConfig())
    with pytest.raises(SparseLabError, match=r"pip install 'sparse_lab\[mlflow\]'"):
        check_loggers(LoggerConfig(mlflow=True))


def test_a_password_in_the_address_is_refused():
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        check_loggers(LoggerConfig(mlflow_uri="http://me:tiger@host:5000"))
    assert "tiger" not in str(caught.value)


@pytest.mark.parametrize(
    "request_, wanted",
    [
        ("logger=[wandb,tensorboard]", {"wandb", "tensorboard"}),
        ("logger=[csv,mlflow]", {"mlflow"}),
        ("logger=trackio", {"trackio"}),
        ("logger=csv", set()),
    ],
)
def test_several_at_once_are_a_list(request_, wanted):
    config = Request.read([request_]).compose([]).config()
    assert set(config.logger.names) == wanted


def test_an_unknown_name_in_the_list_is_named():
    with pytest.raises(UserError, match=r"tensorbord.*tensorboard"):
        Request.read(["logger=[wandb,tensorbord]"])
