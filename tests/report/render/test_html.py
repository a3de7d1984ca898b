from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparse_lab.report import write
from sparse_lab.report.render import html

Make = Callable[..., Path]
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Tags, attributes and text as a browser would see them; fails on a tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_holds_the_tables_and_every_key_to_sort_by(make_run: Make, tmp_path: Path) -> None:
    for seed, accuracy in ((1, 91.2), (2, 90.7)):
        make_run(seed=seed, accuracy=accuracy)
    make_run(method="dense", sparsity=0.0, accuracy=94.0)
    text = write([tmp_path], tmp_path / "out").page.read_text()
    page = Page(text)
    assert "90.95 ± 0.35" in text and "[91.03 ± 0.17] -0.08 ≈" in text
    heads = [head.get("data-kind") for head in page.all("th") if "scope" in head]
    assert heads.count("number") >= 6
    keys = [cell["data-key"] for cell in page.all("td") if "data-key" in cell]
    assert "90.95" in keys and "0.99" in keys and "" in keys and not any("," in str(key) for key in keys)
    rows = [row for row in page.all("tr") if "data-method" in row]
    assert [(row["data-model"], row["data-method"]) for row in rows] == [("vgg16", "dense"), ("vgg16", "oneshot")]
    assert [choice["name"] for choice in page.all("select")] == ["model", "dataset", "method"]


def test_nothing_from_a_record_becomes_a_tag_an_attribute_or_a_script(
    make_evil: Callable[[], Path], tmp_path: Path
) -> None:
    written = write([make_evil()], tmp_path / "out")
    text = written.page.read_text()
    page = Page(text)
    assert text.count("alert(1)") > 10, "the page should say what the records hold"
    assert len(re.findall(r"<script\b", text)) == len(page.all("script")) == 1
    assert text.count("</script") == 1 and text.count("<style") == text.count("</style") == 1
    assert "alert" not in "".join(page.texts["script"]) + "".join(page.texts["style"])
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    allowed = {"href", "src", "content", "id", "class", "title", "alt", "name", "type", "scope", "tabindex", "role"}
    allowed |= {
        "lang",
        "charset",
        "http-equiv",
        "rel",
        "width",
        "height",
        "hidden",
        "placeholder",
        "autocomplete",
        "value",
    }
    seen = {name for _, attributes in page.tags for name in attributes}
    assert {name for name in seen if not name.startswith(("data-", "aria-"))} <= allowed
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))
    assert "<script>alert(1)</script>" in "".join(page.texts["td"]), "shown as text, unchanged"
    assert "49" not in "".join(page.texts["h2"])


def test_the_other_pages_escape_it_too(make_evil: Callable[[], Path], tmp_path: Path) -> None:
    text = write([make_evil()], tmp_path / "out").report.read_text()
    assert text.count("alert(1)") > 10
    assert not re.search(r"(?<!\\)<(script|img|style)", text)


def test_nothing_is_loaded_and_only_this_style_and_script_run(make_run: Make, tmp_path: Path) -> None:
    make_run()
    text = write([tmp_path], tmp_path / "out").page.read_text()
    page = Page(text)
    [policy] = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy and "http" not in policy
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    # The policy stands before anything that it should hold back.
    assert text.index("Content-Security-Policy") < min(
        text.index(tag) for tag in ("<link", "<style", "<script", "<img")
    )
    loads = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(str(value).startswith(("data:", "#")) for value in loads)
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_template_never_turns_escaping_off() -> None:
    folder = Path(html.__file__).with_name("page")
    template = (folder / "report.html.jinja").read_text()
    assert not re.search(r"\|\s*safe|{%-?\s*autoescape|Markup", template)
    assert not re.search(r"""=\{\{|='""", template), "attributes stand in double quotes"


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_failures_stand_in_the_page_with_their_line_and_state(
    make_run: Make, make_status: Make, tmp_path: Path, state: str
) -> None:
    make_run()
    make_status("lost", state=state, error="CUDA out of memory")
    page = Page(write([tmp_path], tmp_path / "out").page.read_text())
    assert {"lost", state, "3/9", "CUDA out of memory"} <= set(page.texts["td"])
    assert "failures" in {section.get("id") for section in page.all("section")}


def test_a_page_of_no_result_has_no_empty_sections(make_status: Make, tmp_path: Path) -> None:
    make_status("lost", state="failed", error="no memory")
    page = Page(write([tmp_path], tmp_path / "out").page.read_text())
    assert [section["id"] for section in page.all("section")] == ["failures"]
    assert not page.all("img") and not page.all("form")
