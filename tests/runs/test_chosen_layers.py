"""sparsity.exclude and sparsity.layers through whole runs of every kind of method, and what is refused before any."""

from __future__ import annotations

import runpy
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from sparse_lab import models
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import identity, run_dir, run_name
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.validate import check_request
from sparse_lab.export.load_run import finished
from sparse_lab.methods import table
from sparse_lab.sparsity.masks import Masks, layers, num_kept
from sparse_lab.training.checkpoint_io import load_network

TABLE = runpy.run_path(str(Path(__file__).with_name("test_every_method.py")), run_name="table")
METHODS, FILTERS, COMMON, length = TABLE["METHODS"], TABLE["FILTERS"], TABLE["COMMON"], TABLE["length"]
# one of each way to change masks
SLOW = (
    "oneshot_regrow",
    "l1_filters",
    "east",
    "granet",
    "mest_soft",
    "acdc",
    "dctps_rigl",
    "synflow",
    "lth",
    "resrep",
    "prune_on_the_fly",
)
# the first layer is left out; the head and the widest layers have sparsities of their own
VGG = "features.0", {"classifier.0": 0.5, "features.3?": 0.95}
RESNET = "conv1", {"fc": 0.5, "layer2.*": 0.95}


@pytest.mark.parametrize("method", ["rigl", *(pytest.param(name, marks=pytest.mark.full) for name in SLOW)])
def test_counts_are_exact_at_every_change_and_what_is_left_out_stays_dense(method, compose, quiet, monkeypatch):
    out, own = RESNET if method == "east" else VGG
    words = [f"sparsity.exclude=[{out}]"]
    if method not in FILTERS:
        words.append(f"sparsity.layers={{{','.join(f'{name}:{value}' for name, value in own.items())}}}")
    seen: list[dict[str, int]] = []
    set_masks = Masks.set

    def watched(self: Masks, *rest, **more) -> None:
        set_masks(self, *rest, **more)
        if "training" in self._uses or self.total() > self.kept():
            seen.append(self.kept_by_layer() | {"kept": self.kept(), "total": self.total()})
        assert out not in self.layers

    monkeypatch.setattr(Masks, "set", watched)
    config = compose(f"method={method}", *length(method), *METHODS[method], *COMMON, *words)
    result = run(config, "x", quiet)
    check_record(result, out, config)
    if method in FILTERS:
        return
    assert result["kept"] == num_kept(0.9, result["total"])
    sizes = {name: layer.weight.numel() for name, layer in plain_layers(config).items()}
    assert seen
    for counts in seen:
        check_counts(counts, sizes, own)
    last = {row["name"]: row["kept"] for row in result["layers"]}
    assert values(last, own)
    check_counts(last | {key: result[key] for key in ("kept", "total")}, sizes, own)


def check_counts(counts: dict[str, int], sizes: dict[str, int], own: dict[str, float]) -> None:
    """At the target to the weight; before it and beyond it in proportion, to the weight that rounding may take."""
    kept, total = counts["kept"], counts["total"]
    sparsity = 1 - kept / total
    for name, value in values(counts, own).items():
        if kept == num_kept(0.9, total):
            assert counts[name] == round((1 - value) * sizes[name]), name
            continue
        density = 1 - value * sparsity / 0.9 if sparsity < 0.9 else (1 - value) * (1 - sparsity) / 0.1
        assert abs(counts[name] - max(1.0, density * sizes[name])) <= 1.0, (name, sparsity)


def values(counts: dict[str, int], own: dict[str, float]) -> dict[str, float]:
    """The sparsity of each layer here that has its own."""
    return {name: value for pattern, value in own.items() for name in counts if fnmatch(name, pattern)}


def plain_layers(config) -> dict:
    model = models.build(config.model.name, config.dataset.num_classes, config.model.width, config.dataset.image_size)
    return layers(model)


def check_record(result, out: str, config) -> None:
    """Not in the total, named, dense, trained, and in the network that is exported."""
    excluded = [one for one in result["uncounted"] if one["kind"] == "excluded"]
    assert [one["name"] for one in excluded] == [f"{out}.weight"]
    assert out not in {row["name"] for row in result["layers"]}
    assert sum(row["kept"] for row in result["layers"]) == result["kept"]
    state = load_network(run_dir(config).best)
    assert f"{out}.mask" not in state and bool((state[f"{out}.weight"] != 0).all())
    torch.testing.assert_close(finished(run_dir(config).path).model.get_submodule(out).weight, state[f"{out}.weight"])


def test_a_run_that_starts_from_others_has_their_layer_and_they_their_names(compose):
    plain = compose("method=oneshot_regrow", *COMMON)
    chosen = compose("method=oneshot_regrow", *COMMON, "sparsity.exclude=[features.0]", "sparsity.layers={Linear:0.5}")
    assert run_name(plain) != run_name(chosen)
    assert run_name(table.starts(plain)["dense"]) == run_name(table.starts(chosen)["dense"])
    parent = table.starts(chosen)["parent"]
    assert run_name(parent) != run_name(table.starts(plain)["parent"])
    # 96% with 0.03 of regrowth and a target of 90%: the head keeps 0.7 of the half that it ends with
    assert parent.sparsity.layers == {"Linear": 0.65} and parent.sparsity.exclude == ["features.0"]
    assert identity(chosen)["settings"]["sparsity"]["layers"] == {"Linear": 0.5}
    assert "layers" not in identity(plain)["settings"]["sparsity"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("sparsity.exclude=[feature.0]",),
            "sparsity.exclude: 'feature.0' matches no layer.*did you mean 'features.0'",
        ),
        (("sparsity.include=[ReLU]",), "sparsity.include: 'ReLU' names ReLU alone"),
        (("sparsity.exclude=[Linear,Conv2d]",), "leaves no layer to count"),
        (("sparsity.layers={Conv2d:0.5}",), "sparsity.layers keep .* at most sparsity.target=0.50"),
        (("sparsity.layers={Conv2d:0.9999}", "sparsity.target=0.5"), "at least sparsity.target="),
        (("sparsity.layers={Conv2d:0.9,features.0:0.8}",), "gives 'features.0' 0.9 and 'features.0' 0.8"),
        (("method=l1_filters", "sparsity.layers={features.0:0.2}"), "whole filters go by method.filters.rates"),
        (
            (
                "method=oneshot_regrow",
                "method.regrow.distribution=given",
                "method.regrow.given=[features.3]",
                "sparsity.layers={features.3:0.2}",
            ),
            "method.regrow.given: 'features.3' regrows by sparsity.layers",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(words, line, compose):
    config = compose("method=rigl", "sparsity.target=0.9", *words)
    with pytest.raises(UserError, match=line) as caught:
        check_request(config)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_sparse_arithmetic_computes_what_is_left_out_densely(compose, quiet):
    words = (
        "method=rigl",
        *COMMON,
        *METHODS["rigl"],
        "sparsity.exclude=[features.0,Linear]",
        "trainer.precision=64-true",
    )
    both = [compose(*words, how) for how in ("compute=dense", "compute=sparse")]
    for config in both:
        run(config, "x", quiet)
    first, second = (load_network(run_dir(config).best) for config in both)
    for name, value in first.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, second[name]), name
        else:
            torch.testing.assert_close(value, second[name], rtol=1e-6, atol=1e-8, msg=name)
