"""No line of the package unpickles, evaluates or hands anything to a shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("sparse_lab", "scripts") for path in (TOP / folder).rglob("*.py"))
# the one reader of pickles, which answers a handful of names with stand-ins
READER = TOP / "sparse_lab" / "data" / "unpickle.py"
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load"),
    *("dill.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "torch.hub.load", "torch.jit.load"),
    *("torch.package.PackageImporter", "pandas.read_pickle", "numpy.fromregex", "pickle._Unpickler"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execvp", "os.spawnlp"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive", "tempfile.mktemp"),
    *("hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_class", "hydra.utils.get_method"),
}
WITH = {  # call -> the keyword that it needs, and the only value that will do
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "torch.hub.load_state_dict_from_url": ("weights_only", True),
}
LAST = {  # the same for methods, whatever they are called on
    "get_state_dict": ("weights_only", True),
}
NEVER = {"extractall", "extract"}  # of archives: data/files.py's `unpack` does it, on every Python


def faults(source: str) -> list[str]:
    """Line and name of everything that must not be there."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                one.asname or one.name.split(".")[0]: one.name if one.asname else one.name.split(".")[0]
                for one in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            continue  # a name given, as that of a field, not the function of that name
        name = full_name(node, names)
        if name in FORBIDDEN and not (name == "pickle.Unpickler" and isinstance(node, ast.Name)):
            found.append(f"{node.lineno}: {name}")  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            found += call_faults(node, full_name(node.func, names) or "")
    return found


def full_name(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        above = full_name(node.value, names)
        return above and f"{above}.{node.attr}"
    return None


def call_faults(node: ast.Call, name: str) -> list[str]:
    given = {word.arg: word.value for word in node.keywords}
    last = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    found = []
    needed = WITH.get(name) or LAST.get(last)
    if needed is not None:
        value = given.get(needed[0])
        if getattr(value, "value", None) is not needed[1]:
            found.append(f"{node.lineno}: {name or last} without {needed[0]}")
    if last in NEVER:
        found.append(f"{node.lineno}: {last}")
    shell = given.get("shell")
    if shell is not None and getattr(shell, "value", None) is not False:
        found.append(f"{node.lineno}: shell")
    if "allow_pickle" in given and getattr(given["allow_pickle"], "value", None) is not False:
        found.append(f"{node.lineno}: allow_pickle")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TOP).as_posix())
def test_nothing_in_it_could_run_what_a_file_says(path):
    found = faults(path.read_text(encoding="utf-8"))
    if path == READER:
        found = [one for one in found if not one.endswith(": pickle.Unpickler")]
    assert not found


def test_all_of_the_package_is_looked_at():
    assert len(FILES) > 80 and READER in FILES


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=careful)",
        "from torch import load as read; read(path)",
        "import pickle; pickle.load(file)",
        "from pickle import loads; loads(b'')",
        "import pickle as p; p.Unpickler(file).load()",
        "import numpy as np; np.load(path)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import yaml; yaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml; yaml.unsafe_load(text)",
        "eval('1')",
        "exec(text)",
        "import os; os.system('ls')",
        "import subprocess; subprocess.run('ls', shell=True)",
        "import subprocess as s; s.Popen(line, shell=asked)",
        "import joblib; joblib.load(path)",
        "import tarfile; tarfile.open(path).extractall(folder)",
        "tar.extractall(folder, filter='data')",
        "tar.extract(member, folder)",
        "weights.get_state_dict(progress=True)",
        "from hydra.utils import instantiate; instantiate(config)",
        "reader = pickle.loads\nimport pickle",
    ],
)
def test_the_scan_finds(line):
    assert faults(line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path, weights_only=True)",
        "import numpy as np; np.load(path, allow_pickle=False)",
        "import re; re.compile('x')",
        "import subprocess; subprocess.run(['ls'])",
        "model.eval()",
    ],
)
def test_the_scan_lets_through(line):
    assert not faults(line)
