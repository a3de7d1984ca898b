"""The config groups as dataclasses: what each key means, its unit, its range and its default.

`conf/` holds the choices (one YAML file a choice); these classes hold the types. A key's `range`, `choices` and `help`
stand beside it, and `check` turns a value outside them into one clear line. Nothing here imports torch: the command's
`--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args, get_type_hints

from sparse_lab.errors import SparseLabError, UserError, nearest
from sparse_lab.registering import enter
from sparse_lab.sparsity.names import DISTRIBUTIONS


def conf_dir() -> Path:
    """Where conf/ lies: beside the package in a checkout or an editable install, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file() and (folder / "method").is_dir():
            return folder
    raise UserError(f"conf/ was found neither beside nor inside {package}: install sparse_lab again")


CHOICES: list[Path] = []  # folders of plugins that hold choices, as conf/ does
FOLLOWERS: list[Callable[[], None]] = []  # called once a method or a schedule can have one part more, or one less


def register_choices(folder: Path | str) -> None:
    """Offer the choices of a folder: method/NAME.yaml is method=NAME, and so for every other group of conf/.

    folder: an absolute path, as in `Path(__file__).with_name("conf")`. The files are checked as those of a --config-dir
    folder are, and count by their content for a run's name as the plugin itself does.

    Raise SparseLabError where there is no such folder, it holds no choice, or one of them has a name that is taken.
    """
    path = Path(folder)
    if not path.is_absolute() or not path.is_dir():
        raise SparseLabError(
            f"choices {str(folder)!r}: no such folder; give its whole path, as in Path(__file__).with_name('conf')"
        )
    path = path.resolve()
    found = [file.relative_to(path) for file in choice_files(path)]
    if not found:
        raise SparseLabError(f"choices {path}: no GROUP/NAME.yaml in it")
    for other in (conf_dir(), *CHOICES):
        for file in found:
            if (other / file).exists():
                raise SparseLabError(f"{file.parent.as_posix()} {file.stem!r} is taken: choose another name")
    CHOICES.append(path)
    enter("choices", ", ".join(file.with_suffix("").as_posix() for file in found), lambda: CHOICES.remove(path))


def choice_files(folder: Path) -> list[Path]:
    """The files of a folder of choices, sorted."""
    return sorted(folder.rglob("*.yaml"))


ALWAYS = object()  # `first` of a key whose default has not changed


def key(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
    choices: Sequence[str] = (),
    length: int | None = None,
    rising: bool = False,
    named: bool = False,
    identity: bool = True,
    file: bool = False,
    folder: bool = False,
    first: Any = ALWAYS,
    revision: int = 1,
) -> Any:
    """A dataclass field with its meaning.

    Of a list, and of a mapping's values, low, high and choices hold for each element. length: how many there must be.
    rising: each above the one before it. named: it is a part of a folder's name.
    identity=False: the key does not change a run's result, so not its name. file: it names a file, which counts by its
    content. folder: it names a folder. first: the default that it had at first, where that has changed: what differs
    from that one is in a run's name, so that runs which rely on the new default have other names than those that relied
    on the old one. revision: raised when what the key does changes, so that runs which set it have other names than
    before.
    """
    meta = {
        "help": help,
        "low": low,
        "high": high,
        "open_low": open_low,
        "open_high": open_high,
        "choices": choices,
        "length": length,
        "rising": rising,
        "named": named,
        "identity": identity,
        "file": file,
        "folder": folder,
        "first": first,
        "revision": revision,
    }
    if callable(default):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


def part(help: str) -> Any:
    """A field of a method or a schedule that is a sub-config where it is there, or None."""
    return field(default=None, metadata={"help": help, "part": True})


def present(group: Any) -> list[str]:
    """The parts of a method or a schedule (a dataclass) that are there, in order."""
    return [
        entry.name for entry in dataclasses.fields(group) if _is_part(entry) and getattr(group, entry.name) is not None
    ]


def parts_of(kind: type) -> dict[str, type]:
    """Every part that a method or a schedule can have, and its sub-config's class."""
    hints = get_type_hints(kind)
    return {entry.name: get_args(hints[entry.name])[0] for entry in dataclasses.fields(kind) if _is_part(entry)}


def _is_part(entry: dataclasses.Field[Any]) -> bool:
    return bool(entry.metadata.get("part"))


def check_settings(whose: str, settings: object) -> type:
    """Return the settings' class of a part from outside. Raise SparseLabError for one that the schema cannot hold."""
    from omegaconf import OmegaConf

    if not isinstance(settings, type) or not dataclasses.is_dataclass(settings):
        raise SparseLabError(f"{whose}: its settings are a dataclass, not {settings!r}")
    for entry in dataclasses.fields(settings):
        if "revision" not in entry.metadata:
            raise SparseLabError(f"{whose}: make {settings.__name__}.{entry.name} with sparse_lab.config.key(...)")
    try:
        check_ranges(settings(), whose)
        OmegaConf.structured(settings)
    except Exception as error:  # a type that no config holds, a default of another type
        raise SparseLabError(f"{whose}: {settings.__name__}: {' '.join(str(error).split())}") from None
    return settings


def add_part(owner: type, name: str, settings: type) -> Callable[[], None]:
    """Let MethodConfig or ScheduleConfig (`owner`) have one part more, and return what takes it out again.

    The class stays the same object, for many modules hold it: what `@dataclass` had made of its fields is made anew,
    with the part behind the others, and put in place of the old.
    """
    said = (settings.__doc__ or "").strip().splitlines()[:1]

    def forget() -> None:
        delattr(owner, name)
        _remake(owner, [entry for entry in dataclasses.fields(owner) if entry.name != name])

    made = part(said[0] if said else f"{name}, of a plugin")
    made.name, made.type = name, settings | None
    setattr(owner, name, None)
    _remake(owner, [*dataclasses.fields(owner), made])
    return forget


def _remake(owner: type, entries: list[dataclasses.Field[Any]]) -> None:
    """Give a dataclass these fields, in place."""

    def fresh(entry: dataclasses.Field[Any]) -> Any:
        return field(default=entry.default, default_factory=entry.default_factory, metadata=entry.metadata)

    made = dataclasses.make_dataclass(owner.__name__, [(entry.name, entry.type, fresh(entry)) for entry in entries])
    for generated in ("__dataclass_fields__", "__init__", "__repr__", "__eq__", "__match_args__"):
        setattr(owner, generated, getattr(made, generated))
    owner.__annotations__ = {entry.name: entry.type for entry in entries}
    for follow in FOLLOWERS:
        follow()


OPTIMIZERS = ("sgd", "adam", "adamw")
LR_SCHEDULES = ("constant", "cosine", "step")
SELECTIONS = ("validation_best", "last", "test_best")
UNITS = ("share", "epochs")
CLIP_OVER = ("all", "live", "all_estimated")
GRADIENTS = ("after_clipping", "before_clipping")
# the largest number of each kind that is more than a slip of the hand
EPOCHS = 100_000
STEPS = 10_000_000
ROUNDS = 1_000
BATCHES = 10_000
IMAGES = 1_000_000_000
FLOAT32 = 3e38  # about the largest that a tensor holds
MANY = 1_000_000
PLAIN_NAME = re.compile(r"\w[\w.+-]{0,79}")  # part of a folder's name: no slash, which would lead elsewhere
DIGITS = 12  # of a float that count, in a name too
# keys that had other names before 0.2
RENAMED = {
    "compute.storage": "storage",
    "method.rewire.fraction": "method.drop_and_grow.drop_fraction",
    "method.rewire.fraction_end": "method.drop_and_grow.drop_fraction_end",
    "method.rewire.fraction_shape": "method.drop_and_grow.drop_fraction_shape",
    "method.rewire.every": "method.drop_and_grow.update_every",
    "method.rewire.allocation": "method.drop_and_grow.distribution",
    "method.rewire.low": "method.elastic_mutation.low",
    "method.rewire.high": "method.elastic_mutation.high",
    "method.rewire.milestones": "method.elastic_mutation.milestones",
    "method.rewire": "method.drop_and_grow",
    "method.prune.allocation": "method.prune.distribution",
    "method.regrow.layers": "method.regrow.distribution",
    "method.starts_from": "method.init_from",
    "method.phasing": "method.dyrelu",
    "method.compacting": "method.compactors",
    "method.sphere": "method.hypersphere",
    "sparsity.connect": "sparsity.connected_init",
    "schedule.share": "schedule.iterative.share",
    "schedule.every": "schedule.cubic.every",
    "schedule.initial": "schedule.cubic.initial",
    "schedule.turn": "schedule.alternating.turn",
    "schedule.last_dense": "schedule.alternating.last_dense",
}
# keys that became several, or no key at all
GONE = {
    "method.parts": "what a method is made of stands there itself, as in method.prune={} method.regrow={} or null",
    "method.cyclic": "cycles are there or null: method.cycles={} or method.cycles=null",
    "method.gradients": "method.drop_and_grow.gradients and method.cycles.gradients",
    "method.prune.unit": "whole filters go where method.filters is: method.filters={} or null",
    "schedule.name": "a schedule is chosen: schedule=NAME",
    "schedule.round_epochs": "schedule.iterative.round_epochs and schedule.layerwise.round_epochs",
    "schedule.begin": "schedule.cubic.begin and schedule.alternating.begin",
    "schedule.end": "schedule.cubic.end and schedule.alternating.end",
}
RENAMED_CHOICES = {"method": {"lamp_oneshot": "oneshot", "lamp_iterative": "iterative"}}
# of methods, in the gallery's order; a control is there to be compared with, and no method
KINDS = (
    "dense",
    "static",
    "dense to sparse",
    "bidirectional",
    "dynamic",
    "by turns",
    "structured",
    "penalty-driven",
    "control",
)


@dataclass
class ModelConfig:
    name: str = key("vgg16", "network, one of sparse_lab.models")
    arch: str | None = key(None, "model=torchvision or timm: which of that library's networks", named=True)
    width: float = key(1.0, "factor on every channel count", low=0.0, open_low=True, high=4.0)
    weights: str | None = key(
        None,
        "'torchvision' or 'timm' (downloaded), a file with a state dict to start from (ImageNet variants too), or the "
        "folder of a finished run",
        file=True,
    )
    keep_masks: bool = key(
        False,
        "model.weights of a pruned network: true trains under its masks from the first step; false takes its weights "
        "alone, and what was pruned starts at zero and is free to move",
    )
    adapt_stem: bool = key(
        False, "a 3x3 convolution of stride 1, and no pooling, where an ImageNet network begins: for small images"
    )
    options: dict[str, Any] = key(
        dict,
        "settings of the network itself: model.options.NAME=VALUE; `sparse-lab keys model.options` names them",
    )

    @property
    def title(self) -> str:
        """The network in tables: its name, or its library's and its own there."""
        return self.name if self.arch is None else f"{self.name} {self.arch}"


@dataclass
class DatasetConfig:
    name: str = key("cifar10", "data set, one of sparse_lab.data")
    root: str = key("data", "folder that holds (or will hold) the files", identity=False, folder=True)
    file: str | None = key(
        None,
        "dataset=arrays: the .npz file with images and labels, in dataset.root or in the working directory",
        identity=False,  # known by its content, as all data are
        folder=True,
    )
    num_classes: int | None = key(10, "number of labels; null: counted (folder, arrays, imagenet)", low=2, high=MANY)
    image_size: Any = key(
        32, "height and width of an image in pixels: 32, or [24,32]; null: the file's own (arrays)", low=1, high=4096
    )
    channels: int | None = key(3, "of an image: 1 grey, 3 colour; null: the file's own (arrays)", low=1, high=4096)
    mean: list[float] | None = key(
        None,
        "per channel, of pixels in 0..1, or of float images' values as they are; null: of the training images",
        low=-MANY,
        high=MANY,
        first=[0.5, 0.5, 0.5],
    )
    std: list[float] | None = key(
        None,
        "per channel, of pixels in 0..1, or of float images' values as they are; null: of the training images",
        low=0.0,
        open_low=True,
        high=MANY,
        first=[0.25, 0.25, 0.25],
    )
    test: float = key(
        0.2,
        "folder, arrays: share of each class that is the test set where none is there; the same for all seeds",
        low=0.0,
        open_low=True,
        high=0.9,
    )
    skip_corrupt: bool = key(False, "folder: leave out files that cannot be read, by name; false: refuse them")
    exif_orientation: bool = key(
        False,
        "photos: turn each as the camera's EXIF says; false: as its pixels are stored, which is what torchvision reads",
    )
    mirror: bool = key(True, "a mirrored image keeps its label (false for digits)")
    validation: float = key(
        0.1, "share of the training images held out, drawn by seed", low=0.0, open_low=True, high=0.9
    )
    train_limit: int | None = key(
        None, "use only so many training images (after the split), drawn by seed", low=1, high=IMAGES
    )
    eval_limit: int | None = key(
        None, "use only so many validation images, and so many test images", low=1, high=IMAGES
    )
    verify: bool = key(
        True, "refuse files whose md5 is not the official one; false says so loudly and marks the record"
    )
    download: bool = key(False, "fetch missing files from the data set's own site", identity=False)
    workers: int = key(
        2,
        "processes (imagenet) or threads (folder) that decode photos; 0: none but the run's own",
        low=0,
        high=1024,
        identity=False,
    )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels. Raise UserError where they are not given as such, or not known."""
        size = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        whole = isinstance(size, (list, tuple)) and len(size) == 2
        if not whole or any(not isinstance(side, int) or isinstance(side, bool) for side in size):
            raise UserError(
                f"dataset.image_size={self.image_size}: a whole number of pixels, or height and width as in [24,32]"
            )
        return size[0], size[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image. Raise UserError where they are not known."""
        if self.channels is None:
            raise UserError("dataset.channels=null: say how many channels an image has, as in dataset.channels=3")
        return self.channels, *self.size

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """mean and std, a number a channel. Raise UserError where they are not known."""
        if self.mean is None or self.std is None:
            raise UserError("dataset.mean and dataset.std are not known before the training images are read")
        return self.mean, self.std

    @property
    def classes(self) -> int:
        """The number of labels. Raise UserError where it is not known."""
        if self.num_classes is None:
            raise UserError("dataset.num_classes=null: say how many labels there are, as in dataset.num_classes=10")
        return self.num_classes


@dataclass
class AugmentConfig:
    crop_padding: int = key(4, "random crop after padding by so many pixels; 0: no crop", low=0, high=32)
    padding_mode: str = key("zero", "what the padding holds", choices=("zero", "reflect"))
    flip: bool = key(True, "mirror half of the images (only where dataset.mirror allows it)")


@dataclass
class RecipeConfig:
    """How one phase trains: optimizer, learning rate over the phase, length."""

    optimizer: str = key("sgd", "optimizer", choices=OPTIMIZERS)
    lr: float = key(0.1, "peak learning rate", low=0.0, open_low=True, high=FLOAT32)
    momentum: float = key(0.9, "SGD's momentum", low=0.0, high=1.0, open_high=True)
    nesterov: bool = key(False, "SGD with Nesterov's look-ahead")
    weight_decay: float = key(5e-4, "L2 (sgd, adam) or decoupled (adamw) decay", low=0.0, high=MANY)
    epochs: int = key(
        160, "epochs of this phase (finetune: all rounds together; regrow: after each step)", low=1, high=EPOCHS
    )
    lr_schedule: str = key("cosine", "shape of the learning rate after warm-up", choices=LR_SCHEDULES)
    milestones: list[float] = key(
        lambda: [0.5, 0.75],
        "lr_schedule=step: fractions of the phase where lr drops, rising",
        low=0.0,
        high=1.0,
        open_low=True,
        open_high=True,
        rising=True,
    )
    gamma: float = key(0.1, "lr_schedule=step: factor at each milestone", low=0.0, high=1.0, open_low=True)
    warmup: float = key(0.0, "share of the phase with linear warm-up", low=0.0, high=1.0, open_high=True, revision=2)
    patience: int | None = key(
        None,
        "end the phase after so many epochs without a better validation accuracy, whatever training.select says",
        low=1,
        high=EPOCHS,
        revision=2,
    )
    clip_norm: float | None = key(None, "largest norm of the whole gradient", low=0.0, open_low=True, high=FLOAT32)
    clip_over: str = key(
        "all",
        "what clip_norm measures: all positions, pruned ones too, which needs dense gradients in every step; live "
        "ones; or all, estimated from live ones between two steps with dense gradients",
        choices=CLIP_OVER,
    )


@dataclass
class TrainingConfig(RecipeConfig):
    """The dense recipe, with the fine-tuning recipes after pruning and after regrowth beside it."""

    batch_size: int = key(128, "images a batch", low=1, high=MANY)
    accumulate: int = key(
        1,
        "batches whose gradients add up to one optimizer step, which then sees batch_size * accumulate images; an "
        "epoch's last step those that are left",
        low=1,
        high=BATCHES,
    )
    label_smoothing: float = key(0.0, "share of the target spread over all classes", low=0.0, high=1.0, open_high=True)
    select: str = key(
        "validation_best", "which epoch's weights a level ends with; test_best marks the record", choices=SELECTIONS
    )
    select_on_few: bool = key(
        False,
        "let fewer images than there are classes select an epoch, which is next to chance",
        identity=False,
    )
    stop_after: int | None = key(
        None,
        "method=dense: stop after so many epochs of the schedule (where method.prune.rewind_weights goes)",
        low=1,
        high=EPOCHS,
    )
    limit_batches: int | None = key(None, "only so many batches an epoch (train and validation)", low=1, high=STEPS)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    finetune: RecipeConfig = field(default_factory=RecipeConfig)
    regrow: RecipeConfig = field(default_factory=RecipeConfig)


@dataclass
class SparsityConfig:
    target: float = key(
        0.99, "share of conv and linear weights that are zero at the end", low=0.0, high=1.0, open_high=True
    )
    connected_init: bool = key(
        False, "a sparse start lays paths from the image to the logits first, as many as each layer's budget carries"
    )
    exclude: list[str] = key(
        list, "layers that stay dense and are not counted, by name, glob or type, such as fc, layer4.* and Linear"
    )
    include: list[str] = key(list, "the only layers that are counted, in the same way; []: all conv and linear layers")
    layers: dict[str, float] = key(
        dict,
        "layers with a sparsity of their own at the target, which the others make good: {fc:0.5,layer4.*:0.995}",
        low=0.0,
        high=1.0,
        open_high=True,
    )
    require_connected: bool = key(False, "fail, instead of warn, when a mask cuts the network from input to logits")


@dataclass
class Bare:
    """A part that is there or not, with nothing to set."""


@dataclass
class IterativeConfig:
    """Prune in rounds, with fine-tuning behind each."""

    share: float = key(0.2, "share of the remaining weights pruned a round", low=1e-12, high=1.0, open_high=True)
    round_epochs: int | None = key(None, "epochs a round; null shares training.finetune.epochs out", low=1, high=EPOCHS)


@dataclass
class LayerwiseConfig:
    """A round for each number of method.filters.rates."""

    round_epochs: int | None = key(None, "epochs a round; null shares training.finetune.epochs out", low=1, high=EPOCHS)


@dataclass
class CubicConfig:
    """Gradual pruning within one phase: s_t = target + (initial - target) * (1 - progress)^3."""

    begin: float = key(0.0, "start, as a fraction of the phase", low=0.0, high=1.0)
    end: float = key(0.5, "at the target from here on, as a fraction of the phase", low=0.0, high=1.0)
    every: int = key(100, "steps between two mask changes", low=1, high=STEPS)
    initial: float = key(0.0, "sparsity at the start", low=0.0, high=1.0, open_high=True)


@dataclass
class AlternatingConfig:
    """Dense and sparse by turns (AC/DC). Fractions are those of the phase."""

    begin: float = key(0.1, "dense up to here", low=0.0, high=1.0)
    turn: float = key(0.05, "length of a sparse or dense turn", low=1e-4, high=1.0)
    last_dense: float = key(0.1, "length of the last dense turn, which ends at `end`", low=0.0, high=1.0, open_low=True)
    end: float = key(0.85, "at the target from here on", low=0.0, high=1.0)


@dataclass
class ScheduleConfig:
    """When the mask changes, and how sparse it is then: one of these."""

    one_shot: Bare | None = part("all at once: after the dense training, or before any")
    iterative: IterativeConfig | None = part("in rounds, each with fine-tuning behind it")
    layerwise: LayerwiseConfig | None = part("a layer a round (whole filters)")
    cubic: CubicConfig | None = part("gradually while it trains")
    constant: Bare | None = part("before the first step, and never changed by the schedule")
    alternating: AlternatingConfig | None = part("dense and sparse by turns")
    soft: Bare | None = part("after every epoch, before the next one everything may live again (whole filters)")
    at_end: Bare | None = part("after the last step, with no training behind it")

    @property
    def name(self) -> str:
        """The schedule that is there; validate refuses none and two."""
        return next(iter(present(self)), "")


@dataclass
class PruneConfig:
    score: str = key(
        "lamp",
        "how good each weight is (sparse_lab/sparsity/scores.py), or each filter (structured/filter_scores.py)",
    )
    distribution: str = key("global", "how the kept weights are split over layers", choices=DISTRIBUTIONS)
    batches: int = key(
        10, "training batches that scores with gradients or feature maps average over", low=1, high=BATCHES
    )
    per_class: int | None = key(
        None, "scores look at so many images of each class instead of at `batches`", low=1, high=IMAGES
    )
    iterations: int = key(
        1,
        "prune in so many steps of equal ratio, with new scores before each, and no training in between",
        low=1,
        high=ROUNDS,
    )
    rewind_lr: bool = key(
        False, "each round runs the dense recipe again (learning-rate rewinding), not training.finetune"
    )
    rewind_weights: int | None = key(
        None,
        "each round starts from the weights that the dense training had after so many epochs, 0: the initial ones "
        "(weight rewinding); null: goes on from the trained ones",
        low=0,
        high=EPOCHS,
    )


@dataclass
class FiltersConfig:
    """Prune whole filters, and which of them can go."""

    rates: list[float] = key(
        list,
        "share of the filters of each layer that go, in the order of the network; empty: what sparsity.target asks",
        low=0.0,
        high=1.0,
    )
    coupled: bool = key(
        False, "channels that additions tie together (residual trunks) can go too; false: only a layer's own"
    )
    flops: float | None = key(
        None,
        "go on beyond sparsity.target until this share of the multiply-adds has gone too",
        low=0.0,
        high=1.0,
        open_low=True,
        open_high=True,
    )


@dataclass
class RegrowConfig:
    budget: float | None = key(
        None,
        "share of the whole network's weights regrown a step; null: the start keeps half as many weights as the target",
        low=0.0,
        high=1.0,
    )
    steps: int = key(1, "number of regrowth steps; the start is sparsity.target + steps * budget", low=1, high=ROUNDS)
    distribution: str = key(
        "all", "all in proportion to their loss, lowest attention-map SSIM, or given", choices=("all", "ssim", "given")
    )
    ssim_layers: int = key(4, "distribution=ssim: how many of the least similar layers regrow", low=1, high=MANY)
    given: list[str] = key(list, "distribution=given: names of the layers")
    score: str = key(
        "taylor", "which pruned weights come back first; 'none' regrows nothing and only fine-tunes (control)"
    )
    score_on: str = key("dense", "the network that score looks at", choices=("dense", "sparse"))
    reference: str | None = key(
        None,
        "score=reference: a checkpoint, or the folder of a finished run; null makes the one-way run at sparsity.target",
        file=True,
    )
    value: str = key("zero", "what a regrown weight starts from", choices=("zero", "dense", "kaiming"))
    start: str = key(
        "sparser",
        "sparser than the target by what regrows; target: at the target itself, for score=none: one-way pruning with "
        "as many epochs (control)",
        choices=("sparser", "target"),
    )
    batches: int = key(10, "training batches that scores and attention maps average over", low=1, high=BATCHES)


@dataclass
class DropAndGrowConfig:
    """Drop and grow: at every mask update each layer drops a fraction of its weights and grows as many."""

    drop: str = key("magnitude", "the lowest by this score go")
    grow: str = key("gradient", "the highest pruned ones by this score come: gradient (RigL) or random (SET)")
    drop_fraction: float = key(
        0.3, "share of each layer's weights that drop at first", low=0.0, high=1.0, open_low=True
    )
    drop_fraction_end: float = key(0.0, "the share at the last mask update", low=0.0, high=1.0)
    drop_fraction_shape: str = key(
        "cosine", "how the share falls from step 0 on", choices=("cosine", "linear", "constant")
    )
    update_every: int = key(100, "steps or epochs between two mask updates", low=1, high=STEPS)
    unit: str = key("steps", "what `update_every` counts", choices=("steps", "epochs"))
    distribution: str = key(
        "global",
        "schedule=cubic: how what is pruned before an update is split over layers",
        choices=DISTRIBUTIONS,
    )
    end: float = key(0.75, "the last update lies before this share of the training", low=0.0, high=1.0, open_low=True)
    gradients: str = key("after_clipping", "the step's gradients that growth sees", choices=GRADIENTS)


@dataclass
class ElasticMutationConfig:
    """MEST's elastic mutation: every update drops to one density and grows to another, in stages of the training."""

    drop: str = key("mest", "the lowest by this score go")
    grow: str = key("random", "the highest pruned ones by this score come")
    update_every: int = key(5, "steps or epochs between two mask updates", low=1, high=STEPS)
    unit: str = key("epochs", "what `update_every` counts", choices=("steps", "epochs"))
    distribution: str = key("uniform", "how each density is split over layers", choices=DISTRIBUTIONS)
    low: list[float] = key(
        lambda: [0.8, 0.9, 1.0],
        "an update drops to so many times the target's density, one number a stage",
        low=0.0,
        high=MANY,
    )
    high: list[float] = key(lambda: [1.0, 1.0, 1.0], "and grows to so many times it", low=0.0, high=MANY)
    milestones: list[float] = key(
        lambda: [0.5625, 0.75],
        "where one stage ends and the next begins, as shares of the training, below 1 and rising",
        low=0.0,
        high=1.0,
        open_low=True,
        open_high=True,
        rising=True,
    )
    gradients: str = key("after_clipping", "the step's gradients that growth sees", choices=GRADIENTS)


@dataclass
class CyclesConfig:
    """Cyclic sparsity: in each cycle density rises to `multiplier` times the target's and falls back."""

    shape: str = key("cosine", "how density moves in a cycle", choices=("cosine", "triangular"))
    lengths: list[float] = key(lambda: [0.2, 0.4], "length of each cycle, one number a cycle", low=0.0, high=EPOCHS)
    unit: str = key("share", "what lengths count: shares of the training, or epochs", choices=UNITS)
    multiplier: float = key(3.0, "highest density of a cycle, in densities of the target", low=1.0, high=MANY)
    every: int = key(100, "steps between two changes", low=1, high=STEPS)
    drop: str = key("magnitude", "while density falls the lowest by this score go")
    grow: str = key("gradient", "while density rises the highest pruned ones by this score come")
    gradients: str = key("after_clipping", "the step's gradients that growth sees", choices=GRADIENTS)


@dataclass
class DyReLUConfig:
    """DyReLU phasing: DyReLU at every ReLU early in the training; when DyReLU begins to fade, and when it is ReLU."""

    begin: float = key(0.25, "DyReLU in full up to here", low=0.0, high=EPOCHS)
    end: float = key(0.496, "plain ReLU from here on", low=0.0, high=EPOCHS)
    unit: str = key("share", "what begin and end count: shares of the training, or epochs", choices=UNITS)


@dataclass
class CompactorsConfig:
    """ResRep's compactors: 1x1 convolutions behind the filters, whose rows a penalty takes to zero one by one."""

    penalty: float = key(1e-4, "strength of the pull on every row", low=0.0, high=MANY)
    begin: float = key(5.0, "no row is given up before this", low=0.0, high=EPOCHS)
    unit: str = key("epochs", "what begin counts: epochs, or shares of the training", choices=UNITS)
    every: int = key(200, "steps between two looks at which rows are given up", low=1, high=STEPS)
    channels: int = key(4, "how many more may be given up at each look", low=1, high=MANY)


@dataclass
class HypersphereConfig:
    """Hyperspherical training: filters of unit norm, and a penalty on what each has outside of its kept positions."""

    penalty: float = key(1.0, "strength of the penalty at the end; it rises linearly from 0", low=0.0, high=MANY)
    every: int = key(10, "steps between two looks at which positions would be kept", low=1, high=STEPS)
    recovery: bool = key(True, "what is pruned is replaced by its mean, one number a filter")


@dataclass
class MethodConfig:
    """What a method is made of: its parts, each a sub-config, or null where it is absent."""

    name: str = key("dense", "the method's name in tables", named=True)
    kind: str = key("dense to sparse", "which family it belongs to", choices=KINDS, identity=False)
    paper: str = key("", "authors, year, arXiv number", identity=False)
    summary: str = key("", "one line for the gallery", identity=False)
    init_from: str | None = key(None, "the method whose run this one starts from; null: from scratch")
    sharing: Bare | None = part("blocks from the third of a residual stage on share the second block's convolutions")
    dyrelu: DyReLUConfig | None = part("DyReLU at every ReLU early in training, which fades into ReLU")
    dct: Bare | None = part("every layer adds a discrete cosine transform times a scalar to its sparse weights")
    compactors: CompactorsConfig | None = part("filters go through compactors (ResRep)")
    hypersphere: HypersphereConfig | None = part("filters of unit norm, and a penalty that empties what will go")
    prune: PruneConfig | None = part("what is pruned; without it the network stays dense")
    filters: FiltersConfig | None = part("whole filters go, not single weights")
    cycles: CyclesConfig | None = part("density rises and falls in cycles first")
    drop_and_grow: DropAndGrowConfig | None = part("drop a fraction of the weights now and then, and grow as many")
    elastic_mutation: ElasticMutationConfig | None = part("drop and grow between two densities (MEST)")
    regrow: RegrowConfig | None = part("after pruning, weights grow back")


@dataclass
class TrainerConfig:
    accelerator: str = key("auto", "cpu, gpu or auto", choices=("auto", "cpu", "gpu"), identity=False)
    devices: int = key(
        1, "devices of one run, a process each (DDP) where there are several", low=1, high=1024, identity=False
    )
    precision: str = key(
        "32-true",
        "arithmetic of a step; auto: bf16-mixed on a GPU, 32-true on a CPU",
        choices=("32-true", "bf16-mixed", "16-mixed", "64-true", "auto"),
    )
    compile: str = key(
        "auto",
        "full: torch.compile the training step, on a GPU with CUDA graphs; graphs: those alone, ready at once; auto: "
        "full on one GPU but in 16-mixed, else off",
        choices=("auto", "full", "graphs", "off"),
        identity=False,
    )
    deterministic: bool = key(True, "only deterministic kernels", identity=False)
    checkpoint_every: int = key(
        1, "epochs between two saves of checkpoints/last.ckpt", low=1, high=EPOCHS, identity=False
    )
    progress: bool = key(True, "a progress bar in a terminal, plain lines elsewhere", identity=False)
    profiler: str | None = key(
        None, "its report lands in the run's folder", choices=("simple", "advanced"), identity=False
    )


@dataclass
class DiagnosticsConfig:
    layers: bool = key(False, "density and effective weights of every layer at every mask change", identity=False)
    activations: bool = key(False, "share of positive pre-activations of every layer, each epoch", identity=False)
    gradients: bool = key(False, "gradient norm of every part of the network, a mean an epoch", identity=False)


@dataclass
class LoggerConfig:
    wandb: bool = key(False, "log to Weights & Biases as well (offline unless WANDB_API_KEY is set)", identity=False)
    tensorboard: bool = key(False, "write TensorBoard event files as well", identity=False)
    mlflow: bool = key(False, "log to MLflow as well", identity=False)
    trackio: bool = key(False, "log to Trackio as well, on this machine alone", identity=False)
    project: str = key("sparse_lab", "W&B or Trackio project, MLflow experiment", identity=False)
    mlflow_uri: str | None = key(
        None, "MLflow server; null: MLFLOW_TRACKING_URI, or else mlflow.db in paths.outputs", identity=False
    )

    @property
    def names(self) -> list[str]:
        """Those that are asked for."""
        return [name for name in ("wandb", "tensorboard", "mlflow", "trackio") if getattr(self, name)]


@dataclass
class PathsConfig:
    data: str = key("data", "data sets", identity=False, folder=True)
    outputs: str = key("outputs", "runs and reports", identity=False, folder=True)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(one_shot=Bare()))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    compute: str = key(
        "dense",
        "arithmetic: dense times masks, sparse (live weights only, CPU), or auto: what is faster here",
        choices=("dense", "sparse", "auto"),
    )
    storage: str = key(
        "float32",
        "how compute=sparse stores maps and their gradients: float32, or bf16, which takes half the memory; sums, "
        "weights and the optimizer stay float32",
        choices=("float32", "bf16"),
    )
    seed: int = key(1, "seed of weights, split, data order and random scores", low=0, high=2**32 - 1)


def renamed(key: str) -> str | None:
    """Say what `key` (dots between its parts), or what it lies in, is called now; None where it was not renamed."""
    if (old := _within(key, RENAMED)) is not None:
        return f"{old} is {RENAMED[old]} since 0.2"
    if (old := _within(key, GONE)) is not None:
        return f"{old} is gone since 0.2: {GONE[old]}"
    return None


def current(key: str) -> str:
    """What a key of a record, of whatever version, is called now."""
    old = _within(key, RENAMED)
    return key if old is None else RENAMED[old] + key.removeprefix(old)


def _within(key: str, known: dict[str, str]) -> str | None:
    return next((old for old in known if f"{key}.".startswith(f"{old}.")), None)


def as_written(value: Any) -> Any:
    """A value with its floats, in lists and mappings too, as a person would write them: 0.9 + 2 * 0.03 is 0.96."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") + 0.0  # there is no -0.0
    if isinstance(value, list):
        return [as_written(one) for one in value]
    return {name: as_written(one) for name, one in value.items()} if isinstance(value, dict) else value


def check_ranges(part: Any, path: str = "") -> None:
    """Every value of a config (a dataclass), and of its lists, within its range and among its choices, or a UserError
    with one line.
    """
    # paths first: other folders are made of them, and the user has set the path
    for entry in sorted(dataclasses.fields(part), key=lambda entry: entry.name != "paths"):
        name, meta = f"{path}.{entry.name}".lstrip("."), dict(entry.metadata)
        value = getattr(part, entry.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, name)
        elif isinstance(value, list):
            _check_list(name, value, meta)
        elif isinstance(value, dict):
            for inner, one in value.items():
                if isinstance(one, (list, dict)) and span(meta):
                    raise UserError(f"{name}.{inner}={_shown(one)} is no single value: {meta['help']}")
                _check_value(f"{name}.{inner}={_shown(one)}", one, meta)
        else:
            _check_value(f"{name}={_shown(value)}", value, meta)


def _check_value(said: str, value: Any, meta: dict[str, Any]) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not _within_range(value, meta):
        where = f"outside {span(meta)}" if span(meta) else "no number to work with"
        raise UserError(f"{said} is {where}: {meta['help']}")
    if isinstance(value, str) and meta.get("folder"):
        _check_folder(said, value)
    if isinstance(value, str) and meta.get("choices") and value not in meta["choices"]:
        raise UserError(f"{said}: {nearest(value, meta['choices'])}")
    if isinstance(value, str) and meta.get("named") and PLAIN_NAME.fullmatch(value) is None:
        raise UserError(
            f"{said.partition('=')[0]}={value!r} is part of a folder's name: up to 80 letters, digits and . _ + -, "
            "none of . + - first"
        )


def _check_folder(said: str, value: str) -> None:
    if not value.strip():
        raise UserError(f"{said} names no folder: the one you are in is {said.partition('=')[0]}=.")
    if value.startswith("~"):
        raise UserError(f"{said}: a shell puts the home folder in only where ~ is not quoted: write the folder out")


def _check_list(name: str, values: list[Any], meta: dict[str, Any]) -> None:
    said = f"{name}=[{', '.join(_shown(value) for value in values[:20])}]"
    for value in values:
        if isinstance(value, (list, dict)):  # OmegaConf lets them pass for numbers
            raise UserError(f"{said}: {_shown(value)} is no single value: {meta['help']}")
        _check_value(f"{said}: {_shown(value)}", value, meta)
    if meta["length"] not in (None, len(values)):
        raise UserError(f"{said} must hold {meta['length']} numbers: {meta['help']}")
    if meta["rising"] and any(after <= before for before, after in itertools.pairwise(values)):
        raise UserError(f"{said} must be rising: {meta['help']}")


def _within_range(value: float, meta: dict[str, Any]) -> bool:
    low, high = meta["low"], meta["high"]
    below = low is not None and (value < low or (meta["open_low"] and value == low))
    above = high is not None and (value > high or (meta["open_high"] and value == high))
    return not below and not above and math.isfinite(value)


def _shown(value: Any) -> str:
    """A number, however large, in a few digits."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{Decimal(value):.4g}" if 1e18 < abs(value) < math.inf else f"{value:.12g}"
    return str(value)


def span(meta: dict[str, Any]) -> str:
    """A key's choices as a|b|c, its range as [low, high), round where an end is open; empty where all is allowed."""
    if meta["choices"]:
        return "|".join(meta["choices"])
    low, high = meta["low"], meta["high"]
    if low is None and high is None:
        return ""
    left = "(-inf" if low is None else f"{'(' if meta['open_low'] else '['}{low:.12g}"
    right = "inf)" if high is None else f"{high:.12g}{')' if meta['open_high'] else ']'}"
    return f"{left}, {right}"
