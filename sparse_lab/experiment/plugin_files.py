"""Which files a plugin consists of, and their content as one hash: the same in every process."""

from __future__ import annotations

import ast
import hashlib
import site
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from sparse_lab.config import choice_files
from sparse_lab.host.regular_file import MIB, read_bytes

MOST = 64 * MIB  # of a file of code or of choices
SUFFIXES = (".py", ".yaml")  # of a package's files that count


def content_hash(file: Path, module: str, choices: Iterable[Path]) -> str:
    """Return the SHA-256 of a plugin's content: sorted names and contents of its files, and of its folders of choices.

    A package is all of its .py and .yaml files; a single file is that file and what it imports, and what these import,
    of the files below its own folder (of module a.b: below the folder of a).

    file: of the plugin, links followed. module: the name that it was imported by.
    """
    package = file.name == "__init__.py"
    home = file.parent if package else file.parents[max(0, module.count(".") - 1)]
    whole = sorted(home.rglob("*")) if package else _with_imported(file, home, "." in module)
    files = {path.relative_to(home).as_posix(): path for path in whole if path.suffix in SUFFIXES and path.is_file()}
    for number, folder in enumerate(choices):
        files |= {f"choices {number}: {path.relative_to(folder).as_posix()}": path for path in choice_files(folder)}
    digest = hashlib.sha256()
    for name in sorted(files):
        content = read_bytes(files[name], MOST)
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


def _with_imported(file: Path, home: Path, packaged: bool) -> list[Path]:
    """packaged: `home` is a package's folder, so that names begin with its own."""
    above = [folder / "__init__.py" for folder in file.parents if folder.is_relative_to(home)] if packaged else []
    found = [file, *above]
    for path in found:  # grows as it goes
        named = _imported(path, home.parent if packaged else home) if path.is_file() else ()
        for near in named:
            if near not in found and near.is_relative_to(home) and not _is_installed(near, home):
                found.append(near)
    return found


def _imported(path: Path, top: Path) -> Iterator[Path]:
    """The files that the import statements of one name, those within functions too. top: where whole names begin."""
    try:
        nodes = list(ast.walk(ast.parse(read_bytes(path, MOST))))
    except SyntaxError:  # of a file that nothing has imported yet
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            for one in node.names:
                yield from _of_name(top, one.name)
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else top
            for one in node.names:
                yield from _of_name(folder, ".".join(word for word in (node.module, one.name) if word))


def _of_name(folder: Path, name: str) -> Iterator[Path]:
    """What importing a dotted name reads in a folder: packages' __init__.py on the way, and the module."""
    for word in name.split("."):
        for path in (folder / f"{word}.py", folder / word / "__init__.py"):
            if path.is_file():
                yield path.resolve()
        folder = folder / word


def _is_installed(path: Path, home: Path) -> bool:
    """Does it lie where packages are installed, below a plugin's home? Such a package is none of its files."""
    return any(path.is_relative_to(folder) for folder in _installed() if folder.is_relative_to(home))


@cache
def _installed() -> frozenset[Path]:
    paths, ours = sysconfig.get_paths(), Path(__file__).parents[1]
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders: list[str | Path] = [*found, *site.getsitepackages(), site.getusersitepackages(), ours]
    return frozenset(Path(folder).resolve() for folder in (*folders, ours.parent / "hydra_plugins"))
