"""What the command and the library can both do has the same bits: one run of each, of every kind of method."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional

import sparse_lab
from sparse_lab import data
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.methods.networks import build_model
from sparse_lab.training.checkpoint_io import load_network
from sparse_lab.training.optimizers import learning_rate, make_optimizer, parameter_groups

EPOCHS, STEPS = 6, 12
# method -> its settings, in the library's words and in the command's
METHODS = {
    "rigl": ({"update_every": 3}, ["method.drop_and_grow.update_every=3"]),
    "set": ({"update_every": 2}, ["method.drop_and_grow.update_every=2"]),
    "mest": ({"update_every": 1}, ["method.elastic_mutation.update_every=1"]),
    "gmp": ({"every": 2}, ["schedule.cubic.every=2"]),
    "granet": (
        {"update_every": 2, "cubic": {"every": 2}},
        ["method.drop_and_grow.update_every=2", "schedule.cubic.every=2"],
    ),
    "acdc": ({}, []),
    "snip": ({}, []),
    "synflow": ({"iterations": 5}, ["method.prune.iterations=5"]),
    "sfp": ({}, []),
    "dctps": ({}, []),
    "prune_on_the_fly": ({"every": 2}, ["method.hypersphere.every=2"]),
    "east": (
        {"cycles": {"every": 1}, "drop_and_grow": {"update_every": 2}},
        ["method.cycles.every=1", "method.drop_and_grow.update_every=2", "model=resnet34"],
    ),
}


def by_command(compose_under, quiet, tmp_path, method: str, *words: str):
    config = compose_under(
        tmp_path, f"method={method}", "sparsity.target=0.9", f"training.epochs={EPOCHS}", "training.select=last",
        "dataset.image_size=32", *words,
    )  # fmt: skip
    run(config, "", quiet)
    return config, load_network(run_dir(config).best)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.every(3)
def test_a_plain_loop_has_the_commands_bits(method, compose_under, quiet, tmp_path):
    settings, words = METHODS[method]
    config, wanted = by_command(compose_under, quiet, tmp_path, method, *words)
    pl.seed_everything(config.seed, verbose=False)
    batches = data.build(config.dataset, config.training, config.seed)
    network = build_model(config)
    assert len(batches.train) * EPOCHS == STEPS
    handle = sparse_lab.sparsify(
        network,
        method,
        0.9,
        total_steps=STEPS,
        epochs=EPOCHS,
        batches=batches.train.fixed(10) if method != "snip" else batches.train.balanced(10),
        input_shape=(3, 32, 32),
        seed=config.seed,
        **({"per_class": None} if method == "snip" else {}),
        **settings,
    )
    optimizer = make_optimizer(parameter_groups(network), config.training)
    handle.attach(optimizer)
    step = 0
    for epoch in range(EPOCHS):
        batches.train.set_epoch(epoch)
        for images, labels in batches.train:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.training, step, STEPS)
            optimizer.zero_grad()
            functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            step += 1
    assert handle.step == STEPS
    found = sparse_lab.plain_state_dict(network)
    plain = {name: value for name, value in wanted.items() if not name.endswith(".mask")}
    if method in ("dctps", "prune_on_the_fly"):  # the run keeps its offsets beside the weights
        found = {name: value for name, value in network.state_dict().items() if not name.endswith(".mask")}
    assert found.keys() == plain.keys()
    assert all(torch.equal(value, found[name]) for name, value in plain.items())
    if method != "sfp":
        masks = {name: value for name, value in wanted.items() if name.endswith(".mask")}
        own = network.state_dict()
        assert all(torch.equal(own[name], masks[name]) for name in masks.keys() & own.keys())


class Theirs(pl.LightningModule):
    """Somebody's own module around a network, with the recipe of the command's run."""

    def __init__(self, network, config) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.example_input_array = torch.zeros(1, 3, 32, 32)

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, index):
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = learning_rate(self.config.training, self.trainer.global_step, STEPS)
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return make_optimizer(parameter_groups(self.network), self.config.training)


@pytest.mark.parametrize("method", ["rigl", "mest", "east", "snip"])
@pytest.mark.every(2)
def test_lightning_has_them_too_stopped_and_gone_on_with(method, compose_under, quiet, tmp_path):
    settings, words = METHODS[method]
    config, wanted = by_command(compose_under, quiet, tmp_path, method, *words)
    given = {"seed": config.seed, **settings}

    def fitted(*more: pl.Callback, path=None) -> Theirs:
        pl.seed_everything(config.seed if path is None else 77, verbose=False)
        batches = data.build(config.dataset, config.training, config.seed)
        scored = {} if method != "snip" else {"batches": batches.train.balanced(10), "per_class": None}
        callback = sparse_lab.callbacks.Sparsify(method=method, sparsity=0.9, **scored, **given)
        module = Theirs(build_model(config), config)
        trainer = pl.Trainer(
            max_epochs=EPOCHS, callbacks=[callback, *more], logger=False, enable_progress_bar=False, accelerator="cpu",
            enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, batches.train, ckpt_path=path)
        assert callback.handle is not None and callback.handle.step == STEPS
        return module

    saved = tmp_path / "half.ckpt"
    whole = fitted(SaveAt(2, saved))
    plain = {name: value for name, value in wanted.items() if not name.endswith(".mask")}
    assert all(torch.equal(value, plain[name]) for name, value in sparse_lab.plain_state_dict(whole.network).items())
    again = fitted(path=saved)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


class SaveAt(pl.Callback):
    def __init__(self, epoch: int, path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
