"""The one reader of records: JSON with a checksum, as `atomic_io.write_record` leaves it. No torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypeGuard

from sparse_lab.host.regular_file import MIB, read_text
from sparse_lab.records.atomic_io import CHECKSUM, damaged, printable

MOST_BYTES = 64 * MIB  # a result has some KiB, a sweep of 10,000 runs a plan of a few MiB
MOST_SMALL = MIB  # what is written again and again: a status, what came of a job
STATES = ("running", "done", "failed", "interrupted")  # of a run
ROUNDED = 1e-6  # to the sixth digit, as some records write shares
LONGEST_NAME = 255  # bytes, of a folder


class BadRecord(ValueError):
    """What is wrong with a record, in one line."""


def read_record(path: Path, *, sealed: bool = True, shown: bool = False, most: int = MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file, without its checksum.

    sealed: it must have a checksum. shown: its texts are for a terminal or a page, and made printable. most: bytes that
    it may have. Raise FileNotFoundError where there is no file, BadRecord where there is one that cannot be trusted.
    """
    try:
        text = read_text(path, most)
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("a JSON object was expected")
        check_seal(content, required=sealed)
        if shown and ("\\" in text or "\x7f" in text or not text.isascii()):
            content = printable(content)
    except FileNotFoundError:
        if path.is_symlink():
            raise BadRecord("is a link to nothing") from None
        raise
    except BadRecord:
        raise
    except OSError as error:
        raise BadRecord(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"cannot be read ({' '.join(str(error).split())})") from None
    content.pop(CHECKSUM, None)
    return content


def read_status(path: Path, *, shown: bool = False) -> dict[str, Any]:
    """Return a run's status, as `read_record`; BadRecord also where it says no state. It changes every epoch, has no
    checksum, and is believed in nothing else.
    """
    status = read_record(path, sealed=False, shown=shown, most=MOST_SMALL)
    if status.get("state") not in STATES:
        raise BadRecord(f"'state' is missing or none of {', '.join(STATES)}")
    return status


def check_seal(record: dict[str, Any], *, required: bool = True) -> None:
    """Raise BadRecord for a record whose checksum is not its own, or missing where it is `required`."""
    if damaged(record):
        raise BadRecord("damaged, its checksum is wrong")
    if required and CHECKSUM not in record:
        raise BadRecord("damaged, its checksum is gone")


def read_result(path: Path) -> dict[str, Any]:
    """Return a run's result, as `read_record`; BadRecord also where it does not say what every result says."""
    result = read_record(path)
    check_result(result)
    return result


def check_result(result: dict[str, Any]) -> None:
    """Raise BadRecord for a result that lacks what every one has, or says what no run says."""
    for name in ("name", "cell", "model", "dataset", "method"):
        if not isinstance(result.get(name), str) or not result[name]:
            raise BadRecord(f"{name!r} is missing or no text")
    if whole_number(result.get("seed")) is None:
        raise BadRecord("'seed' is missing or no whole number")
    if result["method"] != "dense" and not _within(result.get("sparsity_target"), 1):
        raise BadRecord("'sparsity_target' is missing or no share in 0..1")
    if not _within(result.get("test_accuracy"), 100):
        raise BadRecord("'test_accuracy' is missing or no percentage in 0..100")
    _check_weights(result)
    _check_figures(result, "")
    levels = result.get("levels")
    for number, level in enumerate(levels if isinstance(levels, list) else [], 1):
        _check_figures(level if isinstance(level, dict) else {}, f" of level {number}")
    if not is_number(result.get("seconds")) or result["seconds"] < 0:
        raise BadRecord("'seconds' is missing or no time")
    if not isinstance(result.get("config"), dict):
        raise BadRecord("'config' is missing or holds no settings")
    plugins = result.get("plugins", {})  # of a run from before there were any: none
    if not isinstance(plugins, dict) or not all(isinstance(one, str) for one in plugins.values()):
        raise BadRecord("'plugins' is no mapping of names to hashes")


def _check_weights(result: dict[str, Any]) -> None:
    kept, total = whole_number(result.get("kept")), whole_number(result.get("total"))
    if kept is None or total is None or not 0 <= kept <= total:
        raise BadRecord("'kept' and 'total' are missing or no numbers of weights")
    sparsity = result.get("sparsity")
    if sparsity is not None and total and not (_within(sparsity, 1) and abs(sparsity - (1 - kept / total)) <= ROUNDED):
        raise BadRecord("'sparsity' is not what 'kept' and 'total' make")


def _check_figures(record: dict[str, Any], of: str) -> None:
    """Figures that may be missing, or null where they were no number, and are nonsense outside their range."""
    for name, most in (("sparsity", 1), ("validation_accuracy", 100), ("test_accuracy", 100)):
        if (value := record.get(name)) is not None and not _within(value, most):
            raise BadRecord(f"{name!r}{of} is no number in 0..{most}")


def _within(value: object, most: int) -> TypeGuard[int | float]:
    return is_number(value) and 0 <= value <= most


def is_name(value: object) -> TypeGuard[str]:
    """True for what a folder may be called: records name runs, and their paths are made of it."""
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value or "\0" in value:
        return False
    return len(value.encode("utf-8", "replace")) <= LONGEST_NAME


def is_number(value: object) -> TypeGuard[int | float]:
    """True for a finite int or float; a bool is none."""
    # A whole number in JSON may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def whole_number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
