"""Compile the numba kernels once, before the tests start: several processes at a time, each kernel in one of them.

    python tests/compile_kernels.py            forget what is out of date, compile what is missing
    python tests/compile_kernels.py --forget   only the first

numba knows a cached kernel by its own file's date. It does not see that `simd` or `layout_kernels` have changed, whose
code and constants are compiled in; here a kernel is forgotten when any of them has. Nor does it lock its index
(`sparse_cpu/kernel`): here kernels are shared out by file. With nothing to do this returns before numba is imported.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[1]
SOURCES = TOP / "sparse_lab" / "sparse_cpu"
# which files are compiled by one process: about the same work each, the most first
SHARES = (
    ("conv_kernels",),
    ("norm_kernels",),
    ("dyrelu_kernels", "image_kernels", "border_kernels"),
    ("op_kernels", "optimizer_kernels", "layout_kernels", "weight_kernels", "statistics_kernels"),
    ("inference_kernels",),
)
MODULES = tuple(module for share in SHARES for module in share)
# What Python calls, by the types that it calls it with. Arrays: M a map, A of the network's own type, D float64,
# F float32, I int64, J int32, U uint8, B bool, each with its number of dimensions. N: a number of the network's type;
# d: float64; i: int; b: bool; 3i: a tuple of three; (..): a tuple of what stands in it. Maps are of the network's type,
# or bfloat16 where that is float32.
AFFINE = "(A1 A1 A1 N N)"
CALLS: dict[str, dict[str, str]] = {
    "conv_kernels": {
        "rows": "M1 M1 10i I1 i I1 I1 A1 A1 b D1 D1",
        "rows_weight": "M1 M1 10i I1 i I1 I1 D2",
        "rows_weight_sliced": "M1 M1 10i I1 i I1 I1 D2",
        "taps": "M1 M1 10i I1 2i 2i 2i I1 I1 I1 I1 A1 A1 D1 D1",
        "taps_input": "M1 M1 10i I1 2i 2i 2i I1 I1 I1 I1 A1 b",
        "taps_weight": "M1 M1 10i I1 2i 2i 2i I1 I1 I1 I1 D2",
        "channel_sums": "M1 i i i i i i I1 D2",
        "moments": "M1 i i i i i D1 D1",
    },
    "norm_kernels": {
        "norm": f"M1 M1 M1 6i I1 {AFFINE}",
        "norm_sums": f"M1 M1 M1 6i I1 {AFFINE} i D2",
        "norm_input": f"M1 M1 6i I1 {AFFINE} b A1 A1",
        "norm_input_over": f"M1 M1 6i I1 {AFFINE} A1 A1",
        "norm_pool": f"M1 M1 i 6i I1 {AFFINE}",
        "norm_pool_sums": f"M1 M1 i 6i I1 {AFFINE} D2",
        "norm_pool_input": f"M1 M1 i 6i I1 {AFFINE} A1 A1",
        "add": "M1 M1",
        "layer_norm": "M1 M1 6i A1 A1 N A1 A1",
        "layer_norm_input": "M1 M1 6i A1 A1 A1 A1 D3",
    },
    "op_kernels": {
        "max_pool": "M1 M1 U1 9i 2i 2i 2i I1",
        "max_pool_input": "M1 M1 U1 9i 2i 2i 2i I1 b",
        "gate": "M1 M1 M1 i i i i i i i",
        "gate_input": "M1 M1 M1 M1 i i i i i i i",
    },
    "border_kernels": {
        "border": "M1 6i I1 B1 (I1 I1 B2 B2) I1 I1 I1 I1 A1 A1 A3 D1 D1",
        "border_weight": "M1 6i I1 B1 D3 (I1 I1 B2 B2) I1 I1 I1 I1 A3 D2 D3",
        "border_input": "D3 I1 A1 D3",
    },
    "dyrelu_kernels": {
        "dynamic_relu": "M1 M1 M1 6i I1 A1 A1 A3 A4 A3 D3",
        "dynamic_relu_input": "M1 M1 M1 6i I1 A1 A1 A3 A4 D3 D3 D3 A4",
    },
    "image_kernels": {
        "spread": "M1 6i I1 A3 b",
        "away": "M1 6i I1 A1 D3",
        "totals": "M1 6i I1 D3",
        "products": "M1 M1 6i I1 A1 D3 D3",
        "through": "M1 M1 6i I1 B1 A1 A1 A1 A3 b",
    },
    "optimizer_kernels": {
        "sgd": "A1 I1 A1 N N",
        "sgd_momentum": "A1 A1 I1 A1 N N N b b",
        "adam": "A1 A1 A1 I1 A1 N N N N N N N N",
    },
    "layout_kernels": {"pack": "A1 M1 i i i i i i", "unpack": "M1 A1 i i i i i i", "fill": "M1 i i i i i i I1 A1"},
    "weight_kernels": {"buckets": "I1 i"},
    "statistics_kernels": {
        "merged": "D1 D1 i D1 D1",
        "follow": "A1 A1 D1 D1 i d",
        "affine": "D1 D1 A1 A1 d D1 A2",
        "constants": "A1 A1 A1 A1 N N A1",
        "planes": "D2 D2",
        "through": "D1 D1 A1 D1 d A2",
        "summed": "D2 I1 D1",
        "beyond": "B1 B1",
        "add_where": "D3 B1 D3",
        "numbers": "I1 A1 B1 A3 A3",
    },
    "inference_kernels": {
        "run_blocks": "F4 F4 F2 F2 i 7i 3i I2 I1 J1 F1 F1",
        "run_layers": "F4 F4 F2 F2 i 7i 3i I2 I1 J1 F1 F1 I2 i",
    },
}


def main(arguments: list[str]) -> None:
    cache = Path(os.environ.get("NUMBA_CACHE_DIR") or SOURCES / "__pycache__")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "kernels.lock").open("w") as lock:  # two sessions may begin at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamps = {module: stamp(module) for module in MODULES}
        stamp_file = cache / f"kernels-{sys.implementation.cache_tag}.json"
        compiled = json.loads(stamp_file.read_text()) if stamp_file.is_file() else {}
        stale = [module for module in MODULES if compiled.get(module) != stamps[module]]
        for module in stale:
            forget(cache, module)
            compiled.pop(module, None)
        stamp_file.write_text(json.dumps(compiled))
        if stale and "--forget" not in arguments:
            compile_all(stale)
            stamp_file.write_text(json.dumps(compiled | {module: stamps[module] for module in stale}))


def stamp(module: str) -> str:
    """Changes with anything that a kernel of this file is made from: sources, versions, this list, the processor."""
    told = hashlib.sha256(repr((CALLS[module], processor(), platform.python_version())).encode())
    for package in ("numba", "llvmlite", "numpy"):
        told.update(metadata.version(package).encode())
    for source in sorted(sources(module)):
        told.update((SOURCES / f"{source}.py").read_bytes())
    return told.hexdigest()


def sources(module: str) -> set[str]:
    """The module, and the files of this folder that it takes code or constants from, by whatever way."""
    found, ahead = set(), {module}
    while ahead:
        one = ahead.pop()
        found.add(one)
        for node in ast.walk(ast.parse((SOURCES / f"{one}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparse_lab.sparse_cpu."):
                ahead.add(str(node.module).rpartition(".")[2])
        ahead -= found
    return found


def processor() -> str:
    """What numba compiles for: a cache that is carried to another machine is of no use there."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def forget(cache: Path, module: str) -> None:
    for kind in ("nbi", "nbc"):
        for path in cache.rglob(f"{module}.*.{kind}"):
            path.unlink(missing_ok=True)


def compile_all(modules: list[str]) -> None:
    """Several processes, as many at a time as this one may use cores. Raises SystemExit where one of them fails."""
    ahead = [wanted for share in SHARES if (wanted := [module for module in share if module in modules])]
    running: list[subprocess.Popen[bytes]] = []
    cores, failed = len(os.sched_getaffinity(0)), False
    while ahead or running:
        while ahead and len(running) < cores:
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import compile_kernels as c"
            running.append(
                subprocess.Popen([sys.executable, "-c", f"{code}; c.compile_here({ahead.pop(0)!r})"], cwd=TOP)
            )
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        for process in [one for one in running if one.poll() is not None]:
            running.remove(process)
            failed |= process.returncode != 0
    if failed:
        raise SystemExit("a kernel does not compile")


def compile_here(modules: list[str]) -> None:
    from numba.core.errors import NumbaWarning

    from sparse_lab.sparse_cpu.kernel import COMPILES

    os.environ[COMPILES] = "1"
    warnings.simplefilter("error", NumbaWarning)  # a kernel that cannot be kept is one
    for name in modules:
        module = importlib.import_module(f"sparse_lab.sparse_cpu.{name}")
        for kernel, signature in signatures(name):
            getattr(module, kernel).compile(signature)


def signatures(name: str) -> list[tuple[str, tuple[Any, ...]]]:
    """(kernel, types) for every kernel of a module, in all precisions that it has."""
    from numba import types

    from sparse_lab.sparse_cpu.storage import bfloat16

    found = []
    for kernel, words in CALLS[name].items():
        for number, stored in (
            (types.float32, types.float32),
            (types.float64, types.float64),
            (types.float32, bfloat16),
        ):
            signature = read(words, number, stored)
            if (kernel, signature) not in found:
                found.append((kernel, signature))
    return found


def read(words: str, number: Any, stored: Any) -> tuple[Any, ...]:
    """The types that a line of `CALLS` names."""
    from numba import types

    scalars = {"N": number, "d": types.float64, "i": types.int64, "b": types.boolean}
    items = {
        "A": number,
        "M": stored,
        "D": types.float64,
        "F": types.float32,
        "I": types.int64,
        "J": types.int32,
        "U": types.uint8,
        "B": types.boolean,
    }
    stack: list[list[Any]] = [[]]
    for word in words.replace("(", "( ").replace(")", " )").split():
        if word == "(":
            stack.append([])
        elif word == ")":
            stack[-2].append(types.Tuple(stack.pop()))
        elif word[0] in items:
            stack[-1].append(types.Array(items[word[0]], int(word[1:]), "C"))
        elif word[:-1]:
            stack[-1].append(types.UniTuple(scalars[word[-1]], int(word[:-1])))
        else:
            stack[-1].append(scalars[word])
    return tuple(stack[0])


if __name__ == "__main__":
    main(sys.argv[1:])
