"""The verbs beside running: each answers --help, and does what it says."""

from __future__ import annotations

import pytest
import torch

from sparse_lab.cli.main import VERBS, main


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_its_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"sparse-lab {verb}" in capsys.readouterr().out


LONG = "y" * 5_000  # no file system has names like that


@pytest.mark.parametrize(
    "words",
    [
        ["status", LONG],
        ["report", LONG],
        ["evaluate", LONG],
        ["export", LONG, "--to", "packed"],
        ["collect", LONG, "kept"],
        ["reproduce", LONG],
        ["--config-dir", LONG, "method=rigl"],
        ["--plugin", f"{LONG}.py", "method=rigl"],
        ["method=rigl", "dataset=arrays", f"dataset.file={LONG}.npz"],
        ["method=rigl", "dataset=folder", f"paths.data={LONG}"],
        ["method=rigl", f"model.weights={LONG}"],
    ],
    ids=lambda words: words[0] if words[0] in VERBS else words[-1][:15],
)
def test_a_name_that_no_file_can_have_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "File name too long" in line and len(line) < 2_200
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_closed_to_the_user_is_one_line(tmp_path, monkeypatch, capsys):
    def closed(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.is_dir", closed)  # to root, as whom tests may run, nothing is
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"sparse-lab: {tmp_path}: Permission denied: name another file or folder\n"


def test_methods_prints_the_gallery_as_markdown(capsys):
    assert main(["methods", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("`iterative_regrow`" in line and "iterative" in line and "taylor" in line for line in lines)


@pytest.mark.full
def test_export_writes_one_file_that_loads_into_a_plain_network(tmp_path, capsys):
    from sparse_lab import models

    short = ["model.width=0.0625", "dataset.train_limit=128", "training.epochs=1", "training.finetune.epochs=1"]
    request = [
        "method=oneshot",
        "sparsity=s90",
        "dataset=digits",
        "training=digits",
        *short,
        f"paths.outputs={tmp_path}",
    ]
    assert main(request) == 0
    run = next(path for path in (tmp_path / "runs").iterdir() if "oneshot" in path.name)
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(tmp_path / "net.pt")]) == 0
    payload = torch.load(tmp_path / "net.pt", weights_only=True)
    model = models.build(**payload["build"])
    model.load_state_dict(payload["state_dict"])
    live = sum(
        int(torch.count_nonzero(m.weight)) for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    )
    assert 0 < live <= payload["about"]["kept"] == round(0.1 * payload["about"]["total"])
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x.pt")]) == 2
    assert "not a finished run" in capsys.readouterr().err


def test_keys_shows_range_and_meaning_of_what_is_asked_for(capsys):
    assert main(["keys", "sparsity.target"]) == 0
    out = capsys.readouterr().out
    assert "[0, 1)" in out and "0.99" in out and "zero" in out
    with pytest.raises(SystemExit) as stop:
        main(["keys", "sparsty"])
    assert stop.value.code == 2 and "did you mean" in capsys.readouterr().err
