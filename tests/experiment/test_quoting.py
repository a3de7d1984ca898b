"""What the command says to type for a value that its grammar does not have is what a shell must be given."""

from __future__ import annotations

import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sparse_lab.cli.main import main
from sparse_lab.experiment.quoting import in_shell, quoted
from sparse_lab.sweep.plan import Request

TEXTS = (
    *("ü", "a=b", "a,b", "[a", "[a]", "{a}", "{a:1}", "it's", 'a"b', "a#b", "a~b", "(a)", "a(b)", "a&b", "a;b"),
    *("a!b", "a`b", "a'\"b", "50%ü", "a<b>", "ü ü", "a\\ü", "x=\\", "日本", "a|ü", "a?=*"),
)


def said(word: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What stands behind the last colon of the line that refuses a word."""
    assert main([word]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert word.partition("=")[0] in line and "Exception" not in line and "expecting" not in line
    return line.rpartition(": ")[2].partition(", or with -m for several ")[0]


def through_a_shell(typed: str) -> list[str]:
    """The words that a real shell makes of what is typed."""
    done = subprocess.run(f"printf '%s\\0' {typed}", shell=True, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("text", TEXTS)
def test_what_it_says_to_type_is_what_a_shell_must_be_given(text, capsys):
    words = through_a_shell(said(f"paths.outputs={text}", capsys))
    assert len(words) == 1
    assert Request.read(words).compose([]).config().paths.outputs == text


def test_a_list_of_values_has_its_quoted_form_too(capsys):
    for key in ("paths.outputs", "model.weights"):
        assert main(["-m", f"{key}=ü,b,c=d"]) == 2
        typed = capsys.readouterr().err.strip().rpartition(" several ")[2]
        assert Request.read(["-m", *through_a_shell(typed)]).axes == {key: ["'ü'", "b", "'c=d'"]}


def test_a_home_folder_is_written_out(capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for text, meant in (("~/x", "/home/me/x"), ("~nobody-here", "./~nobody-here")):
        words = through_a_shell(said(f"paths.outputs={text}", capsys))
        assert Request.read(words).compose([]).config().paths.outputs == meant


def test_of_a_key_that_takes_no_text_its_kind_is_said(capsys):
    for word, kind in (
        ("seed=ü", "a whole number"),
        ("training.lr=0=1", "a number"),
        ("dataset.verify=(a)", "true or false"),
        ("training.milestones=[ü", "a list"),
        ("model.options={a=1}", "a mapping"),
    ):
        assert main([word]) == 2
        assert f"{word.partition('=')[0]} takes {kind}" in capsys.readouterr().err


def test_an_unknown_choice_or_key_is_the_nearer_fault(capsys):
    for word, line in (("method=ü", "unknown method 'ü'"), ("methd=ü", "did you mean 'method'?")):
        assert main([word]) == 2
        assert line in capsys.readouterr().err


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=12))
def test_any_text_comes_through_the_grammar_as_it_was(text):
    (override,) = OverridesParser.create().parse_overrides([f"key={quoted(text)}"])
    assert OmegaConf.create({"key": override.value()}).key == text


@settings(max_examples=20)
@given(st.text("ab'\"\\$,= []{}~#%!`", min_size=1, max_size=12))
def test_and_through_a_shell(text):
    assert through_a_shell(in_shell(text)) == [text]
