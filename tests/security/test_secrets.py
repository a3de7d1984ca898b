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
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.security.secrets import check_config, check_line
from sparse_lab.records.atomic_io import damaged, write_record
from sparse_lab.records.redaction import REDACTED, clean, redact, values
from sparse_lab.sweep.plan import Request

KEY = "sk-0123456789abcdef"
SLACK = "https://hooks.slack.com/services/"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKC\n-----END RSA PRIVATE KEY-----"
# made up, and put together here so that no scanner of repositories takes one for a real key
MARKS = [
    mark + "a1B2c3D4e5" * 8
    for mark in (
        "sk-",
        "gh" + "p_",
        "glpat" + "-",
        "hv" + "s.",
        "r8" + "_",
        "gs" + "k_",
        "ya" + "29.",
        "wandb" + "_v1_",
    )
] + [
    "AS" + "IA" + "A1B2C3D4" * 2,
    "xox" + "b-1234567890",
    "SG" + ".a1B2c3D4e5f6g7h8.a1B2c3D4e5f6g7h8",
    "AI" + "za" + "a1B2c" * 7,
]
ODD = """p&ss<w>o"r'd \\ 1é%/+="""


@pytest.mark.parametrize(
    "name",
    [
        *("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "GITHUB_PAT", "PGPASSWORD"),
        *("MLFLOW_TRACKING_PASSWORD", "DB_PASS", "OPENAI_APIKEY", "CLIENT_SECRET", "SENTRY_DSN", "wandb_api_key"),
        *(
            "SSHPASS",
            "DB_PW",
            "MYSQL_PWD",
            "AZURE_STORAGE_CONNECTION_STRING",
            "SERVICEBUS_CONN_STR",
            "SLACK_WEBHOOK_URL",
        ),
        *("WEBHOOK_URL", "TEAMS_WEBHOOK", "SUPABASE_JWT", "SESSION_COOKIE", "DOCKER_AUTH_CONFIG", "LDAP_PASSCODE"),
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
        ("MAX_TOKENS", "1048576000"),
        ("COMPASS", "a1b2c3d4e5"),
        ("PAGE_URL", "https://a1b2c3d4e5"),
        ("PWDX", "a1b2c3d4e5"),
        ("AUTHOR", "a1b2c3d4e5"),
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
        ("x eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc_def-123 y", f"x {REDACTED} y"),
        (f"{SLACK}T00/B00/x1y2z3 y", f"{REDACTED} y"),
        ("https://discord.com/api/webhooks/12345/ab-cd_ef y", f"{REDACTED} y"),
        ("AccountName=me;AccountKey=a1b2c3d4e5== y", f"AccountName=me;AccountKey={REDACTED} y"),
        ("https://me.blob.core/c?sv=1&sig=a1%2Bb2&se=2", f"https://me.blob.core/c?sv=1&sig={REDACTED}&se=2"),
        (f"a {PEM} b", f"a {REDACTED} b"),
        ("a -----BEGIN PRIVATE KEY-----\nMIIE", f"a {REDACTED}"),
        ("Authorization: Basic bWU6cGFzc3dvcmQxMjM=", f"Authorization: Basic {REDACTED}"),
        ("{'authorization': 'Bearer a1b2c3d4e5f6g7h8'}", f"{{'authorization': 'Bearer {REDACTED}'}}"),
        ("Authorization: a1b2c3d4e5f6g7h8", f"Authorization: {REDACTED}"),
        ("X-Api-Key: a1b2c3d4e5f6g7h8", f"X-Api-Key: {REDACTED}"),
        ("curl -H 'bearer a1b2c3d4e5f6g7h8'", f"curl -H 'bearer {REDACTED}'"),
        ("SSHPASS=hunter22 ssh", f"SSHPASS={REDACTED} ssh"),
        ("DB_PW=hun;ter22 x", f"DB_PW={REDACTED} x"),
        ("SLACK_WEBHOOK_URL=https://a/b x", f"SLACK_WEBHOOK_URL={REDACTED} x"),
        *((f"a {mark} b", f"a {REDACTED} b") for mark in MARKS),
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
        "TOKENIZERS_PARALLELISM=false MAX_TOKENS=4096 OLDPWD=/home/me SOME_TOKEN_FILE=/run/x",
        "the bearer of this letter; bearer authentication is needed; basic authentication, basic internationalization",
        "Authorization: see the manual; authorization required",
        "https://hooks.slack.com/ and https://discord.com/channels/1/2 and https://x/y?sv=1&key=a",
        "-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----",
        "eyJ is how a token begins; xoxo; sk-learn; ghp_short; hf_hub; SG.a.b; AIza",
        "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "conv1.weight=0.99 key=value signature=short patience=12345 passes=12345 compass=north",
        "vgg16: 12345678:AA; ya29.x; npm_config_cache=/tmp; lin_api; pul-request; r8_x",
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


def test_variables_that_a_config_sets_are_no_place_for_one(monkeypatch):
    config = OmegaConf.create({"hydra": {"job": {"env_set": {"WANDB_API_KEY": "abcd1234"}}}})
    refused(lambda: check_config(config), "hydra.job.env_set.WANDB_API_KEY")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    config = OmegaConf.create({"hydra": {"job": {"env_set": {"OTHER": "${oc.env:WANDB_API_KEY}"}}}})
    refused(lambda: check_config(config), "hydra.job.env_set.OTHER")
    refused(lambda: check_config(OmegaConf.create({"a": {f"x-{KEY}": 1}})), "WANDB_API_KEY")


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
