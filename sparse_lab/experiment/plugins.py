"""Code from outside that registers scores, algorithms, networks and more before anything is composed.

Who names it: `--plugin FILE_OR_MODULE` on the process's own command line, and installed packages by an entry point of
the group `sparse_lab.plugins`. Never a config file, and never an environment variable: a plugin may run anything.

A plugin is code and may change anything, so that all that are loaded count for every run's name, by their content.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from sparse_lab.config import CHOICES
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.experiment.plugin_files import MOST, content_hash
from sparse_lab.experiment.security.flags import PLUGIN as FLAG
from sparse_lab.host import regular_file
from sparse_lab.registering import REGISTERED, Registration, take_out

GROUP = "sparse_lab.plugins"
PREFIX = "sparse_lab_plugin_"  # before the name of a file's module: none is taken for another's, as json.py for json


@dataclass(frozen=True)
class Plugin:
    """A plugin that is loaded. name: its file's stem, or its module's dotted name. asked: as it was given. place: the
    file, whole, or the module, by which any process finds it. hash: of its content. distribution: what brought it
    along, "" where a person named it.
    """

    name: str
    asked: str
    place: str
    module: str
    hash: str
    registered: tuple[Registration, ...]
    choices: tuple[Path, ...] = ()
    distribution: str = ""


LOADED: dict[str, Plugin] = {}  # by place


def take(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what `--plugin X` and `--plugin=X` name, anywhere in a command line, and the line without them.

    Raise UserError for one without a value.
    """
    named: list[str] = []
    left: list[str] = []
    words = iter(argv)
    for word in words:
        if word != FLAG and not word.startswith(f"{FLAG}="):
            left.append(word)
            continue
        value = next(words, "") if word == FLAG else word.partition("=")[2]
        if not value or value.startswith("-"):
            raise UserError(f"{FLAG} needs a FILE or a MODULE behind it, as in {FLAG} my_method.py")
        named.append(value)
    return named, left


def start(argv: Sequence[str]) -> list[str]:
    """Load what installed packages bring and what the command line names, and return the line without that.

    Raise UserError for what cannot be loaded, in one line that names it and the cause.
    """
    named, left = take(argv)
    if named:  # they are kept in records with the rest of the line
        from sparse_lab.experiment.security.secrets import check_line

        check_line(named)
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        load(entry.value, distribution=entry.dist.name if entry.dist is not None else "?")
    for one in named:
        load(one)
    return left


def start_completing(line: str) -> str | None:
    """Load what a line names that a shell asks to complete, and return it without that; None where what is being typed
    is the name of a plugin itself.
    """
    words, typing = line.split(), not line.endswith(" ")
    try:
        named, left = take(words)
    except UserError:  # its value is to come
        return None
    if typing and words[-1:] != left[-1:]:
        return None
    for one in named:
        with suppress(UserError):
            load(one)
    return " ".join(left) + " " * (not typing)


def load(asked: str, distribution: str = "") -> Plugin:
    """Load a plugin, unless this process has: a .py file, a package's folder, or an importable module.

    Raise UserError where it cannot be loaded or registers nothing; then nothing of it stays registered.
    """
    said = f"plugin {asked}" if not distribution else f"the installed package {distribution}: its plugin {asked}"
    file = None if distribution else _file(asked)
    place = asked if file is None else str(file)
    if place in LOADED:
        return LOADED[place]
    name = asked if file is None else (file.parent.name if file.name == "__init__.py" else file.stem)
    module = name if file is None else _module_name(file, name)
    before, choices, known = len(REGISTERED), len(CHOICES), set(sys.modules)
    try:
        found = _import(module, file)
        if file is not None:
            _check_neighbours(module, file)
        if len(REGISTERED) == before:
            raise UserError("it registers nothing; see docs/add_a_method.md")
        brought = tuple(CHOICES[choices:])
        digest = content_hash(Path(str(found.__file__)).resolve(), name if file is None else "", brought)
    except (Exception, SystemExit) as error:  # a script's own end is none of the command's
        take_out(REGISTERED[before:])
        _drop(module, known)
        raise UserError(f"{said} cannot be loaded: {_cause(error, module, file)}") from None
    plugin = Plugin(name, asked, place, module, digest, tuple(REGISTERED[before:]), brought, distribution)
    LOADED[place] = plugin
    return plugin


def forget() -> None:
    """Take out all that plugins have registered: as if none had been loaded in this process."""
    for plugin in reversed(list(LOADED.values())):
        take_out(plugin.registered)
        _drop(plugin.module)
        sys.path[:] = [place for place in sys.path if place != str(Path(plugin.place).parent)]
    LOADED.clear()


def hashes() -> dict[str, str]:
    """Return the hash of each plugin's content by its name; several of one name are numbered, in whatever order they
    came.
    """
    found: dict[str, str] = {}
    for plugin in sorted(LOADED.values(), key=lambda one: (one.name, one.hash)):
        same = sum(name == plugin.name or name.startswith(f"{plugin.name} (") for name in found)
        found[f"{plugin.name} ({same + 1})" if same else plugin.name] = plugin.hash
    return found


def words(whole: bool = False) -> list[str]:
    """Return the words of a command line that load what a person named; whole: from whatever folder."""
    named = [plugin for plugin in LOADED.values() if not plugin.distribution]
    return [word for plugin in named for word in (FLAG, plugin.place if whole else plugin.asked)]


def _file(asked: str) -> Path | None:
    """The file that is named, links followed; None where a module is. Raises UserError."""
    path = Path(asked).expanduser()
    if not (asked.endswith(".py") or os.sep in asked or asked in (".", "..")):
        return None
    if path.is_dir() and (path / "__init__.py").is_file():
        path = path / "__init__.py"
    if path.is_dir():
        raise UserError(f"plugin {asked} is a folder without __init__.py: name a .py file in it")
    try:
        regular_file.check(path, MOST)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"plugin {asked}: {reason}") from None
    if path.suffix != ".py":
        raise UserError(f"plugin {asked} is no .py file")
    return path.resolve()


def _module_name(file: Path, name: str) -> str:
    """One that no other module has, and the same in every process."""
    place = hashlib.sha256(str(file).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return PREFIX + re.sub(r"\W", "_", name) + f"_{place}"


class _FromSource(SourceFileLoader):
    """Compiles what stands in the file now: a file that changes twice within a second is not told by its time."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _import(module: str, file: Path | None) -> ModuleType:
    """The plugin's module. A file's own folder is where it finds others: `from . import NAME`, or last of all NAME."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ in a user's folder
    try:
        if file is None:
            return importlib.import_module(module)
        if str(file.parent) not in sys.path and file.name != "__init__.py":
            sys.path.append(str(file.parent))
        spec = importlib.util.spec_from_file_location(
            module, file, loader=_FromSource(module, str(file)), submodule_search_locations=[str(file.parent)]
        )
        assert spec is not None and spec.loader is not None
        found = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found
    finally:
        sys.dont_write_bytecode = before


def _check_neighbours(module: str, file: Path) -> None:
    """Raise UserError where another plugin's module was taken for one beside this file."""
    others = {Path(one.place).parent for one in LOADED.values()} - {file.parent}
    for path in sorted(file.parent.glob("*.py")):
        found = getattr(sys.modules.get(path.stem), "__file__", None)
        if found and Path(found).resolve().parent in others and f"{module}.{path.stem}" not in sys.modules:
            raise UserError(
                f"its {path.name} and {found} have one name: write `from . import {path.stem}`, or rename one of them"
            )


def _drop(module: str, but: Container[str] = ()) -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{module}.") and name not in but]:
        del sys.modules[name]


def _cause(error: BaseException, module: str, file: Path | None) -> str:
    """What went wrong in one line, and where in the plugin."""
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
        return f"there is no module {error.name} here; a file is named with its end, as in {module}.py"
    if isinstance(error, UserError):
        return str(error)
    first = " ".join(str(error).split())
    named = "" if isinstance(error, SparseLabError) else type(error).__name__
    said = ": ".join(word for word in (named, first) if word)
    if isinstance(error, SyntaxError):
        return said  # names file and line itself
    walked, line = error.__traceback__, 0
    while walked is not None:
        if file is not None and walked.tb_frame.f_code.co_filename == str(file):
            line = walked.tb_lineno
        walked = walked.tb_next
    return f"{said} (line {line})" if line else said


@dataclass
class Handed:
    """What a process that runs jobs for the command gets of its plugins. It stands before all else that the process is
    handed: as soon as it is read there the plugins are loaded, for what comes behind it may hold their classes.

    places: of each plugin, with its hash and the package that brought it. said: what is wrong with them here.
    """

    places: tuple[tuple[str, str, str], ...]
    said: str = ""

    def __reduce__(self) -> tuple[object, ...]:
        return _received, (self.places,)

    def check(self) -> None:
        """Raise UserError where this process has not what the command has."""
        if self.said:
            raise UserError(self.said)


def handed() -> Handed:
    """Return what other processes load the plugins of this one by."""
    return Handed(tuple((plugin.place, plugin.hash, plugin.distribution) for plugin in LOADED.values()))


def _received(places: tuple[tuple[str, str, str], ...]) -> Handed:
    for place, expected, distribution in places:
        plugin = load(place, distribution)
        if plugin.hash != expected:
            return Handed(
                places,
                f"plugin {place} is not on {socket.gethostname()} what it was when the command began: start the same "
                "command again",
            )
    return Handed(places)
