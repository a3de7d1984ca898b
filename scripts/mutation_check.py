"""Do the tests see small faults? Puts one at a time into a copy of this checkout and runs the tests there.

    python scripts/mutation_check.py                 the 12 faults of `make test`'s promise
    python scripts/mutation_check.py --all           all 30 (make test-nightly)
    python scripts/mutation_check.py --only cubic    those whose name holds a word; --list names them all

Each fault meets `make test`, with -x, the rooms that lie nearest first; what passes there meets `make test-all`. Exit
status: 0 when every fault was caught, and all but one of each dozen by `make test`; else 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
FULL = ["-m", "full or nightly", "--tenth"]


@dataclass(frozen=True)
class Fault:
    """`wrong` in the place of the one `right` in `file`. near: tests that are run first."""

    name: str
    file: str
    right: str
    wrong: str
    near: str


FAULTS = [
    # the first 12: without --all
    Fault(
        "a mask that is skipped when weights are zeroed", "sparsity/masks.py",
        "            torch._foreach_mul_(values, factors)", "            torch._foreach_mul_(values[1:], factors[1:])",
        "sparsity algorithms",
    ),
    Fault(
        "top-k keeps one too many among ties", "sparsity/topk.py",
        "picked[places[: k - above]] = True", "picked[places[: k - above + 1]] = True", "sparsity",
    ),
    Fault(
        "cubic schedule one change late", "sparsity/schedules.py",
        "(step - self.begin) % self.every == 0 or step == self.end",
        "(step - self.begin - 1) % self.every == 0 or step == self.end", "sparsity",
    ),
    Fault(
        "torch's generator is not restored", "training/checkpoint_io.py",
        '    torch.set_rng_state(state["torch"])\n', "", "training runs",
    ),
    Fault(
        "wrong sign in the sparse SGD", "sparse_cpu/optimizer_kernels.py",
        "weight[at] -= lr * (gradient[i] + decay * weight[at])",
        "weight[at] -= lr * (gradient[i] - decay * weight[at])", "sparse_cpu",
    ),
    Fault(
        "the clock ticks twice", "sparsity/clock.py",
        "        self.step_in_round += 1", "        self.step_in_round += 2", "training runs",
    ),
    Fault(
        "what regrows does not start at zero", "algorithms/regrow.py",
        "            fresh = torch.zeros_like(weight)", "            fresh = torch.full_like(weight, 1e-3)",
        "algorithms runs",
    ),
    Fault(
        "the optimizer keeps its state at a round's start", "sparsity/optimizer_state.py",
        "    optimizer.state.clear()", "    pass", "training runs",
    ),
    Fault(
        "a part that is there with its defaults is not in a run's name", "experiment/identity.py",
        'if inner or entry.metadata.get("part"):', "if inner:", "experiment runs",
    ),
    Fault(
        "a torn result counts", "records/run_dir.py",
        "if not isinstance(result, dict) or damaged(result) or", "if not isinstance(result, dict) or", "runs",
    ),
    Fault(
        "ERK by the first two dimensions", "sparsity/distributions.py",
        "return {name: float(sum(shape)) for", "return {name: float(sum(shape[:2])) for", "sparsity",
    ),
    Fault(
        "a fourth row is left out of the sums", "sparse_cpu/conv_kernels.py",
        "out[i] += v0 * a[i] + v1 * b[i] + v2 * c[i] + v3 * d[i]", "out[i] += v0 * a[i] + v1 * b[i] + v2 * c[i]",
        "sparse_cpu",
    ),
    # the rest
    Fault(
        "optimizer state outside of the mask stays", "sparsity/masks.py",
        "for tensor in (module.weight, *state_like(optimizer, module.weight)):", "for tensor in (module.weight,):",
        "sparsity algorithms runs",
    ),
    Fault(
        "gradients of pruned weights come a step late", "algorithms/after_step.py",
        "self._is_due(self.step + 1)", "self._is_due(self.step)", "algorithms runs",
    ),
    Fault(
        "RigL grows where the gradient is smallest", "sparsity/scores.py",
        "    return {name: grad.abs() for name, grad in view.gradients().items()}",
        "    return {name: -grad.abs() for name, grad in view.gradients().items()}", "sparsity runs",
    ),
    Fault(
        "drop and grow moves one too few", "sparsity/mask_updates.py",
        "math.ceil(fraction * kept - 1e-9)", "math.floor(fraction * kept - 1e-9)", "sparsity runs",
    ),
    Fault(
        "cycles rise to half of the multiplier", "sparsity/schedules.py",
        "(1.0 + (self.multiplier - 1.0) * rise)", "(1.0 + (self.multiplier - 1.0) * rise / 2)", "sparsity runs",
    ),
    Fault(
        "DyReLU fades a step late", "algorithms/dyrelu_phasing.py",
        "return 1.0 if step <= begin else (end - step) / (end - begin)",
        "return 1.0 if step <= begin + 1 else (end - step) / (end - begin)", "runs",
    ),
    Fault(
        "the best epoch is the first of equals and worse ones", "callbacks/rounds.py",
        'score > self.best["score"]', 'score < self.best["score"]', "runs",
    ),
    Fault(
        "epochs before the target count as best", "callbacks/rounds.py",
        "        if not self.at_target():\n            return\n", "", "runs",
    ),
    Fault(
        "clipping over live weights measures all", "training/clipping.py",
        "yield torch.where(masks[parameter], parameter.grad, 0.0) if masked else parameter.grad",
        "yield parameter.grad", "training",
    ),
    Fault(
        "validation images are trained on", "data/split.py",
        "train=order[held:][:train_limit]", "train=order[held - 1:][:train_limit]", "data",
    ),
    Fault(
        "every epoch has the same order", "data/plan.py",
        'generator("order", self.seed, epoch)', 'generator("order", self.seed, 0)', "data",
    ),
    Fault(
        "LAMP over the wrong side", "sparsity/scores.py",
        "descending / descending.cumsum(0)", "descending / descending.flip(0).cumsum(0)", "sparsity",
    ),
    Fault(
        "a shared weight counts once", "sparsity/masks.py",
        "return sum(times * found[name].weight.numel() for", "return sum(found[name].weight.numel() for",
        "sparsity models",
    ),
    Fault(
        "paths through padding count", "sparsity/connectivity.py",
        "crossed = {name: here & (counted[name].weight > 0) for",
        "crossed = {name: here | (counted[name].weight > 0) for",
        "sparsity",
    ),
    Fault(
        "multiply-adds of all weights count as sparse", "sparsity/flops.py",
        "multiplied = total if hasattr(module, \"offset\") else kept", "multiplied = total", "sparsity",
    ),
    Fault(
        "a checkpoint without its seal is whole", "records/atomic_io.py",
        "        return False if content[:4] ==", "        return None if content[:4] ==", "runs",
    ),
    Fault(
        "Adam's second moment grows with the first rate", "sparse_cpu/optimizer_kernels.py",
        "second = square[at] * beta2 + rate2 * step * step", "second = square[at] * beta2 + rate1 * step * step",
        "sparse_cpu",
    ),
    Fault(
        "metrics of a run that goes on keep a row too many", "records/run_dir.py",
        "lines[: epochs + 1]", "lines[: epochs + 2]", "runs",
    ),
]  # fmt: skip
QUICK = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all faults, not the first 12")
    parser.add_argument("--only", metavar="WORD", help="faults whose name or file holds WORD")
    parser.add_argument("--list", action="store_true", help="print the faults and leave")
    options = parser.parse_args()
    faults = FAULTS if options.all or options.only else FAULTS[:QUICK]
    if options.only:
        faults = [fault for fault in faults if options.only in fault.name or options.only in fault.file]
    if options.list:
        print("\n".join(f"{fault.file}: {fault.name}" for fault in faults))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder) / "checkout"
        copied(copy)
        caught = [(fault, tier_that_sees(fault, copy)) for fault in faults]
    by_test = sum(tier == "make test" for _, tier in caught)
    missed = [fault.name for fault, tier in caught if tier is None]
    print(
        f"{len(caught)} faults: {by_test} caught by make test, {len(caught) - by_test - len(missed)} by make test-all"
    )
    print("".join(f"NOT CAUGHT: {name}\n" for name in missed), end="")
    return int(bool(missed) or by_test < len(caught) - len(caught) // QUICK)


def copied(copy: Path) -> None:
    """This checkout's files as they are now, in a repository of its own (records name a commit)."""
    listed = subprocess.run(["git", "-C", TOP, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (TOP / name).is_file() and not name.startswith("results/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, copy / name)
    kernels = TOP / "sparse_lab" / "sparse_cpu" / "__pycache__"
    if kernels.is_dir():  # numba knows them by the dates of their sources, which were kept
        shutil.copytree(kernels, copy / "sparse_lab" / "sparse_cpu" / "__pycache__")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "copy"]):
        subprocess.run(["git", "-C", copy, *words], check=True)


def tier_that_sees(fault: Fault, copy: Path) -> str | None:
    """'make test', 'make test-all' or None; prints it, with the first test that failed."""
    path = copy / "sparse_lab" / fault.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(fault.right) != 1:
        raise SystemExit(
            f"{fault.file} holds {fault.right!r} {whole.count(fault.right)} times: mend {Path(__file__).name}"
        )
    begun = time.monotonic()
    path.write_text(whole.replace(fault.right, fault.wrong), encoding="utf-8")
    try:
        near = [f"tests/{room}" for room in fault.near.split()]
        for tier, words in (("make test", near), ("make test", []), ("make test-all", FULL)):
            if failed := first_failure(words, copy):
                print(f"{fault.file}: {fault.name}: {tier}, {time.monotonic() - begun:.0f} s: {failed}", flush=True)
                return tier
        print(f"{fault.file}: {fault.name}: NOT CAUGHT, {time.monotonic() - begun:.0f} s", flush=True)
        return None
    finally:
        path.write_text(whole, encoding="utf-8")


def first_failure(words: list[str], copy: Path) -> str | None:
    """The first test of `pytest -x WORDS` in the copy that fails; None when all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "--tb=no", *words]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (1, 2) or not lines:
        raise SystemExit(f"pytest itself failed:\n{done.stdout}{done.stderr}")
    return lines[0][:160]


if __name__ == "__main__":
    sys.exit(main())
