"""docs/add_a_method.md is examples/own_method, whole and as it is."""

from __future__ import annotations

import re

import sparse_lab


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_the_page_shows_the_example_s_files(examples):
    own, page = examples / "own_method", (examples.parent / "docs" / "add_a_method.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert lines("\n".join(shown)) == lines((own / "plugin.py").read_text())
    files = {name: text for name, text in re.findall(r"`conf/(\S+)`:\n\n```yaml\n(.*?)```", page, re.DOTALL)}
    assert files.keys() == {path.relative_to(own / "conf").as_posix() for path in (own / "conf").rglob("*.yaml")}
    for name, text in files.items():
        assert text == (own / "conf" / name).read_text()


def test_the_page_names_every_function(examples):
    page = (examples.parent / "docs" / "add_a_method.md").read_text()
    offered = {name for name in sparse_lab.PUBLIC if name.startswith("register_")}
    assert set(re.findall(r"`(register_\w+)`", page.split("## What else")[1])) == offered
