"""docs/security.md says what the code does, and each of its lines names the test that holds it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from sparse_lab.experiment.security.allowed import ALLOWED
from sparse_lab.experiment.security.flags import FLAGS
from sparse_lab.experiment.security.interpolations import RESOLVERS, VARIABLES

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "security.md").read_text(encoding="utf-8")
TEST = re.compile(r"`([\w./]+\.py)::(test_\w+)`")


@cache
def named_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| --- ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[1:]]


def test_every_test_on_the_page_is_there():
    named = TEST.findall(PAGE)
    assert len(named) > 40
    missing = [(file, name) for file, name in named if name not in named_in((HERE / file).resolve())]
    assert not missing


def test_every_line_names_a_test():
    bullets = re.findall(r"^- .*(?:\n  .*)*", PAGE, re.MULTILINE)
    assert len(bullets) > 20
    said = [*bullets, *(" ".join(row) for row in rows(section("Who is trusted")))]
    assert not [line for line in said if not TEST.search(line)]


def test_the_keys_on_the_page_are_those_of_the_code():
    listed: dict[str, str] = {}
    for keys, said in rows(section("What a config file may set of Hydra's keys")):
        listed |= dict.fromkeys(re.findall(r"`hydra\.([^`]+)`", keys), said)
    assert listed == {key: kind.said for key, kind in ALLOWED.items()}


def test_the_flags_and_the_variables_too():
    flags = next(line for line in PAGE.split("\n- ") if line.startswith("Flags"))
    assert re.findall(r"`(-[\w-]+)`", flags) == list(FLAGS)
    read = next(line for line in PAGE.split("\n- ") if line.startswith("An interpolation"))
    names = set(re.findall(r"`([\w.]+)`", read))
    assert names == {*RESOLVERS, *VARIABLES}
