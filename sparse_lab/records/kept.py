"""The finished runs of a table in one file, `records.jsonl`: a line holds all of a run's folder but its networks.

A line is a JSON object: name, result, status and config as their files hold them, traces (how the run went) in columns,
and a checksum over all of it. No torch, and what only writing needs is imported there: reports read these files.
"""

from __future__ import annotations

import csv
import errno
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_lab.host.regular_file import GIB, MIB, opened, read_text
from sparse_lab.records.atomic_io import CHECKSUM, atomic_write, checksum, damaged
from sparse_lab.records.lock import Lock, remove_left_behind
from sparse_lab.records.record import BadRecord, read_result, read_status

FILE = "records.jsonl"
METRICS = "metrics"
LINES = ("updates", "activations", "gradients")  # NAME.jsonl in a run's folder, of runs that recorded it
MOST_BYTES, MOST_LINE = 4 * GIB, 64 * MIB  # a run has some KiB in a table, with diagnostics some MiB
MOST_METRICS, MOST_CONFIG = 256 * MIB, 40_000  # bytes of metrics.csv and of config.yaml, which has 3,000
_KEYS = {"name": str, "result": dict, "status": dict, "config": dict, "traces": dict}


@dataclass(frozen=True)
class Kept:
    """A finished run. `traces`: the rows of metrics.csv ('metrics') and of each file of `LINES` that was there.

    A cell of metrics.csv is a number where that is written as the cell was, to the last digit, and text otherwise.
    """

    name: str
    result: dict[str, Any]
    status: dict[str, Any]
    config: dict[str, Any]
    traces: dict[str, list[dict[str, Any]]]


def read_kept(folder: Path) -> tuple[list[Kept], list[str]]:
    """Return the records of folder/records.jsonl, none where there is no such file, and a warning for each line that
    cannot be read or is not what was written.
    """
    path, found, warnings = folder / FILE, [], []
    try:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                try:
                    found.append(_parsed(line))
                except (ValueError, RecursionError) as error:
                    warnings.append(f"{path}, line {number}: {' '.join(str(error).split())}; it is not counted")
    except FileNotFoundError:
        return [], [f"{path}: is a link to nothing; it is not counted"] if path.is_symlink() else []
    except OSError as error:
        warnings.append(f"{path}: cannot be read ({error.strerror}); what it holds is not counted")
    return found, warnings


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a table's file or of a run's, without their ends. Raises OSError where there is no such file, or one
    that nobody wrote a line at a time.
    """
    with opened(path, MOST_BYTES) as file:
        while line := file.readline(MOST_LINE + 1):
            if len(line) > MOST_LINE:
                raise OSError(errno.EINVAL, f"a line has more than {MOST_LINE:,} bytes", str(path))
            yield line.removesuffix(b"\n")


def keep_run(run: Path, folder: Path) -> None:
    """Add the finished run in the folder `run` to folder/records.jsonl, as `keep_runs` does.

    Raise ValueError where a file of the run is damaged, OSError where one is missing or the folder cannot be written.
    """
    _, refused = keep_runs([run], folder)
    for error in refused:
        raise error


def keep_runs(runs: Iterable[Path], folder: Path) -> tuple[list[str], list[ValueError | OSError]]:
    """Add finished runs, each in its folder, to folder/records.jsonl; return the names of those that were not there,
    and an error for each run that is damaged or lacks a file, and is not added.

    The folders that a run was told to use (paths.outputs, paths.data) become OUTPUTS and DATA: they name one machine.
    Nothing else is changed. Lines are sorted by name, so that the order of adding does not matter; one that cannot be
    read stays, before the others. Raise OSError where the folder cannot be written; the file is then as it was.
    """
    added, refused = list[str](), list[ValueError | OSError]()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        lines = _by_name(folder / FILE)
        for run in runs:
            name = (run if run.name else run.resolve()).name
            if name not in lines:
                try:
                    lines[name] = [_line(name, run)]
                    added.append(name)
                except OSError as error:  # which names no file where reading fails halfway
                    what = (error.errno or errno.EIO, error.strerror or str(error), error.filename or str(run))
                    refused.append(OSError(*what))
                except ValueError as error:
                    refused.append(error)
                except RecursionError as error:
                    refused.append(ValueError(f"{run} cannot be kept: {error}"))
        if added:
            with atomic_write(folder / FILE) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for name in sorted(lines) for line in lines[name]))
    return added, refused


def _parsed(line: bytes) -> Kept:
    """Raise ValueError for what `keep_runs` did not write."""
    try:
        plain = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    if not isinstance(plain, dict) or CHECKSUM not in plain:
        raise ValueError("cannot be read (a record with its checksum was expected)")
    if damaged(plain):
        raise ValueError("damaged, its checksum is wrong")
    del plain[CHECKSUM]
    if plain.keys() != _KEYS.keys() or not all(isinstance(plain[key], kind) for key, kind in _KEYS.items()):
        raise ValueError(f"cannot be read ({', '.join(_KEYS)} were expected)")
    traces = {name: _rows(columns) for name, columns in plain["traces"].items()}
    if not all(isinstance(row, dict) for rows in traces.values() for row in rows):
        raise ValueError("cannot be read (traces of rows were expected)")
    return Kept(**{**plain, "traces": traces})


def _by_name(path: Path) -> dict[str, list[bytes]]:
    """The lines of the file by the name of their record, those that cannot be read under ''. A line counts once."""
    found: dict[str, list[bytes]] = {}
    for line in _lines(path) if path.exists() else []:
        if line.strip():
            try:
                name = _parsed(line).name
            except (ValueError, RecursionError):
                name = ""
            if line not in found.setdefault(name, []):
                found[name].append(line)
    return found


def _line(name: str, run: Path) -> bytes:
    """The run's files as one line. Raise ValueError, OSError."""
    result, status = _read(read_result, run / "result.json"), _read(read_status, run / "status.json")
    traces = {METRICS: _metrics(run / "metrics.csv")}
    traces |= {kind: _json_lines(path) for kind in LINES if (path := run / f"{kind}.jsonl").exists()}
    config = _config(run / "config.yaml")
    record = {"name": name, "result": result, "status": status, "config": config, "traces": traces}
    neutral = _neutral(record, _own_folders(config))
    neutral["traces"] = {kind: _columns(rows) for kind, rows in neutral["traces"].items()}
    try:
        return json.dumps({**neutral, CHECKSUM: checksum(neutral)}, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f"{run} cannot be kept: {error}") from None


def _read(how: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    try:
        return how(path)
    except BadRecord as error:
        raise ValueError(f"{path}: {error}") from None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is damaged: line {number}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is damaged: a line of it holds no JSON object")
    return rows


def _metrics(path: Path) -> list[dict[str, Any]]:
    try:
        text = read_text(path, MOST_METRICS)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is damaged: a row of it has more or fewer cells than its head")
    return [{name: _cell(text) for name, text in row.items()} for row in rows]


def _cell(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            number: int | float = kind(text)
            if json.dumps(number, allow_nan=False) == text:
                return number
        except ValueError:
            continue
    return text


def _config(path: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = read_text(path, MOST_CONFIG)
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it holds aliases, which no run writes")
        plain = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    return {str(key): value for key, value in plain.items()}


def _own_folders(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The folders of one machine that stand in the config, the longest first, and what becomes of them."""
    paths = config.get("paths")
    named = [(paths.get("outputs"), "OUTPUTS"), (paths.get("data"), "DATA")] if isinstance(paths, dict) else []
    own = [(path, neutral) for path, neutral in named if isinstance(path, str) and Path(path).is_absolute()]
    return sorted(own, key=lambda pair: -len(pair[0]))


def _neutral(plain: Any, folders: list[tuple[str, str]]) -> Any:
    if isinstance(plain, str):
        for folder, neutral in folders:
            plain = plain.replace(folder, neutral)
        return plain
    if isinstance(plain, list):
        return [_neutral(value, folders) for value in plain]
    if isinstance(plain, dict):
        return {_neutral(str(key), folders): _neutral(value, folders) for key, value in plain.items()}
    return plain


def _columns(values: list[Any]) -> Any:
    """Rows with the same keys in the same order as {key: its values}, and that again within; anything else as it is."""
    first = values[0] if values else None
    if not isinstance(first, dict) or not first:
        return values
    if not all(isinstance(value, dict) and list(value) == list(first) for value in values):
        return values
    return {key: _columns([value[key] for value in values]) for key in first}


def _rows(columns: Any) -> list[Any]:
    """What `_columns` was given. Raise ValueError for columns that it does not make."""
    if isinstance(columns, list):
        return columns
    if not isinstance(columns, dict) or not columns:
        raise ValueError("cannot be read (columns of values were expected)")
    values = [_rows(column) for column in columns.values()]
    if len({len(column) for column in values}) > 1:
        raise ValueError("cannot be read (columns of one length were expected)")
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's file for this process; wait while another has it. The lock goes when its holder dies."""
    with Lock(folder, wait=lambda holder: None):
        remove_left_behind(folder)
        yield
