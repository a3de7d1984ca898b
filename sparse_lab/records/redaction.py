"""API keys and passwords stay in the environment: they reach no config, record, status, error or console line.

What counts as a secret is the value of every environment variable whose name says so, and what is written as one:
NAME_API_KEY=VALUE, https://user:password@host, a header that authorizes, a private key, a token with the mark of its
issuer.
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
WORDS = (
    r"API_?KEY|ACCESS_?KEY|SECRET|TOKEN(?!IZ)|PASSWORD|PASSWD|PASSWRD|PASSPHRASE|PASSCODE|SSHPASS|CREDENTIALS?|"
    r"CONN(?:ECTION)?_?STR(?:ING)?|WEBHOOK"
)
# the last word of a name, which is part of many an ordinary one
ENDS = r"KEYS?|PASS|PW|PWD|PSWD|PAT|DSN|JWT|COOKIE|AUTH(?:_CONFIG)?"
SECRET_NAME = re.compile(rf"{WORDS}|(?:^|_)(?:{ENDS})$|(?:^|_)KEY_", re.IGNORECASE)
ORDINARY_NAME = re.compile(
    r"^(?:OLD)?PWD$|_(?:PATH|DIR|FILE|SOCK|(?<!WEBHOOK_)URL|NAME|TYPE|LEN(?:GTH)?)$", re.IGNORECASE
)
COUNTED = re.compile(r"TOKENS$", re.IGNORECASE)  # how many, where the value is a number
# no issuer makes such keys, and a password that is a word cannot be told from the word
ORDINARY_WORD = re.compile(r"[a-z_-]{1,15}|[A-Z_-]{1,15}|[A-Z][a-z]{1,14}")
ASSIGNED = re.compile(
    rf"\b((?=[A-Z])[A-Z0-9_]*(?:{WORDS})[A-Z0-9_]*|[A-Z][A-Z0-9_]*_(?:PASS|PW|PWD|PAT|DSN|JWT)|"
    r"(?i:api_?key|password|passwd|access_token|client_secret)|"
    # Azure's and AWS' own, in connection strings and signed addresses
    r"AccountKey|SharedAccessKey|SharedAccessSignature|X-Amz-(?:Signature|Security-Token)|(?<=[?&;])(?:sig|signature|token|key))"
    r"=([^\s&'\",)\]}]{4,})"
)
IN_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)(?:[^\s/:@'\"]*:[^\s/@'\"]+|[^\s/:@'\"]{20,})@")
# as HTTP's headers carry them, also in a dict's or JSON's spelling
HEADER = re.compile(
    r"(?i)\b((?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token|digest|negotiate)\s+)?|"
    r"(?:x-)?api-key['\"]?\s*:\s*['\"]?|(?:x-auth|private|x-amz-security)-token['\"]?\s*:\s*['\"]?|"
    r"\bbearer\s+(?=[\w.~+/-]*\d)|\bbasic\s+(?=[A-Za-z+/]*[0-9=]))([\w.~+/-]{16,}=*)"
)
MARKED = re.compile(
    r"(?:-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|\Z)|"
    r"\beyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*|"  # a JSON Web Token
    r"https://hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/[\w/+-]+|"
    r"https://(?:\w+\.)?discord(?:app)?\.com/api/webhooks/\d+/[\w-]+|https://[\w.-]+\.webhook\.office\.com/[^\s'\"]+|"
    r"https://chat\.googleapis\.com/v1/spaces/[^\s'\"]*[?&]key=[^\s'\"]+|"
    r"\b(?:sk-[\w-]{16,}|[sr]k_(?:live|test)_\w{16,}|hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|"
    r"A[KS]IA[0-9A-Z]{16}\b|xox[abeprs][.-][\w.-]{10,}|xapp-[\w-]{10,}|gl(?:pat|dt|rt|ptt|cbt|soat)-[\w-]{16,}|"
    r"AIza[\w-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}|npm_\w{36}|pypi-[\w-]{50,}|do[por]_v1_[0-9a-f]{64}|"
    r"SG\.[\w-]{16,}\.[\w-]{16,}|hv[sbr]\.[\w-]{24,}|dapi[0-9a-f]{32}|nvapi-[\w-]{20,}|r8_\w{30,}|gsk_\w{40,}|"
    r"wandb_v1_\w{20,}|dckr_pat_[\w-]{20,}|shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}|tskey-[\w-]{16,}|ATATT3[\w=-]{20,}|"
    r"AGE-SECRET-KEY-1[0-9A-Z]{50,}|NRAK-[A-Z0-9]{27}|lin_api_\w{32,}|pul-[0-9a-f]{40}|\d{8,10}:AA[\w-]{33}))",
    re.DOTALL,
)


def values() -> dict[str, str]:
    """Secret value -> the name of the environment variable that holds it, the longest values first."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if is_secret(name, value):
            found.setdefault(value, name)
    return {value: found[value] for value in sorted(found, key=len, reverse=True)}


def is_secret(name: str, value: str) -> bool:
    if not SECRET_NAME.search(name) or _ordinary(name, value):
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
    text = MARKED.sub(REDACTED, text)
    text = ASSIGNED.sub(lambda match: match[0] if _ordinary(*match.groups()) else f"{match[1]}={REDACTED}", text)
    return HEADER.sub(rf"\1{REDACTED}", text)


def _ordinary(name: str, value: str) -> bool:
    counted = COUNTED.search(name) is not None and value.isdigit()
    return counted or ORDINARY_NAME.search(name) is not None or value.startswith(REDACTED[:-1])


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
        (HEADER, lambda match: "what looks like an authorization header"),
    ]
    for pattern, words in looks:
        for match in pattern.finditer(text):
            if pattern is not ASSIGNED or not _ordinary(*match.groups()):
                return words(match)
    return None
