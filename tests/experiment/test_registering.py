"""What each register_* function takes, refuses and makes known; behind a test all of it is unknown again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

import sparse_lab
from sparse_lab import config as schema
from sparse_lab import data, models
from sparse_lab.config import Config, MethodConfig, ScheduleConfig, TrainingConfig, key, parts_of
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.experiment.compose import LEAVES, PARTS
from sparse_lab.experiment.settings_read import without_effect
from sparse_lab.methods import base, schedules, table
from sparse_lab.registering import REGISTERED, take_out
from sparse_lab.sparsity import distributions, names, scores
from sparse_lab.sparsity.structured import filter_scores
from sparse_lab.sweep.plan import Request


@pytest.fixture(autouse=True)
def _taken_out():
    known = {
        **{
            id(one): set(one)
            for one in (names.FROM_GRADIENTS, names.WITHOUT_DATA, names.DISTRIBUTIONS, data.reads.MADE)
        },
        **{id(one): set(one) for one in (scores.SCORES, scores.OF_WEIGHTS, scores.OWN_PASSES, scores.WITHOUT_PASSES)},
        **{id(one): set(one) for one in (PARTS, LEAVES, table.COMPONENTS, schedules.KINDS)},
    }
    kept = [names.FROM_GRADIENTS, names.WITHOUT_DATA, names.DISTRIBUTIONS, data.reads.MADE, scores.SCORES]
    kept += [
        scores.OF_WEIGHTS,
        scores.OWN_PASSES,
        scores.WITHOUT_PASSES,
        PARTS,
        LEAVES,
        table.COMPONENTS,
        schedules.KINDS,
    ]
    yield
    take_out(REGISTERED)
    assert not REGISTERED and all(set(one) == known[id(one)] for one in kept)


def small(*words: str) -> Config:
    return Request.read([]).composer().config(dict(word.split("=", 1) for word in words))


@dataclass
class Settings:
    """Own settings, in one line.

    And more.
    """

    much: float = key(0.5, "how much", low=0.0, high=1.0)
    kinds: list[str] = key(list, "which", choices=("a", "b"))


class Part(base.Component):
    part = "own_part"


class Kind(schedules.Kind):
    def build(self, config, clock):
        return schedules.Constant(config.sparsity.target)


@pytest.mark.parametrize("given", [{}, {"of_weights": True}, {"own_passes": True}, {"without_passes": True}])
def test_a_score_says_what_a_request_must_know(given):
    @sparse_lab.register_score(**given)
    def own(view):
        return {name: weight.abs() for name, weight in view.weights().items()}

    assert ("own" in scores.OF_WEIGHTS, "own" in scores.OWN_PASSES) == ("of_weights" in given, "own_passes" in given)
    free = "without_passes" in given
    assert ("own" in base.WITHOUT_DATA, "own" in base.FROM_GRADIENTS) == (free, not free)
    assert ("own" in scores.WITHOUT_PASSES) is free
    looks = "method.prune.batches" not in without_effect(small("method=oneshot", "method.prune.score=own"))
    assert looks is not free
    with pytest.raises(SparseLabError, match="score 'own' is taken: choose another name"):
        sparse_lab.register_score(own)


def test_a_score_that_returns_something_else_says_so():
    @sparse_lab.register_score
    def own(view):
        return {name: weight.sum() for name, weight in view.weights().items()}

    with pytest.raises(SparseLabError, match=r"score 'own' returns no tensor of shape \[2, 3\] for layer 0"):
        scores.find_score("own")(scores.View(nn.Sequential(nn.Linear(3, 2))))


def test_a_filter_score():
    @sparse_lab.register_filter_score(without_passes=True)
    def widest(view):
        return {
            name: layer.weight.abs().amax((1, 2, 3)).double()
            for name, layer in filter_scores.filtered(view.model).items()
        }

    assert filter_scores.find_filter_score("widest") is widest and "widest" in base.WITHOUT_DATA
    for register in (sparse_lab.register_score, sparse_lab.register_filter_score):  # one key takes both
        with pytest.raises(SparseLabError, match="'widest' is taken"):
            register(widest)


def test_a_distribution_is_a_choice_and_exact():
    @sparse_lab.register_distribution
    def by_inputs(shapes):
        return {name: float(shape[1]) for name, shape in shapes.items()}

    config = small("method=static", "method.prune.distribution=by_inputs")
    assert config.method.prune.distribution == "by_inputs"
    weights = {"a": torch.ones(10, 30), "b": torch.ones(10, 10)}
    alive = {name: weight.bool() for name, weight in weights.items()}
    assert distributions.distribute("by_inputs", 40, weights, weights, alive) == {"a": 30, "b": 10}
    take_out(REGISTERED)
    with pytest.raises(UserError, match="distribution=by_inputs"):
        small("method=static", "method.prune.distribution=by_inputs")


def test_a_part_is_like_all_others():
    before = small("method=static")
    sparse_lab.register_algorithm(Part(), Settings)
    assert parts_of(MethodConfig)["own_part"] is Settings and LEAVES["method.own_part.much"] is float
    config = small("method=static", "method.own_part.much=0.25")
    assert config.method.own_part is None and before.method.own_part is None
    assert small("method=static", "method.own_part={much: 0.25}").method.own_part.much == 0.25
    for word, said in (("much=2", r"outside \[0, 1\]"), ("much=x", "Float"), ("kinds=[c]", "known: a, b")):
        with pytest.raises(UserError, match=said):
            small("method=static", "method.own_part={}", f"method.own_part.{word}")
    assert MethodConfig(own_part=Settings()) == MethodConfig(own_part=Settings()) != MethodConfig()
    assert table.present(MethodConfig(own_part=Settings())) == [table.COMPONENTS["own_part"]]
    take_out(REGISTERED)
    assert "own_part" not in vars(MethodConfig()) and MethodConfig() == MethodConfig()
    with pytest.raises(UserError, match=r"unknown key 'method.own_part"):
        Request.read(["method.own_part={}"])


def test_a_schedule_is_one_of_all():
    sparse_lab.register_schedule("own", Kind(), Settings)
    config = small("schedule.own={}", "schedule.one_shot=null")
    assert isinstance(schedules.kind_of(config.schedule), Kind) and config.schedule.own == Settings()
    assert list(parts_of(ScheduleConfig))[-1] == "own"


@dataclass
class Plain:
    much: float = 0.5


@dataclass
class Needs:
    much: float = field(metadata=key(0.5, "x").metadata)


@dataclass
class Odd:
    much: float = key("text", "x")


@pytest.mark.parametrize(
    ("settings", "said"),
    [(Plain, "make Plain.much with sparse_lab.config.key"), (Needs, "Needs"), (Odd, "Odd"), (3, "a dataclass, not 3")],
)
def test_settings_that_no_config_holds(settings, said):
    with pytest.raises(SparseLabError, match=said):
        sparse_lab.register_algorithm(Part(), settings)
    with pytest.raises(SparseLabError, match=said):
        sparse_lab.register_schedule("own", Kind(), settings)
    assert "own_part" not in parts_of(MethodConfig)


@pytest.mark.parametrize("name", ["prune", "name", "summary", "drop_and_grow"])
def test_a_part_s_name_is_none_of_a_method_s(name):
    part = Part()
    part.part = name
    with pytest.raises(SparseLabError, match=f"algorithm '{name}' is taken"):
        sparse_lab.register_algorithm(part, Settings)
    with pytest.raises(SparseLabError, match="an instance of a subclass of Component"):
        sparse_lab.register_algorithm(Part, Settings)
    for taken in ("cubic", "name"):
        with pytest.raises(SparseLabError, match=f"schedule '{taken}' is taken"):
            sparse_lab.register_schedule(taken, Kind(), Settings)
    with pytest.raises(SparseLabError, match="an instance of a subclass of Kind"):
        sparse_lab.register_schedule("own", Kind, Settings)


def test_a_network():
    @sparse_lab.register_model(smallest=8)
    def own_net(num_classes, width, image_size):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

    assert "own_net" in models.names() and models.build("own_net", 7, image_size=8)[1].out_features == 7
    for wrong, said in (
        ({"image_size": 4}, "at least 8 pixels"),
        ({"weights": "torchvision"}, "exist for no own_net"),
    ):
        with pytest.raises(UserError, match=said):
            models.build("own_net", **wrong)
    with pytest.raises(SparseLabError, match="network 'vgg16' is taken"):
        own_net.__name__ = "vgg16"
        sparse_lab.register_model(own_net)

    @sparse_lab.register_model
    def no_net(num_classes, width, image_size):
        return None

    with pytest.raises(UserError, match=r"network 'no_net': its function returns NoneType, and no torch.nn.Module"):
        models.build("no_net")


def own_data(dataset, seed):
    images = (torch.arange(80 * 3 * 64) % 251).to(torch.uint8).view(80, 3, 8, 8)
    return images[:60], torch.arange(60) % 2, images[60:], torch.arange(20) % 2


def dataset_of(tmp_path):
    config = schema.DatasetConfig(name="own_data", root=str(tmp_path), num_classes=2, image_size=8)
    config.mean, config.std = [0.5] * 3, [0.25] * 3
    return config


def test_a_data_set_that_is_made(tmp_path):
    sparse_lab.register_dataset("own_data", own_data, files=None)
    config = dataset_of(tmp_path)
    data.check(config)
    built = data.build(config, TrainingConfig(batch_size=10), seed=1)
    assert built.images["test"] == (20, 20) and built.official and list(built.md5) == ["own_data"]
    assert data.fingerprint_of(config, tmp_path) == ""
    whole = Config(dataset=config)
    assert {"dataset.root", "dataset.verify", "dataset.download", "dataset.workers"} <= without_effect(whole).keys()
    with pytest.raises(SparseLabError, match="data set 'own_data' is taken"):
        sparse_lab.register_dataset("own_data", own_data, files=None)
    with pytest.raises(SparseLabError, match="load and files are functions"):
        sparse_lab.register_dataset("others", own_data, files="x.bin")


def test_a_data_set_that_is_read_counts_by_what_its_files_hold(tmp_path):
    sparse_lab.register_dataset("own_data", own_data, files=lambda dataset: ["a/one.bin", "two.bin"])
    config = dataset_of(tmp_path / "data")
    with pytest.raises(UserError, match=r"own_data is not in .*data: a/one.bin is missing"):
        data.check(config)
    assert data.fingerprint_of(config, tmp_path) == ""
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "one.bin").write_bytes(b"1")
    (tmp_path / "data" / "two.bin").write_bytes(b"2")
    data.check(config)
    first = data.fingerprint_of(config, tmp_path)
    (tmp_path / "data" / "two.bin").write_bytes(b"3")
    data.look_again()
    assert first and data.fingerprint_of(config, tmp_path) not in ("", first)
    assert "dataset.root" not in without_effect(Config(dataset=config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found[:3], "images, labels, test images and test labels are to be returned"),
        (lambda found: (found[0].half(), *found[1:]), r"training images are to be uint8 or float32 \[N, 3, 8, 8\]"),
        (lambda found: (found[0].float(), *found[1:]), r"test images are to be float32 \[N, 3, 8, 8\] .* not uint8"),
        (lambda found: (*found[:2], found[2][:, :1], found[3]), r"test images .* not uint8 \[20, 1, 8, 8\]"),
        (lambda found: (found[0], found[1].int(), *found[2:]), r"training labels are to be int64 \[60\], not"),
    ],
)
def test_a_data_set_of_another_kind(change, said, tmp_path):
    sparse_lab.register_dataset("own_data", lambda dataset, seed: change(own_data(dataset, seed)), files=None)
    with pytest.raises(UserError, match=said):
        data.build(dataset_of(tmp_path), TrainingConfig(batch_size=10), seed=1)


def test_a_data_set_of_floats_that_are_no_squares(tmp_path):
    """Any number of channels, any size; values as they are."""
    values = torch.arange(80 * 5 * 8 * 12).view(80, 5, 8, 12).float() / 1000
    labels = torch.arange(80) % 2
    sparse_lab.register_dataset("own_data", lambda *_: (values[:60], labels[:60], values[60:], labels[60:]), files=None)
    config = replace(dataset_of(tmp_path), channels=5, image_size=[8, 12], mean=None, std=None)
    built = data.build(config, TrainingConfig(batch_size=10), seed=1)
    assert built.scale == 1 and built.shape == (5, 8, 12)
    used = built.train.images.double()
    assert torch.allclose(torch.tensor(built.mean).double(), used.mean((0, 2, 3)))
    assert torch.allclose(torch.tensor(built.std).double(), used.std((0, 2, 3), correction=0))
    with pytest.raises(UserError, match=r"dataset\.num_classes=null: say how many labels"):
        data.build(replace(config, num_classes=None), TrainingConfig(batch_size=10), seed=1)


def test_choices(tmp_path):
    (tmp_path / "method").mkdir()
    for said, folder in (("no such folder", "conf"), ("no such folder", tmp_path / "no"), ("no GROUP/NAME", tmp_path)):
        with pytest.raises(SparseLabError, match=said):
            sparse_lab.register_choices(folder)
    (tmp_path / "method" / "rigl.yaml").write_text("name: rigl")
    with pytest.raises(SparseLabError, match="method 'rigl' is taken: choose another name"):
        sparse_lab.register_choices(tmp_path)
    (tmp_path / "method" / "rigl.yaml").rename(tmp_path / "method" / "own.yaml")
    sparse_lab.register_choices(tmp_path)
    with pytest.raises(SparseLabError, match="method 'own' is taken"):
        sparse_lab.register_choices(tmp_path)
