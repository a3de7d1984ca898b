"""Which arithmetic a run computes with: what `compute` asks for, what the run allows, and which is faster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.experiment import measured
from sparse_lab.host.machine import instructions
from sparse_lab.methods import phases
from sparse_lab.methods.recipes import recipe_of
from sparse_lab.methods.table import present

# Final sparsity from which a sparse training step beats the best dense one, batch 128, ERK masks (`sparse-lab bench`).
# Where dense computes in float32: at 90% VGG16 was 2.1 and ResNet-34 1.7 times as fast on two AVX2 cores, nothing below
# was measured. Where it has bf16: at 95% VGG16 was 1.6 times as fast and ResNet-34 as fast on two AVX-512 cores.
BREAK_EVEN = 0.90
BREAK_EVEN_BFLOAT16 = 0.95
# of these networks; of others a step is measured, from where sparse arithmetic computes itself
BENCHED = ("vgg16", "resnet34", "resnet50", "mobilenet_v2")
LEAST = 0.75
# what the drivers of CUDA, ROCm and CUDA under Windows make
GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_tile"}


@dataclass(frozen=True)
class BackendChoice:
    """`line`: what there is to say about it, if it is not what was asked for word by word."""

    compute: str
    precision: str
    line: str | None = None


def resolve_backend(config: Config) -> Config:
    """`config` as it is run and recorded: compute is dense or sparse, and the precision is that of the arithmetic."""
    chosen = choose(config)
    return replace(config, compute=chosen.compute, trainer=replace(config.trainer, precision=chosen.precision))


def _with_precision(config: Config) -> Config:
    """trainer.precision=auto as what it is here."""
    if config.trainer.precision != "auto":
        return config
    precision = "bf16-mixed" if _gpu(config.trainer.accelerator) else "32-true"
    return replace(config, trainer=replace(config.trainer, precision=precision))


def choose(config: Config) -> BackendChoice:
    """The arithmetic of this very run; the runs that it starts from choose for themselves."""
    config = _with_precision(config)
    precision = config.trainer.precision
    if config.compute == "auto":
        return _pick(config)
    if config.compute == "dense":
        return BackendChoice("dense", precision)
    if config.method.prune is None:
        return BackendChoice("dense", precision, "compute=dense, for nothing is pruned here")
    if precision == "bf16-mixed":
        return BackendChoice(
            "sparse", "32-true", "compute=sparse works in float32, not in trainer.precision=bf16-mixed"
        )
    return BackendChoice("sparse", precision)


def check(config: Config, here: bool) -> None:
    """Raises UserError where compute=sparse cannot do what the run asks (here: of this machine)."""
    if config.compute == "sparse" and config.method.prune is not None:
        why = hindrance(config, here)
        if why is not None:
            raise UserError(f"compute=sparse: {why}, or compute=dense")


def hindrance(config: Config, here: bool) -> str | None:
    """Why this run cannot compute sparsely, and what else to ask for; None where it can."""
    trainer = config.trainer
    if trainer.accelerator == "gpu":
        return "it is for CPUs, and trainer.accelerator=gpu: use trainer=cpu"
    if here and _gpu(trainer.accelerator):
        return "it is for CPUs, and trainer=auto would take the GPU here: use trainer=cpu"
    if trainer.devices > 1:
        return f"it runs in one process, not in trainer.devices={trainer.devices}: use trainer.devices=1"
    if trainer.precision == "16-mixed":
        return "it knows no trainer.precision=16-mixed: use trainer.precision=32-true"
    if config.storage == "bf16" and trainer.precision == "64-true":
        return "storage=bf16 is for float32 arithmetic: use trainer.precision=32-true, or storage=float32"
    if config.schedule.name in ("at_end", "soft"):
        return f"method {config.method.name} trains dense up to its last step: use another method"
    return next((why for one in present(config.method) if (why := one.hindrance(config)) is not None), None)


def ways(config: Config) -> list[Config]:
    """Return the configs that compute=auto may come to where only a measurement can tell, what it picks now first;
    none where it can be told without.
    """
    config = _with_precision(config)
    if config.compute != "auto" or config.model.name in BENCHED or _against(config) is not None:
        return []
    chosen = [_dense(config, ""), _sparse(config, "")]
    if choose(config).compute == "sparse":
        chosen.reverse()
    return [
        replace(config, compute=one.compute, trainer=replace(config.trainer, precision=one.precision)) for one in chosen
    ]


def measure(config: Config) -> None:
    """Measure what compute=auto needs to know of this run's network, once on a machine."""
    from sparse_lab.experiment.measure import measure

    config = _with_precision(config)
    try:
        measured.once(config, lambda config: measure(config, _dense(config, "").precision == "bf16-mixed"))
    except OSError:
        pass  # nothing can be written there: the run says so


def _pick(config: Config) -> BackendChoice:
    """compute=auto: sparse where that is possible and pays, else the faster dense arithmetic."""
    against = _against(config)
    if against is not None:
        return _dense(config, against)
    network = config.model.title
    if config.model.name in BENCHED:
        return _sparse(config, f"{100 * phases.final_sparsity(config):.6g}% of the weights are to go")
    known = measured.known(config)
    if known is None:
        dense = _dense(config, "")
        return replace(dense, line=f"compute=auto measures dense and sparse steps of {network} when the run begins")
    return (_sparse if known.compute == "sparse" else _dense)(config, known.line(network))


def _sparse(config: Config, why: str) -> BackendChoice:
    asked = config.trainer.precision
    return BackendChoice("sparse", "32-true" if asked == "bf16-mixed" else asked, f"compute=auto picks sparse: {why}")


def _dense(config: Config, why: str) -> BackendChoice:
    asked = config.trainer.precision
    if asked == "32-true" and not _gpu(config.trainer.accelerator) and _fast_bfloat16():
        return BackendChoice("dense", "bf16-mixed", f"compute=auto picks dense in bf16-mixed: {why}")
    return BackendChoice("dense", asked, f"compute=auto picks dense: {why}")


def _against(config: Config) -> str | None:
    """Why it is dense, whatever a measurement would say."""
    sparsity = phases.final_sparsity(config)
    if config.method.prune is None:
        return "nothing is pruned here"
    hindered = hindrance(config, here=True)
    if hindered is not None:
        return f"sparse does not fit: {hindered.split(':')[0]}"
    least = LEAST
    if config.model.name in BENCHED:
        least = BREAK_EVEN_BFLOAT16 if _fast_bfloat16() else BREAK_EVEN
    if sparsity < least:
        return f"sparse is faster from {100 * least:g}% of zeros on, and this run ends at {100 * sparsity:.6g}%"
    recipe = recipe_of(config)
    if recipe.clip_norm is not None and recipe.clip_over == "all":
        return "training.clip_over=all needs dense gradients in every step; all_estimated and live do not"
    return None


def _gpu(accelerator: str) -> bool:
    """Would the run take a GPU here? torch is asked only where there is a device file of one: importing it takes longer
    than everything else that a finished run is looked up by.
    """
    if accelerator == "cpu" or not any(list(Path("/dev").glob(name)) for name in GPU_FILES):
        return False
    from sparse_lab.training.device import device_of

    return device_of(accelerator).type == "cuda"


def _fast_bfloat16() -> bool:
    """Has this CPU instructions for bf16? Without them torch's autocast is 20 times slower than float32."""
    return not BFLOAT16_INSTRUCTIONS.isdisjoint(instructions())
