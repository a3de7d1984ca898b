"""What a person sees: two lines that fit, with the figures of metrics.csv; no reading from the device at each step."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from sparse_lab.callbacks import progress
from sparse_lab.callbacks.progress import Progress, span
from sparse_lab.experiment.runner import run

LONG = ("trainer.progress=true", "dataset.train_limit=320", "training.batch_size=32")
ITERATIVE = ("method=iterative", "sparsity=s90", "schedule.iterative.share=0.6", *LONG)


def watched(config, monkeypatch, width: int) -> list[list[str]]:
    """Every picture that a terminal of this width got, as lines; drawn and read at every step."""
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.0)
    monkeypatch.setattr(progress, "READ_SECONDS", 0.0)
    pictures = []
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    picture = Progress._picture

    def note(self):
        drawn = picture(self)
        plain = Console(file=io.StringIO(), width=width, color_system=None)
        plain.print(drawn)
        pictures.append(plain.file.getvalue().splitlines())
        return drawn

    monkeypatch.setattr(Progress, "_picture", note)
    run(config, "x", console)
    return pictures


@pytest.mark.full
def test_two_lines_that_fit_into_80_columns(compose, monkeypatch, metrics):
    config = compose(*ITERATIVE)
    pictures = watched(config, monkeypatch, 80)
    assert all(len(lines) == 2 and max(cell_len(line) for line in lines) < 80 for lines in pictures)
    assert not any("…" in line for lines in pictures for line in lines)
    last = metrics(config)[-1]
    top, bottom = pictures[-1]
    assert top.split("  ")[1:] == [
        "epoch 3/3",
        "round 3/3",
        f"loss {last['train_loss']:.3f}",
        f"train {last['train_accuracy']:.1f}%",
        f"validation {last['validation_accuracy']:.1f}%",
    ]
    assert f"sparsity {100 * last['sparsity']:.5g}%  {int(last['kept']):,} kept" in bottom
    assert re.search(r"[\d,]+ img/s  0:00 left$", bottom.rstrip())
    sparsities = {re.search(r"sparsity ([\d.]+)%", lines[1])[1] for lines in pictures}
    assert len(sparsities) > 3, "it follows the masks while they change"


@pytest.mark.parametrize("numbers", [(1e-4, 23_000_000, 99_999, 359_999), (0.99995, 1_150, 1.0, 3.0)])
def test_the_longest_figures_fit_too(numbers):
    sparsity, kept, rate, left = numbers
    watch = Progress.__new__(Progress)
    watch.figures = {"sparsity": sparsity, "kept": kept}
    words = "  ".join([*watch._weights(), f"{rate:,.0f} img/s", f"{span(left)} left"])
    assert 2 + 14 + 2 + len(words) <= 80


def test_a_narrow_terminal_cuts_and_does_not_wrap(compose, monkeypatch):
    pictures = watched(compose("method=dense", *LONG), monkeypatch, 44)
    assert all(len(lines) == 2 for lines in pictures) and any("…" in lines[0] for lines in pictures)


def test_the_device_is_read_once_an_epoch_in_a_short_one(compose, monkeypatch):
    inside, reads = [], []
    hook, tolist = Progress.on_train_batch_end, torch.Tensor.tolist

    def watched_hook(self, *args):
        inside.append(True)
        hook(self, *args)
        inside.pop()

    monkeypatch.setattr(Progress, "on_train_batch_end", watched_hook)
    monkeypatch.setattr(progress, "READ_SECONDS", 1e9)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (inside and reads.append(1), tolist(self))[1])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: inside and reads.append(1), raising=False)
    run(compose("method=dense", *LONG), "x", Console(file=io.StringIO(), force_terminal=True, width=80))
    assert len(reads) == 3, "three epochs of ten steps"


def test_plain_lines_where_there_is_no_terminal(compose, monkeypatch, metrics):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    config = compose(*ITERATIVE)
    out = io.StringIO()
    result = run(config, "x", Console(file=out, width=80))
    lines = [line for line in out.getvalue().splitlines() if line.startswith(f"  {result['name']}: epoch ")]
    assert len(lines) == 3 and not Text.from_ansi(out.getvalue()).spans
    for line, row in zip(lines, metrics(config), strict=True):
        assert f"loss {row['train_loss']:.3f}, train {row['train_accuracy']:.1f}%" in line
        assert f"{int(row['kept']):,} kept" in line and "img/s" in line and line.endswith("left")


def test_short_runs_say_nothing_in_between(compose, monkeypatch):
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0))  # however slow this machine is
    out = io.StringIO()
    run(compose("method=dense", *LONG), "x", Console(file=out, width=80))
    assert "epoch" not in out.getvalue()


@pytest.mark.parametrize(
    "seconds, words", [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (11045, "3:04:05"), (183_600, "2d 3h")]
)
def test_spans(seconds, words):
    assert span(seconds) == words
