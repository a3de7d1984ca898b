"""Networks of one's own, of torchvision and of timm, through whole runs of a method of each kind: the promises of every
run (masks exact after each step, the same bits after a stop and a death, a report), and an export equal to the network.
Pairs of them by day, all by night.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch

from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.experiment import plugins
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.validate import check
from sparse_lab.export.export import export
from sparse_lab.export.load_run import finished, images
from sparse_lab.models import build
from sparse_lab.sweep.plan import Request
from sparse_lab.training.checkpoint_io import load_network
from tests.runs.promises import End, check_report, die, stop

OWN = """
from pathlib import Path
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self, classes, channels, depth):
        super().__init__()
        widths = [channels, *[8] * depth]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        for conv in self.convs:
            x = functional.relu(conv(x))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))

@sparse_lab.register_model
def own_cnn(num_classes, channels, *, depth: int = 2):
    return Net(num_classes, channels, depth)

sparse_lab.register_choices(Path(__file__).with_name("conf"))
"""
NETWORKS: dict[str, tuple[str, ...]] = {
    "own": ("model=own_cnn", "model.options.depth=3"),
    "torchvision resnet18": ("model=torchvision", "model.arch=resnet18"),
    "mobilenet_v3_small": ("model=torchvision", "model.arch=mobilenet_v3_small"),
    "efficientnet_b0": ("model=torchvision", "model.arch=efficientnet_b0"),
    "timm resnet18": ("model=timm", "model.arch=resnet18", "model.adapt_stem=true", "dataset.image_size=16"),
    "convnext_atto": ("model=timm", "model.arch=convnext_atto"),
    "vit_tiny": ("model=timm", "model.arch=vit_tiny_patch16_224", "model.options={patch_size:4,depth:2}"),
    "mixer": ("model=mixer", "model.options={depth:2,dim:32}"),
}
METHODS: dict[str, tuple[str, ...]] = {
    "oneshot": (),
    "gmp": ("schedule.cubic.every=1",),
    "rigl": ("method.drop_and_grow.update_every=2",),
    "oneshot_regrow": ("method.regrow.budget=0.03",),
    "east": (
        "method.drop_and_grow.update_every=2",
        "method.cycles.every=1",
        "method.dyrelu.unit=epochs",
        "method.dyrelu.begin=1",
        "method.dyrelu.end=2",
    ),
}
# why EAST does not fit, in its own words; with method.sharing=null it fits the two ResNets
NO_EAST = {
    "own": "no stage of it has blocks that repeat",
    "torchvision resnet18": "no stage of it has blocks that repeat",
    "mobilenet_v3_small": "no stage of it has blocks that repeat",
    "efficientnet_b0": "it has no ReLU",
    "timm resnet18": "no stage of it has blocks that repeat",
    "convnext_atto": "it has no ReLU",
    "vit_tiny": "no stage of it has blocks that repeat",
    "mixer": "no stage of it has blocks that repeat",
}
DAY = {("own", "rigl"), ("mixer", "oneshot_regrow")}
# a minute or more
LONG = {"torchvision resnet18", "timm resnet18", "efficientnet_b0"}
ALL = {
    ("mobilenet_v3_small", "gmp"),
    ("vit_tiny", "rigl"),
    ("timm resnet18", "oneshot"),
    ("torchvision resnet18", "east"),
}
COMMON = (
    "model.width=1",
    "sparsity.target=0.9",
    "training.epochs=3",
    "training.finetune.epochs=3",
    "training.regrow.epochs=3",
    "diagnostics.gradients=true",
)


@pytest.fixture
def compose_anew(small) -> Callable[..., Config]:
    """As compose_under, by a composer that knows the plugins of this test."""

    def compose(outputs, *words: str) -> Config:
        every = (f"paths.outputs={outputs}", *small, *words)
        return Request.read([]).composer().config(dict(one.split("=", 1) for one in every))

    return compose


@pytest.fixture
def asked(plugin, compose_anew, with_starts, tmp_path) -> Callable[..., list[Config]]:
    """asked(network, method) -> the same request in two folders; what it starts from lies there, finished."""
    path = plugin(OWN)
    (path.parent / "conf" / "model").mkdir(parents=True)
    (path.parent / "conf" / "model" / "own_cnn.yaml").write_text("name: own_cnn\n")
    plugins.load(str(path))

    def make(network: str, method: str) -> list[Config]:
        words = (f"method={method}", *COMMON, *METHODS[method], *NETWORKS[network])
        if method == "east":
            words = (*words, "method.sharing=null")
        config = compose_anew(tmp_path, *words)
        outputs = (str(tmp_path / name) for name in ("whole", "broken"))
        return [with_starts(replace(config, paths=replace(config.paths, outputs=folder))) for folder in outputs]

    return make


def _marks(network: str, method: str) -> list[pytest.MarkDecorator]:
    if (network, method) in DAY:
        return []
    return [pytest.mark.full if (network, method) in ALL else pytest.mark.nightly(long=network in LONG)]


@pytest.mark.parametrize(
    ("network", "method"),
    [
        pytest.param(network, method, marks=_marks(network, method))
        for network, method in product(NETWORKS, METHODS)
        if method != "east" or network in ("torchvision resnet18", "timm resnet18")
    ],
)
@pytest.mark.filterwarnings("ignore:.*not counted")
def test_every_promise_holds_on_any_network(network, method, asked, watched, check_interrupted, quiet, tmp_path):
    whole, broken = asked(network, method)
    watched.clear()
    result = run(whole, "test", quiet)
    steps = dict(watched)
    assert sorted(steps) == list(range(1, 7))
    assert result["kept"] == round(0.1 * result["total"])
    state = load_network(run_dir(whole).best)
    masks = {name: value for name, value in state.items() if name.endswith(".mask")}
    assert sum(int(mask.sum()) for mask in masks.values()) == result["kept"]
    assert all(not state[name.removesuffix("mask") + "weight"][~mask].any() for name, mask in masks.items())
    check_report(whole, result)
    check_export(whole, tmp_path)
    check_interrupted(broken, [End(stop, 3), End(die, 5)], whole, steps)


def check_export(config: Config, tmp_path) -> None:
    """Each file's logits are the network's, in float64, to 1e-5 of the largest; where the network itself amplifies
    float32's rounding more than that, to some times what torch loses, on the same images.
    """
    exported = finished(run_dir(config).path)
    shown, _ = images(exported, 64)
    own = 0.0
    for batch in (shown[:1], shown):
        with torch.no_grad():
            rounded, exact = exported.model(batch), copy.deepcopy(exported.model).double()(batch.double())
        own = max(own, float((rounded - exact).abs().max() / exact.abs().max()))
    found = export(exported, {kind: tmp_path / f"network.{kind}" for kind in ("packed", "onnx", "torch")})
    assert set(found["difference"]) == {"packed", "onnx", "torch"}
    assert max(found["difference"].values()) < max(1e-5, 8 * own)


@pytest.mark.every(4)
@pytest.mark.parametrize("network", NO_EAST)
def test_east_whole_is_refused_in_one_line(network, asked, compose_anew, tmp_path):
    config = compose_anew(tmp_path, "method=east", *COMMON, *NETWORKS[network])
    with pytest.raises(UserError, match=NO_EAST[network]) as caught:
        check(config)
    assert "\n" not in str(caught.value) and "=null" in str(caught.value)


@pytest.mark.parametrize("options", [{"depth": 1}, {"depth": 2, "dim": 96, "heads": 2}])
def test_options_are_a_part_of_the_network_and_of_its_runs_name(options, compose_under, tmp_path):
    """What is written in two ways, or is the default, is one run."""
    words = [f"model.options.{key}={value}" for key, value in options.items()]
    config = compose_under(tmp_path, "model=vit", "model.width=1", *words)
    network = build("vit", options=config.model.options)
    d, depth = options.get("dim", 192), options["depth"]
    block = (
        4 * d + 4 * (d * d + d) + 2 * 4 * d * d + 5 * d
    )  # two LayerNorms, four projections, an MLP four times as wide
    assert sum(one.numel() for one in network.parameters()) == (49 + 1 + 65 + 2 + 10) * d + 10 + depth * block
    mapping = f"model.options={{{','.join(f'{key}:{value}' for key, value in reversed(options.items()))}}}"
    again = compose_under(tmp_path, "model=vit", "model.width=1", mapping, "model.options.patch_size=4")
    other = compose_under(tmp_path, "model=vit", "model.width=1")
    assert run_dir(config).name == run_dir(again).name != run_dir(other).name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model=torchvision",), "needs the name of a network there"),
        (("model=torchvision", "model.arch=inception_v3"), "does not go through Inception3"),
        (("model=own_cnn", "model.options.width=3"), "no option of own_cnn; .*known: depth"),
        (("model=own_cnn", "model.options.depth=three"), "own_cnn takes a whole number there"),
        (("model=own_cnn", "model.adapt_stem=true"), "its stem is what its function makes"),
        (("model=vit", "dataset.image_size=30"), "does not divide images of 30x30"),
        (("model=timm", "model.arch=a/b"), "is part of a folder's name"),
        (("model=timm", "model.arch=resnetv2_50x1_bit"), r"no mask would hold.*sparsity\.exclude=\[StdConv2d\]"),
        (("model=torchvision", "model.arch=resnet18", "model.options.block=3"), "says itself what that is"),
        (
            ("model=torchvision", "model.arch=resnet18", "model.options.zero_init_residual=3"),
            "takes true or false there",
        ),
        (("model=mixer", "model.options.dropout=2.0"), "must be 0 or more, and below 1"),
    ],
)
def test_bad_requests_are_one_line_before_training(words, said, asked, compose_anew, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        check(compose_anew(tmp_path, "method=rigl", "model.width=1", *words))
    assert "\n" not in str(caught.value)


def test_a_network_that_makes_no_logits_is_refused(plugin, compose_anew, tmp_path):
    path = plugin(
        """
        from pathlib import Path
        from torch import nn

        @sparse_lab.register_model
        def headless(num_classes):
            return nn.Conv2d(3, num_classes, 3)

        sparse_lab.register_choices(Path(__file__).with_name("conf"))
        """
    )
    (path.parent / "conf" / "model").mkdir(parents=True)
    (path.parent / "conf" / "model" / "headless.yaml").write_text("name: headless\n")
    plugins.load(str(path))
    for words, said in (
        ((), r"headless makes \(1, 10, 30, 30\) of an image, and no logits \(1, 10\)"),
        (("dataset.channels=1", "dataset.mean=[0.5]", "dataset.std=[0.5]"), "its function takes no `channels`"),
        (("model.width=0.5",), "has one width"),
    ):
        with pytest.raises(UserError, match=said):
            check(compose_anew(tmp_path, "method=rigl", "model=headless", "model.width=1", *words))


def test_registering_refuses_what_is_no_option():
    import sparse_lab
    from sparse_lab.errors import SparseLabError

    for function in (lambda depth=3: None, lambda num_classes, depth: None, lambda num_classes, **more: None):
        function.__name__ = "unlikely"
        with pytest.raises(SparseLabError, match="takes num_classes, image_size, channels, width and options"):
            sparse_lab.register_model(function)


def test_non_square_and_grey_images_reach_a_function_as_they_are():
    import sparse_lab
    from sparse_lab.registering import REGISTERED, take_out

    seen = []

    @sparse_lab.register_model
    def watching(num_classes, image_size, channels, width):
        seen.append((num_classes, image_size, channels, width))
        return torch.nn.Linear(3, 2)

    build("watching", 4, 0.5, (24, 32), channels=1)
    build("watching", 4, image_size=24)
    assert seen == [(4, (24, 32), 1, 0.5), (4, 24, 3, 1.0)]
    take_out(REGISTERED[-1:])
