"""API keys and passwords stay in the environment: they reach no config, record, status, error or console line.

What counts as a secret is the value of every environment variable whose name says so, and what is written as one:
NAME_API_KEY=VALUE, https://user:password@host, a token with the mark of its issuer.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

T = TypeVar("T")

REDACTED = "[redacted]"
SHORTEST = 8  # shorter values are found in ordinary text by chance
WORDS = r"API_?KEY|ACCESS_?KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?"
SECRET_NAME = re.compile(rf"{WORDS}|(?:^|_)(?:KEYS?|PASS|PWD|AUTH|PAT|DSN)$|(?:^|_)KEY_", re.IGNORECASE)
ORDINARY_NAME = re.compile(
    r"^(?:OLD)?PWD$|^TOKENIZERS_|_(?:PATH|DIR|FILE|SOCK|URL|NAME|TYPE|LEN(?:GTH)?)$", re.IGNORECASE
)
# no issuer makes such keys, and a password that is a word cannot be told from the word
ORDINARY_WORD = re.compile(r"[a-z_-]{1,15}|[A-Z_-]{1,15}|[A-Z][a-z]{1,14}")
ASSIGNED = re.compile(
    rf"\b([A-Z][A-Z0-9_]*(?:{WORDS})[A-Z0-9_]*|(?i:api_?key|password|passwd|access_token))=([^\s&'\",)\]}}]{{4,}})"
)
IN_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)(?:[^\s/:@'\"]*:[^\s/@'\"]+|[^\s/:@'\"]{20,})@")
MARKED = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|"
    r"glpat-[\w-]{16,})"
)


def values() -> dict[str, str]:
    """Secret value -> the name of the environment variable that holds it, the longest values first."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if is_secret(name, value):
            found.setdefault(value, name)
    return {value: found[value] for value in sorted(found, key=len, reverse=True)}


def is_secret(name: str, value: str) -> bool:
    if not SECRET_NAME.search(name) or ORDINARY_NAME.search(name):
        return False
    if len(value) < SHORTEST or ORDINARY_WORD.fullmatch(value):
        return False
    return not (value.startswith(("/", "~", "./")) and os.path.exists(os.path.expanduser(value)))  # a file's name


def redact(text: str) -> str:
    """`text` without secrets, in whatever way they are escaped there."""
    return _without(text, secret_forms())


def secret_forms() -> dict[str, str]:
    """Every form of every secret, the longest secrets first -> the environment variable."""
    return {form: name for value, name in values().items() for form in _forms(value)}


def _without(text: str, forms: Iterable[str]) -> str:
    for form in forms:
        text = text.replace(form, REDACTED)
    text = IN_URL.sub(rf"\1{REDACTED}@", text)
    text = ASSIGNED.sub(rf"\1={REDACTED}", text)
    return MARKED.sub(REDACTED, text)


def _forms(value: str) -> list[str]:
    """A value as it stands in plain text, JSON, Python, HTML, a URL or a shell's line; the longest first."""
    forms = {
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        html.escape(value),
        quote(value),
        quote(value, safe=""),
        quote_plus(value),
        shlex.quote(value).strip("'"),
        *(line for line in value.splitlines() if len(line) >= SHORTEST),
    }
    return sorted(forms, key=len, reverse=True)


def clean(plain: T) -> T:
    """A record of plain values with every text in it redacted. Keys and numbers stay."""
    return _clean(plain, secret_forms())


def _clean(plain: Any, forms: Iterable[str]) -> Any:
    if isinstance(plain, str):
        return _without(plain, forms)
    if isinstance(plain, dict):
        return {key: _clean(value, forms) for key, value in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [_clean(value, forms) for value in plain]
    return plain


def secret_in(text: str, forms: dict[str, str]) -> str | None:
    """What secret `text` holds, in words that do not tell it."""
    for form, name in forms.items():
        if form in text:
            return f"the value of {name}"
    looks: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = [
        (IN_URL, lambda match: "the password in a URL"),
        (ASSIGNED, lambda match: f"a value for {match[1]}"),
        (MARKED, lambda match: "what looks like an API key"),
    ]
    for pattern, words in looks:
        if match := pattern.search(text):
            return words(match)
    return None
