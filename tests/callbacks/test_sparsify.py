"""Algorithms on somebody else's LightningModule: masks hold after every step, counts are exact, a run goes on as it
would have, whatever stands where.
"""

from __future__ import annotations

import random
from itertools import pairwise, permutations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from sparse_lab.algorithms.cyclic import CyclicSparsity
from sparse_lab.algorithms.drop_and_grow import RigL
from sparse_lab.algorithms.dyrelu_phasing import DyReLUPhasing
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.selectors import WeightSelector
from sparse_lab.callbacks.sparsify import (
    CyclicSparsityCallback,
    DropAndGrowCallback,
    DyReLUPhasingCallback,
    PruneCallback,
    RegrowCallback,
    Sparsify,
)
from sparse_lab.errors import SparseLabError
from sparse_lab.models import dyrelu
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.schedules import Constant, Cubic, Cyclic, DropFraction, Regrowth

BATCH = 64
EPOCHS = 2


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.003, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.003),
}


class Theirs(pl.LightningModule):
    """A module as anybody writes it: no name, attribute or class of ours."""

    def __init__(self, body: nn.Module, optimizer: str = "momentum") -> None:
        super().__init__()
        self.body = body
        self.kind = optimizer

    def forward(self, images):
        return self.body(images)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return OPTIMIZERS[self.kind](self.parameters())


class Watch(pl.Callback):
    """After every optimizer step: is anything alive that the masks say is not? And how many weights are kept?"""

    def __init__(self) -> None:
        self.outside, self.nonzero, self.kept = 0, [], []

    def on_train_batch_end(self, trainer, module, *rest):
        state, nonzero, kept = trainer.optimizers[0].state, 0, 0
        for layer in module.modules():
            mask = getattr(layer, "mask", None)
            if mask is not None:
                tensors = [layer.weight, *(v for v in state[layer.weight].values() if v.shape == mask.shape)]
                self.outside += sum(int(torch.count_nonzero(one[~mask])) for one in tensors)
                nonzero, kept = nonzero + int(torch.count_nonzero(layer.weight)), kept + int(mask.sum())
        self.nonzero.append(nonzero)
        self.kept.append(kept)


@pytest.fixture(scope="module")
def digits() -> DataLoader:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:640], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return DataLoader(TensorDataset(images, torch.tensor(labels[:640])), batch_size=BATCH)


def trained(
    module: pl.LightningModule, data: DataLoader, *callbacks: pl.Callback, epochs: int = EPOCHS, ckpt_path=None, **more
):
    """The fit, and what was seen after each of its steps."""
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks, watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, watch


def theirs(make=mlp, optimizer: str = "momentum") -> Theirs:
    torch.manual_seed(0)
    return Theirs(make(), optimizer)


def total(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [mlp, cnn])
def test_pruned_at_once_or_step_by_step_nothing_comes_back(make, optimizer, digits):
    module = theirs(make, optimizer)
    kept = round(0.05 * total(module))
    _, watch = trained(module, digits, PruneCallback(0.95))
    assert watch.outside == 0 and watch.kept == [kept] * 20 and all(0 < n <= kept for n in watch.nonzero)
    module = theirs(make, optimizer)
    _, watch = trained(module, digits, PruneCallback(0.95, schedule=Cubic(0.95, 2, 14, every=3)))
    assert watch.outside == 0 and watch.kept[:2] == [total(module)] * 2
    assert all(after <= before for before, after in pairwise(watch.kept))
    assert watch.kept[-1] == kept >= watch.nonzero[-1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_drop_and_grow_keeps_the_count_and_moves_the_masks(make, grow, precision, digits):
    module = theirs(make)
    rigl = DropAndGrowCallback(0.95, grow=grow, update_every=4)
    begin: dict[str, torch.Tensor] = {}

    class First(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if not begin:
                begin.update({name: mask.clone() for name, mask in Masks.of(module).masks().items()})

    _, watch = trained(module, digits, rigl, First(), precision=precision)
    kept = round(0.05 * total(module))
    assert watch.outside == 0 and watch.kept == [kept] * 20 and max(watch.nonzero) <= kept
    assert any(bool((mask != begin[name]).any()) for name, mask in Masks.of(module).masks().items())


def test_cycles_end_at_the_target_and_regrowth_adds_to_what_was_pruned(digits):
    module = theirs(cnn)
    _, watch = trained(module, digits, CyclicSparsityCallback(0.95, [6, 8], update_every=2))
    kept = round(0.05 * total(module))
    assert max(watch.kept) > 2 * kept and watch.kept[-6:] == [kept] * 6 and watch.outside == 0
    dense, module = theirs(cnn), theirs(cnn)
    back = RegrowCallback(Regrowth(0.95, 0.9, steps=1, every=10, begin=10), dense, score="magnitude")
    _, watch = trained(module, digits, PruneCallback(0.95), back)
    assert watch.kept == [kept] * 10 + [round(0.1 * total(module))] * 10 and watch.outside == 0


def test_dyrelu_fades_and_its_parameters_leave_the_optimizer(digits):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
    dyrelu.install(body, 8)
    images, labels = next(iter(digits))
    data = DataLoader(TensorDataset(images.expand(-1, 3, -1, -1), labels), batch_size=16)
    module = Theirs(body)
    before = len(list(module.parameters()))
    trainer, _ = trained(module, data, DyReLUPhasingCallback(2, 5))
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not dyrelu.activations(body) and len(list(module.parameters())) == 4 < before
    assert held == {id(p) for p in module.parameters()}


def test_where_callbacks_stand_does_not_matter(digits):
    """Prune, cycles, RigL and the watch in every order, in one Sparsify and in several: the same bits."""

    def run(order, apart: bool):
        module = theirs(cnn)
        masks = Masks.of(module)
        start = Prune(module, WeightSelector(masks, "random", "erk"), Constant(0.95), seed=3)
        cycles = CyclicSparsity(module, masks, 20, Cyclic(0.95, (8,), 3.0, 2), seed=3)
        rigl = RigL(module, masks, 20, DropFraction(2, 8, 18, 0.3), seed=3)
        parts = [(start, cycles, rigl)[number] for number in order]
        callbacks = [Sparsify(one) for one in parts] if apart else [Sparsify(*parts)]
        _, watch = trained(module, digits, *callbacks)
        assert watch.outside == 0
        return {name: value.clone() for name, value in module.state_dict().items()}

    wanted = run((0, 1, 2), apart=False)
    orders = list(permutations(range(3)))
    for order, apart in [(orders[5], False), (orders[3], True), (random.choice(orders), True)]:
        found = run(order, apart)
        assert all(torch.equal(value, found[name]) for name, value in wanted.items()), (order, apart)


@pytest.mark.parametrize("make", [lambda: PruneCallback(0.9, schedule=Cubic(0.9, 3, 17, every=4)),
                                  lambda: DropAndGrowCallback(0.95, update_every=3),
                                  lambda: CyclicSparsityCallback(0.95, [12], update_every=3)])  # fmt: skip
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(make, digits, tmp_path):
    class SaveHalf(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole = theirs(cnn, "adam")
    trained(whole, digits, make(), SaveHalf())
    torch.manual_seed(7)  # a new process
    again = Theirs(cnn(), "adam")
    _, watch = trained(again, digits, make(), ckpt_path=tmp_path / "half.ckpt")
    assert len(watch.kept) == 10 and watch.outside == 0
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_weights_in_two_optimizers_are_refused_and_other_parameters_may_lie_elsewhere(digits):
    class Split(Theirs):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.body[first : first + 4].parameters(), lr=0.1) for first in (0, 4)]

    module = theirs(mlp)
    module.__class__ = Split
    with pytest.raises(SparseLabError, match="2 optimizers move the weights that have masks"):
        trained(module, digits, PruneCallback(0.9))


def test_what_would_change_nothing_is_refused():
    for wrong, said in (
        (lambda: Sparsify(), "would change nothing"),
        (lambda: Sparsify(sparsity=0.9), "would change nothing"),
        (lambda: Sparsify(update_every=3), "would change nothing"),
        (lambda: Sparsify("rigl", 0.9), "Sparsify\\('rigl'\\): algorithms that are made"),
        (lambda: Sparsify(RigL), "algorithms that are made"),
        (lambda: Sparsify(method="rigl", sparsity=0.9, total_steps=3), "the Trainer says how long"),
    ):
        with pytest.raises(SparseLabError, match=said):
            wrong()


def test_a_second_fit_goes_on_and_one_of_another_module_begins_anew(digits):
    """What a method has done in one fit it does not do again in the next: the mask is not drawn anew, and a schedule
    that is over stays over.
    """
    for settings in ({"method": "static"}, {"method": "gmp", "every": 2}):
        callback = Sparsify(sparsity=0.9, **settings)
        module = theirs()
        trained(module, digits, callback)
        masks = {name: mask.clone() for name, mask in callback.handle.masks.masks().items()}
        _, watch = trained(module, digits, callback)
        assert watch.outside == 0 and callback.handle.step == 40
        assert all(torch.equal(mask, masks[name]) for name, mask in callback.handle.masks.masks().items())
        other = theirs()
        _, watch = trained(other, digits, callback)
        assert watch.outside == 0 and callback.handle.network is other and callback.handle.step == 20
        assert watch.kept[-1] == round((1.0 - 0.9) * total(other))


def test_averages_of_the_weights_end_in_the_masks_or_are_refused(digits):
    def rigl():
        return Sparsify(method="rigl", sparsity=0.9, update_every=2)

    for average in (StochasticWeightAveraging(1e-2, swa_epoch_start=1), WeightAveraging(use_buffers=False)):
        module = theirs()
        trained(module, digits, rigl(), average)
        assert all(not layer.weight[~layer.mask].any() for layer in module.modules() if hasattr(layer, "mask"))
    with pytest.raises(SparseLabError, match="WeightAveraging would average the masks: give it use_buffers=False"):
        trained(theirs(), digits, rigl(), WeightAveraging())
    with pytest.raises(SparseLabError, match="put Sparsify before it"):
        trained(theirs(), digits, WeightAveraging(use_buffers=False), rigl())


def test_scores_of_a_module_without_forward_say_so(digits):
    class Mute(Theirs):
        forward = pl.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.body(batch[0]), batch[1])

    with pytest.raises(SparseLabError, match=r"Mute has no forward\(\)"):
        trained(Mute(mlp()), digits, Sparsify(method="snip", sparsity=0.9))
    module = Mute(mlp())
    trained(module, digits, Sparsify(method="rigl", sparsity=0.9, update_every=2))


def test_a_training_without_an_end_is_asked_for_one(digits):
    with pytest.raises(SparseLabError, match="max_epochs or max_steps"):
        trained(theirs(), digits, DropAndGrowCallback(0.9), epochs=-1)


def test_what_hangs_already_is_not_hung_twice():
    network = mlp()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    prune = Prune(network, WeightSelector(Masks.of(network)), Constant(0.9))
    prune.attach(optimizer)
    with pytest.raises(SparseLabError, match="attached already"):
        prune.attach(optimizer)
    prune.detach()
    prune.attach(optimizer)
    assert DyReLUPhasing.order < Prune.order < RigL.order
