"""What counts as a secret, in which disguises it is found, and that requests that hold one are refused."""

from __future__ import annotations

import html
import json
import shlex
from urllib.parse import quote, quote_plus

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from sparse_lab.errors import UserError
from sparse_lab.experiment import fit
from sparse_lab.experiment.security.secrets import check_config, check_line
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.records.atomic_io import damaged, write_record
from sparse_lab.records.redaction import REDACTED, clean, redact, values
from sparse_lab.sweep.plan import Request

KEY = "sk-0123456789abcdef"
ODD = """p&ss<w>o"r'd \\ 1é%/+="""


@pytest.mark.parametrize(
    "name",
    [
        *("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "GITHUB_PAT", "PGPASSWORD"),
        *("MLFLOW_TRACKING_PASSWORD", "DB_PASS", "OPENAI_APIKEY", "CLIENT_SECRET", "SENTRY_DSN", "wandb_api_key"),
    ],
)
def test_names_that_say_so(name, monkeypatch):
    monkeypatch.setenv(name, "a1b2c3d4e5")
    assert values()["a1b2c3d4e5"] == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSH_AUTH_SOCK", "/tmp/ssh-1/agent.1234"),
        ("XDG_SESSION_ID", "a1b2c3d4e5"),
        ("TOKENIZERS_PARALLELISM", "a1b2c3d4e5"),
        ("PWD", "/nowhere/at/all/1"),
        ("OLDPWD", "/nowhere/at/all/1"),
        ("KEYBOARD_LAYOUT", "de-latin1-nodeadkeys"),
        ("HF_TOKEN_PATH", "/nowhere/at/all/1"),
        ("GOOGLE_APPLICATION_CREDENTIALS", __file__),
        ("API_KEY", "short1"),
        ("DB_PASSWORD", "training"),  # a word, and a group of ours
        ("MONKEY", "a1b2c3d4e5"),
    ],
)
def test_names_and_values_that_are_ordinary(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert value not in values()


@pytest.mark.parametrize(
    "disguise",
    [
        *(str, json.dumps, repr, html.escape, quote, quote_plus, shlex.quote),
        lambda text: json.dumps(text, ensure_ascii=False),
        lambda text: quote(text, safe=""),
        lambda text: shlex.join([f"x={text}"]),
    ],
)
@pytest.mark.parametrize("secret", [KEY, ODD, "line one 1\nline two 2"])
def test_every_disguise_is_seen_through(secret, disguise, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", secret)
    seen = redact(f"before {disguise(secret)} after")
    assert seen.startswith("before ") and seen.endswith(" after") and REDACTED in seen
    for part in (secret, *secret.splitlines(), disguise(secret).strip("'\"")):
        assert part not in seen


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("MY_API_KEY=abcd1234 sparse-lab", f"MY_API_KEY={REDACTED} sparse-lab"),
        ("http://me:hunter2@host:5000/x", f"http://{REDACTED}@host:5000/x"),
        ("postgresql+psycopg2://me:p%40ss@host/db", f"postgresql+psycopg2://{REDACTED}@host/db"),
        ("https://0123456789abcdef0123456789@api.host/", f"https://{REDACTED}@api.host/"),
        ("Bearer hf_abcdefghijklmnopqrstuvwx", f"Bearer {REDACTED}"),
        ("key AKIAIOSFODNN7EXAMPLE here", f"key {REDACTED} here"),
    ],
)
def test_what_is_written_as_a_secret_is_one(text, left):
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "vgg16-cifar10-oneshot-98.85-seed1-1a2b3c4d5e",
        "git@github.com:owner/repo",
        "ssh://git@host/repo",
        "sparse-lab -m method=a,b seed=1",
        "https://host/a@b?x=1",
        "kept 1,234 of 99,999 weights; task-0123456789abcdef01",
    ],
)
def test_ordinary_text_stays(text):
    assert redact(text) == text


def test_a_clean_record_keeps_its_form(monkeypatch, tmp_path):
    """Numbers stay numbers even where their digits are a secret's, and the checksum is the clean record's."""
    monkeypatch.setenv("A_PASSWORD", "14714688")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    record = {"total": 14714688, "command": f"x={KEY}", "deep": [{"a": ["14714688", None, True, 0.5]}]}
    path = tmp_path / "record.json"
    write_record(path, record)
    read = json.loads(path.read_text())
    assert not damaged(read)
    assert read["total"] == 14714688 and read["command"] == f"x={REDACTED}"
    assert read["deep"] == [{"a": [REDACTED, None, True, 0.5]}]
    assert record["command"] == f"x={KEY}" and clean(record)["total"] == 14714688


def refused(call, *told: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and KEY not in line and "environment" in line
    assert all(word in line for word in told), line


def test_a_command_line_with_a_secret_is_refused(monkeypatch):
    refused(lambda: check_line(["logger.project=sk-fedcba9876543210"]), "logger.project", "API key")
    refused(lambda: check_line(["hydra.job.env_set.WANDB_API_KEY=abcd"]), "WANDB_API_KEY")
    refused(lambda: check_line(["logger.mlflow_uri=http://me:secret@host"]), "password")
    monkeypatch.setenv("MY_TOKEN", "value-1-value")
    refused(lambda: check_line(["--config-dir", "value-1-value"]), "MY_TOKEN")
    refused(lambda: Request.read(["logger.project=value-1-value"]), "MY_TOKEN", "logger.project")
    check_line(["-m", "method=dense", "seed=1,2", "logger.mlflow_uri=http://host:5000"])


@pytest.mark.parametrize(
    "words",
    [
        ["logger.project=${oc.env:WANDB_API_KEY}"],
        ["logger.project=x-${oc.env:WANDB_API_KEY}-x"],
        ["paths.outputs=/tmp/${oc.env:WANDB_API_KEY}"],
        ["hydra.job.env_copy=[WANDB_API_KEY]"],
    ],
)
def test_a_config_that_would_hold_one_is_refused(words, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    refused(lambda: Request.read(words).compose([]), "WANDB_API_KEY", words[0][:9])


def test_variables_that_a_config_sets_are_no_place_for_one():
    config = OmegaConf.create({"hydra": {"job": {"env_set": {"WANDB_API_KEY": "abcd1234"}}}})
    refused(lambda: check_config(config), "hydra.job.env_set.WANDB_API_KEY")
    check_config(OmegaConf.create({"hydra": {"job": {"env_set": {"WANDB_API_KEY": "${oc.env:WANDB_API_KEY}"}}}}))


def test_no_file_of_a_run_that_fails_holds_one(compose, monkeypatch, tmp_path):
    """The error text of a library that shows what it was given."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("A_PASSWORD", ODD)
    config = compose("method=dense")

    def fail(*_: object, **__: object) -> None:
        password = ODD
        raise RuntimeError(f"401 for key {KEY} and {password!r} at http://me:{quote(ODD)}@host/?api_key={KEY}\n{KEY}")

    monkeypatch.setattr(fit, "assemble", fail)
    with pytest.raises(RuntimeError):
        run(config, f"WANDB_API_KEY={KEY} sparse-lab", Console(quiet=True))
    folder = run_dir(config)
    assert "RuntimeError: 401 for key [redacted]" in json.loads((folder.path / "status.json").read_text())["error"]
    assert "401 for key [redacted]" in (folder.path / "error.txt").read_text()
    folder.add_line("notes", {"said": f"key {KEY}", "step": 1})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"status.json", "error.txt", "config.yaml", "notes.jsonl"} <= {path.name for path in files}
    for path in files:
        for secret in (KEY, ODD, repr(ODD)[1:-1], quote(ODD)):
            assert secret.encode() not in path.read_bytes(), path
