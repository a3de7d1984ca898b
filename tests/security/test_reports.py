"""Records of unknown origin say what they like: a page, a table and a terminal show it as text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from sparse_lab.cli.main import main
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.records.atomic_io import write_record

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "';alert(1);//",
    "</style></script><svg onload=alert(1)>",
    "{{7*7}}{% raw %}${7*7}",
    "[x](javascript:alert(1))",
    "$\\frac{$x^",
    "\\input{secret}%\\end{table}",
    "a\nb|c\r\n# head",
    "\x1b]0;owned\x07\x1b[31mred\x9b31m\x7f",
    "\u202edetrevni\u2066",
]
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}
        self.reached: list[tuple[str, str, str]] = []
        self.policies: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policies.append(dict(attrs)["content"] or "")
        for name, value in attrs:
            outside = name in ("src", "href", "action", "srcset") and not (value or "").startswith(("data:", "#"))
            if outside or name.startswith("on") or name == "style":
                self.reached.append((tag, name, value or ""))


@pytest.fixture
def hostile(compose, quiet, tmp_path):
    """A folder of records, each with one of the texts wherever a text can stand."""
    config = compose("method=oneshot", "sparsity=s90")
    run(config, "test", quiet)
    record = json.loads((run_dir(config).path / "result.json").read_text())
    top = tmp_path / "hostile"
    for number, text in enumerate(HOSTILE):
        for seed in (1, 2):
            folder = top / f"{number}-{seed}"
            folder.mkdir(parents=True)
            texts = dict.fromkeys(("name", "model", "dataset", "method", "command", "device", "start", "commit"), text)
            changed = {**record, **texts, "seed": seed, "cell": f"{number}", "hash": f"{number}-{seed}"}
            changed["layers"] = [{**layer, "name": f"{text}{index}"} for index, layer in enumerate(record["layers"])]
            write_record(folder / "result.json", changed)
            (folder / "status.json").write_text(json.dumps({"state": "done", "error": text, "host": text}))
        failed = top / f"failed-{number}"
        failed.mkdir()
        (failed / "status.json").write_text(json.dumps({"state": "failed", "error": text, "updated": text}))
    (top / "bad\x1b[31m\n").mkdir()
    (top / "bad\x1b[31m\n" / "status.json").write_text('{"state": "failed", "error": "\x7f"}')
    (top / "worse\x1b[31m\n").mkdir()
    (top / "worse\x1b[31m\n" / "result.json").write_text("{")
    plan = {"command": "x", "started": HOSTILE[0], "pid": 1, "host": "h", "jobs": 2, "launcher": HOSTILE[9]}
    names = [
        {"name": text, "model": text, "dataset": text, "method": text, "sparsity": 0.9, "seed": 3} for text in HOSTILE
    ]
    (top / "sweeps" / "one").mkdir(parents=True)
    write_record(top / "sweeps" / "one" / "plan.json", {**plan, "runs": names})
    return top


@pytest.mark.full
def test_everything_is_shown_as_text(hostile, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["report", str(hostile), "--out", str(out)]) == 0
    assert main(["status", str(hostile)]) in (0, 1)
    said = capsys.readouterr()
    assert not STEERING.search(said.out) and not STEERING.search(said.err)
    page = (out / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.seen["script"] == 1 and tags.seen["style"] == 1 and "svg" not in tags.seen
    assert tags.reached == []
    assert any(policy.startswith("default-src 'none';") for policy in tags.policies)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{7*7}}" in page
    for name in ("report.html", "report.md", "table.tex", "results.csv", "levels.csv"):
        assert not STEERING.search((out / name).read_text(encoding="utf-8")), name
    text = (out / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<(script|img|svg)", text) and not re.search(r"(?<!\\)\]\(javascript", text)
    assert not any(line.startswith("# head") for line in text.splitlines())
    assert r"\input" not in (out / "table.tex").read_text(encoding="utf-8")
