"""Single layers beside other libraries: what is wrong, fails or is not here is named and not counted."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparse_lab.bench import compute, layers, opponents, rounds
from sparse_lab.bench.cells import BACKWARD, FORWARD, Measured, Settings, Unavailable
from sparse_lab.bench.layers import Kind
from sparse_lab.bench.opponents import Layer, Opponent
from sparse_lab.bench.roofline import Machine
from sparse_lab.cli.main import main

SMALL = (Kind(8, 12, 3, 6), Kind(8, 8, 3, 6, stride=2), Kind(24, 16))
SETTINGS = Settings(("vgg16",), sparsities=(50.0, 90.0), against=("sparselab", "sparseprop"), batch=32, repeats=1)


class Values(nn.Module):
    """A library's linear layer: the live weights alone, row by row; `off` is added to what it gives."""

    def __init__(self, layer: nn.Module, off: float = 0.0) -> None:
        super().__init__()
        self.mask, self.off = layer.weight != 0.0, off
        self.values = nn.Parameter(layer.weight.detach()[self.mask])

    def forward(self, images):
        weight = torch.zeros(self.mask.shape).masked_scatter(self.mask, self.values)
        return functional.linear(images, weight) + self.off


def fake(monkeypatch, name: str, off: float = 0.0) -> None:
    def make(layer, shape):
        other = Values(layer, off)
        return Layer(other, other.values)

    monkeypatch.setitem(opponents.MAKERS, name, Opponent(lambda layer: isinstance(layer, nn.Linear), make))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rounds, "TURN", 0.0)
    monkeypatch.setattr(layers, "KINDS", SMALL)
    monkeypatch.setattr(compute, "machine", lambda: Machine(1e11, 1e10))


def measured(kind: Kind) -> Measured:
    found = Measured()
    rounds.measure(list(layers.entries(kind, SETTINGS)), 1, lambda: False, found, lambda work, detail="": None)
    return found


@pytest.mark.parametrize("sparsity", [50.0, 90.0])
@pytest.mark.parametrize("kind", SMALL, ids=str)
def test_sparse_arithmetic_is_right_on_each_layer(kind, sparsity):
    """`_checked` compares with float64; here also that it would see a wrong weight."""
    network = layers._masked(kind, sparsity)
    images = torch.randn(kind.shape(16))
    assert layers._error(layers._sparse(network), network[0], images) < 1e-5
    call = layers._sparse(network)
    with torch.no_grad():
        network[0].weight.mul_(1.01)
    other = layers._masked(kind, sparsity)
    assert layers._error(call, other[0], images) > layers.TOLERANCE


def test_an_opponent_is_set_against_sparse_arithmetic_under_the_same_masks(monkeypatch):
    fake(monkeypatch, "sparselab")
    monkeypatch.setitem(opponents.MAKERS, "sparseprop", Opponent(lambda layer: False, lambda layer, shape: None))
    found = measured(SMALL[2])
    cells = [cell for cell in found.seconds if cell.candidate == "sparselab"]
    assert {(cell.what, cell.sparsity) for cell in cells} == {(w, s) for w in (FORWARD, BACKWARD) for s in (50.0, 90.0)}
    sparse = found.line("linear 24-16", BACKWARD, 32, "erk")
    for cell in sparse:
        ratio = found.ratio(cell, "sparselab")
        assert ratio.median == found.seconds[cell.rival("sparselab")][1] / found.seconds[cell][1]
    assert not found.notes and found.opponents() == ["sparselab"]


def test_an_opponent_that_is_wrong_or_fails_is_named_and_not_counted(monkeypatch):
    fake(monkeypatch, "sparselab", off=0.1)

    def broken(layer, shape):
        def fail(images):
            raise RuntimeError("no such kernel\nat line 7")

        return Layer(fail, nn.Parameter(torch.ones(1)))

    monkeypatch.setitem(opponents.MAKERS, "sparseprop", Opponent(lambda layer: True, broken))
    found = measured(SMALL[2])
    assert not found.opponents() and len(found.notes) == 4
    assert found.notes[0].startswith("sparselab is wrong on linear 24-16 at 90%, and is not counted there: off by ")
    assert found.notes[1] == "sparseprop fails on linear 24-16 at 90%, and is not counted there: no such kernel"


@pytest.mark.parametrize(("name", "kind"), [("sparselab", SMALL[2]), ("sparseprop", SMALL[0])])
def test_an_opponent_that_is_not_installed_is_said_in_one_line(name, kind, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(opponents, "import_module", missing)
    with pytest.raises(Unavailable, match=rf"^{name} is left out: no module {name} here \(pip install {name}\)$"):
        opponents.MAKERS[name].make(kind.build(), kind.shape(4))
    notes = measured(kind).notes
    assert len([line for line in notes if line.startswith(name)]) == 1


@pytest.mark.parametrize("name", opponents.MAKERS)
def test_an_opponent_that_is_installed_is_right(name):
    pytest.importorskip(name)
    for kind in SMALL:
        if opponents.MAKERS[name].knows(kind.build()):
            masked = layers._masked(kind, 90.0)
            layers._checked(name, lambda masked=masked: masked, torch.randn(kind.shape(32)), str(kind))


def test_the_table_the_csv_and_the_picture_hold_layers_and_opponents(tmp_path, capsys, monkeypatch):
    fake(monkeypatch, "sparselab")
    words = ["--what", "layers", "--against", "sparselab", "--sparsity", "50", "90", "--batch", "8", "--repeats", "1"]
    assert main(["bench", *words, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "conv 8-12, 3x3, 6x6, forward and backward, batch 8" in printed and "conv 8-8, 3x3 / 2, 6x6" in printed
    rows = [line.split() for line in printed.splitlines() if "times sparselab" in line]
    assert len(rows) == 6 and [row[4:] == ["-", "-"] for row in rows] == [True] * 4 + [False] * 2
    with open(tmp_path / "compute.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 6 * 3 + 4 and all(row["machine"] for row in found)
    for row in found:
        assert bool(row["times_sparselab_median"]) == (row["model"] == "linear 24-16" and row["candidate"] != "dense")
    assert (tmp_path / "compute.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "sparselib"], "sparselab"),
        (
            ["--what", "training", "--against", "sparseprop"],
            "sparseprop knows single layers alone: add layers to --what",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_list_and_a_library_without_layers_too(words, said, capsys):
    status = 2
    try:
        status = main(["bench", *words])
    except SystemExit as left:
        status = left.code
    assert status == 2 and said in capsys.readouterr().err
