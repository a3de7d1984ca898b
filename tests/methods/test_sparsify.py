"""A method of the command on foreign networks in a plain loop: what holds after every step, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import sparse_lab
from sparse_lab.sparsity.masks import layers
from sparse_lab.sparsity.schedules import Cubic
from tests.methods.loops import CLASSES, NETWORKS, OPTIMIZERS, SIDE, Watch, batches, made, train

STEPS = 12
# method -> settings under which something happens within 12 steps of 4 epochs
METHODS = {
    "rigl": {"update_every": 3},
    "set": {"update_every": 3},
    "rigl_itop": {"update_every": 3},
    "set_itop": {"update_every": 3},
    "mest": {"update_every": 1},
    "mest_soft": {"update_every": 1},
    "granet": {"update_every": 2, "cubic": {"every": 2}},
    "gmp": {"every": 2},
    "acdc": {"turn": 0.2, "begin": 0.1},
    "static": {},
    "random_at_init": {},
    "magnitude_at_init": {},
    "snip": {},
    "grasp": {},
    "synflow": {},
    "dctps": {},
    "dctps_rigl": {"update_every": 3},
    "oneshot": {},
    "prune_on_the_fly": {"every": 2, "penalty": 0.1},
}
CONSTANT = (
    "rigl",
    "set",
    "rigl_itop",
    "set_itop",
    "static",
    "random_at_init",
    "snip",
    "grasp",
    "synflow",
    "dctps_rigl",
)
RECIPES = [
    (optimizer, precision, accumulate)
    for optimizer in OPTIMIZERS
    for precision in ("fp32", "bf16", "scaled")
    for accumulate in (1, 4)
]


def sparsified(name: str, method: str, sparsity: float = 0.9, **more):
    network = made(name)
    settings = {"batches": batches(3), "total_steps": STEPS, "epochs": 4, **METHODS.get(method, {}), **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a ViT's packed projections, of which a test of its own asks
        return network, sparse_lab.sparsify(network, method=method, sparsity=sparsity, **settings)


def attached(name: str, method: str, **more):
    network, handle = sparsified("cnn" if name == "dict" else name, method, **more)
    if name == "dict":  # a network whose output is one
        network.register_forward_hook(lambda module, inputs, output: {"logits": output})
        handle._loss = lambda outputs, targets: functional.cross_entropy(outputs["logits"], targets)
    handle.attach(OPTIMIZERS["momentum"](network.parameters()))
    return handle


def without_masks():
    handle = sparse_lab.sparsify(made("mlp"))
    handle.remove_masks()
    return handle


def tenth(name: str) -> int:
    """What a sparsity of 0.9 leaves of a network as it was made, with nothing shared."""
    return round((1.0 - 0.9) * sum(layer.weight.numel() for layer in layers(made(name)).values()))


def trained(name: str, method: str, optimizer: str = "momentum", precision: str = "fp32", accumulate: int = 1, **more):
    network, handle = sparsified(name, method, **more)
    moved = OPTIMIZERS[optimizer](network.parameters())
    handle.attach(moved)
    watch = Watch(handle, moved)
    skips = (0, 4, 5) if precision == "scaled" else ()
    steps = STEPS + len(skips)
    train(network, moved, steps, accumulate=accumulate, precision=precision, skips=skips, after=watch)
    assert handle.step == STEPS
    return network, handle, watch


# torch's attention takes the weight of its last layer past the layer, and an offset would be left behind
UNFIT = [("vit", "dctps"), ("vit", "dctps_rigl"), ("vit", "prune_on_the_fly")]


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for method in METHODS for name in ("cnn", "mlp", "vit") if (name, method) not in UNFIT],
)
@pytest.mark.every(3)
def test_every_method_on_a_foreign_network(name, method):
    _, handle, watch = trained(name, method)
    kept = tenth(name)
    if method != "prune_on_the_fly":  # prunes after the last step, and then puts means in
        assert watch.kept[-1] == handle.masks.kept() == kept
    if method in CONSTANT:
        assert set(watch.kept) == {kept}
    if "update_every" in METHODS[method]:
        assert any(not torch.equal(mask, watch.masks[0][layer]) for layer, mask in watch.masks[-1].items())


@pytest.mark.parametrize(("optimizer", "precision", "accumulate"), RECIPES)
@pytest.mark.parametrize(("name", "method"), [("cnn", "rigl"), ("mlp", "gmp"), ("vit", "set"), ("residual", "east")])
@pytest.mark.every(7)
def test_any_optimizer_precision_and_accumulation(name, method, optimizer, precision, accumulate):
    more = {"cycles": {"every": 1}, "drop_and_grow": {"update_every": 2, "end": 0.9}} if method == "east" else {}
    _, handle, watch = trained(name, method, optimizer, precision, accumulate, **more)
    assert watch.kept[-1] == handle.masks.kept() == tenth(name)
    assert len({tuple(mask.flatten().tolist()) for one in watch.masks for mask in list(one.values())[:1]}) > 1


def test_east_whole_and_its_parts_where_they_fit():
    network, *_ = trained("residual", "east", cycles={"every": 1}, drop_and_grow={"update_every": 2})
    names = dict(network.named_modules())
    assert not any("DyReLU" in type(module).__name__ for module in names.values())  # faded
    assert sum(hasattr(module, "shares") for module in names.values()) == 4  # blocks 3 and 4, two convolutions each
    plain = made("residual")
    plain.load_state_dict(sparse_lab.plain_state_dict(network), strict=True)
    image = torch.randn(4, 3, SIDE, SIDE)
    torch.testing.assert_close(plain.eval()(image), network.eval()(image))
    with pytest.raises(sparse_lab.UserError, match=r"sharing does not fit Sequential: .* leave it out by sharing=None"):
        sparsified("cnn", "east")
    trained("cnn", "east", sharing=None, cycles={"every": 1}, drop_and_grow={"update_every": 2})
    with pytest.raises(sparse_lab.UserError, match=r"dyrelu does not fit ViT: it has no ReLU: leave it out by dyrelu"):
        network = made("vit")
        network.encoder.layers[0].activation = network.encoder.layers[1].activation = functional.gelu
        sparse_lab.sparsify(network, "east", 0.9, sharing=None, total_steps=9, input_shape=(3, 8, 8))
    untouched = made("mlp")
    before = [type(module) for module in untouched.modules()]
    with pytest.raises(sparse_lab.UserError):
        sparse_lab.sparsify(untouched, "east", 0.9, total_steps=STEPS, input_shape=(3, SIDE, SIDE))
    assert [type(module) for module in untouched.modules()] == before
    assert not any(name.endswith("mask") for name in untouched.state_dict())


def test_pruned_and_regrown_at_moments_of_the_users_choosing():
    network = made("cnn")
    handle = sparse_lab.sparsify(network)
    optimizer = OPTIMIZERS["adamw"](network.parameters())
    handle.attach(optimizer)
    watch = Watch(handle, optimizer)
    train(network, optimizer, 6, after=watch)
    dense = copy.deepcopy(network)
    handle.prune(0.95)
    total = handle.masks.total()
    assert handle.masks.kept() == round(0.05 * total)
    train(network, optimizer, 4, after=watch)
    alive = {name: mask.clone() for name, mask in handle.masks.masks().items()}
    weights = {name: weight.detach().clone() for name, weight in handle.masks.weights().items()}
    handle.regrow(0.8, batches=batches(4))
    assert handle.masks.kept() == round(0.2 * total)
    for name, mask in handle.masks.masks().items():
        assert not (alive[name] & ~mask).any()  # regrowth takes nothing away
        layer = handle.masks.layers[name]
        assert torch.equal(layer.weight[alive[name]], weights[name][alive[name]])
        grown = mask & ~alive[name]
        assert not layer.weight[grown].any()  # starts at zero, from fresh state
        assert not any(one[grown].any() for one in optimizer.state[layer.weight].values() if one.dim())
    # those of the largest g^2 w^2 in the dense network came, layer by layer: computed here by hand
    dense.eval()
    sums = {name: torch.zeros_like(layer.weight) for name, layer in layers(dense).items()}
    for images, labels in batches(4):
        dense.zero_grad()
        functional.cross_entropy(dense(images), labels).backward()
        for name, layer in layers(dense).items():
            sums[name] += layer.weight.grad.square() / 4
    for name, layer in layers(dense).items():
        score = (sums[name] * layer.weight.detach().square())[~alive[name]]
        grown = (handle.masks[name] & ~alive[name])[~alive[name]]
        assert score[grown].min() >= score[~grown].max()
    train(network, optimizer, 4, after=watch)


@pytest.mark.parametrize(
    ("optimizer", "precision", "accumulate", "name"),
    [(*recipe, ("cnn", "mlp", "vit")[number % 3]) for number, recipe in enumerate(RECIPES)],
)
@pytest.mark.every(7)
def test_static_and_pruned_then_regrown_by_any_recipe(optimizer, precision, accumulate, name):
    network, handle = sparsified(name, "static")
    moved = OPTIMIZERS[optimizer](network.parameters())
    handle.attach(moved)
    watch, skips = Watch(handle, moved), (1,) if precision == "scaled" else ()
    how = {"accumulate": accumulate, "precision": precision, "skips": skips, "after": watch}
    train(network, moved, 3, **how)
    for sparsity, change in ((0.97, handle.prune), (0.8, handle.regrow)):
        change(sparsity, batches=batches(2), **({} if change == handle.prune else {"dense": made(name)}))
        train(network, moved, 3, **how)
    total = handle.masks.total()
    assert watch.kept == [round((1.0 - one) * total) for one in (0.9, 0.97, 0.8) for _ in range(3)]


def test_a_state_of_another_request_is_refused():
    _, handle = sparsified("mlp", "gmp")
    state = handle.state_dict()
    for other, said in (
        ({"sparsity": 0.8}, r"other settings \(sparsity=0.9, here 0.8\)"),
        ({"every": 3}, r"other settings \(cubic.every=2, here 3\)"),
        ({"prune": {"score": "random"}}, r"other settings \(prune.score=magnitude, here random\)"),
    ):
        with pytest.raises(sparse_lab.SparseLabError, match=said):
            sparsified("mlp", "gmp", **other)[1].load_state_dict(state)
    _, longer = sparsified("mlp", "gmp", total_steps=24)
    with pytest.warns(UserWarning, match="of total_steps=12, and this one has 24"):
        longer.load_state_dict(state)


def test_a_stopped_loop_goes_on_to_the_same_bits():
    """The state of network, optimizer and handle, taken in the middle of everything, DyReLU gone and DyReLU there."""
    more = {"cycles": {"every": 1}, "drop_and_grow": {"update_every": 2}}
    whole, *_ = trained("residual", "east", **more)
    for stop in (3, 8):
        network, handle = sparsified("residual", "east", **more)
        optimizer = OPTIMIZERS["momentum"](network.parameters())
        handle.attach(optimizer)
        train(network, optimizer, stop)
        saved = pickle.dumps((network.state_dict(), optimizer.state_dict(), handle.state_dict()))
        del network, handle, optimizer
        gc.collect()
        network, handle = sparsified("residual", "east", **more)
        optimizer = OPTIMIZERS["momentum"](network.parameters())
        handle.attach(optimizer)
        for one, state in zip((network, optimizer, handle), pickle.loads(saved), strict=True):
            one.load_state_dict(state)
        train(network, optimizer, STEPS - stop, first=stop, after=Watch(handle, optimizer))
        for key, value in whole.state_dict().items():
            assert torch.equal(value, network.state_dict()[key]), (stop, key)


def test_a_stop_between_pruning_and_regrowth_keeps_the_dense_network():
    def begun(state=None):
        network = made("mlp")
        handle = sparse_lab.sparsify(network)
        optimizer = OPTIMIZERS["momentum"](network.parameters())
        handle.attach(optimizer)
        for one, own in zip((network, optimizer, handle), state or (), strict=state is not None):
            one.load_state_dict(own)
        return network, optimizer, handle

    network, optimizer, handle = begun()
    train(network, optimizer, 4)
    handle.prune(0.95)
    train(network, optimizer, 2)
    state = copy.deepcopy((network.state_dict(), optimizer.state_dict(), handle.state_dict()))
    ends = []
    for one in ((network, optimizer, handle), begun(state)):
        one[2].regrow(0.8, batches=batches(2))
        train(one[0], one[1], 3)
        ends.append(one[0].state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_masks_are_baked_in_and_the_plain_network_loads_them():
    network, handle, _ = trained("cnn", "rigl")
    state, kept = sparse_lab.plain_state_dict(network), handle.masks.kept()
    image = torch.randn(4, 3, SIDE, SIDE)
    before = network.eval()(image)
    handle.remove_masks()
    for plain in (network, made("cnn", seed=3)):
        plain.load_state_dict(state, strict=True)
        assert torch.equal(plain.eval()(image), before)
        assert sum(int((layer.weight != 0).sum()) for layer in layers(plain).values()) <= kept
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    train(network, optimizer, 2)  # dense again, and nobody minds
    assert sum(int((layer.weight != 0).sum()) for layer in layers(network).values()) > kept
    sparse_lab.sparsify(network, "static", 0.5)  # and can be sparsified anew


def test_dct_and_recovered_means_stand_in_the_plain_state():
    image = torch.randn(4, 3, SIDE, SIDE)
    for method in ("dctps", "prune_on_the_fly"):
        network, handle, _ = trained("cnn", method)
        plain = made("cnn", seed=3)
        plain.load_state_dict(sparse_lab.plain_state_dict(network), strict=True)
        before = network.eval()(image)
        torch.testing.assert_close(plain.eval()(image), before)
        handle.remove_masks()
        torch.testing.assert_close(network.eval()(image), before)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: sparsified("mlp", "rigll"), "unknown method 'rigll'; did you mean 'rigl'"),
        (lambda: sparsified("mlp", "rigl", 1.0), r"sparsity=1.0 is outside \(0, 1\)"),
        (lambda: sparsified("mlp", "rigl", 0.0), r"sparsity=0.0 is outside \(0, 1\)"),
        (lambda: sparsified("mlp", "rigl", float("nan")), r"sparsity=nan is outside \(0, 1\)"),
        (lambda: sparsified("mlp", "rigl", "0.9"), r"sparsity='0.9' is outside \(0, 1\)"),
        (lambda: sparsified("mlp", "rigl", 0.999999), "the highest sparsity here is"),
        (lambda: sparsified("mlp", "iterative"), "rounds.*handle.prune"),
        (lambda: sparsified("mlp", "oneshot_regrow"), "prunes one training and regrows in another.*handle.regrow"),
        (lambda: sparsified("mlp", "lth"), "rounds"),
        (lambda: sparsified("cnn", "resrep"), "compactors"),
        (lambda: sparsified("mlp", "rigl", update_evry=3), "has no setting 'update_evry'; did you mean 'update_every'"),
        (lambda: sparsified("mlp", "rigl", drop_fraction=3.0), r"drop_fraction=3 is outside \(0, 1\]"),
        (lambda: sparsified("mlp", "rigl", drop_and_grow=3), "is a part: give it settings as a dict"),
        (lambda: sparsified("mlp", "east", sharing=None, dyrelu=None, grow="random"), "say which, as in"),
        (lambda: sparsified("mlp", "rigl", total_steps=0), "a whole number above 0"),
        (lambda: sparsified("mlp", "rigl", epochs=5), "so many epochs of equal length"),
        (lambda: sparsified("mlp", "mest", epochs=None), "counts epochs.*give epochs="),
        (lambda: sparsified("vit", "dctps"), "dct does not fit ViT: .*out_proj is a NonDyn.*leave it out by dct=None"),
        (lambda: sparsified("vit", "prune_on_the_fly"), "hypersphere.recovery does not fit ViT"),
        (lambda: sparsified("mlp", "snip", batches=None), "give batches="),
        (lambda: sparsified("mlp", "synflow", batches=None), "give input_shape="),
        (lambda: sparse_lab.sparsify(nn.Sequential(nn.ReLU()), "rigl", 0.9), "no conv or linear weights"),
        (lambda: sparse_lab.sparsify(nn.Sequential(nn.LazyLinear(3)), "rigl", 0.9), "has no shape yet"),
        (lambda: sparsified("mlp", "rigl", exclude=["head"]), "exclude: 'head' matches no layer"),
        (lambda: sparsified("mlp", "rigl", exclude=["*"]), "leaves no layer to count"),
        (lambda: sparsified("mlp", "rigl", layers={"1": 0.1}), "leaves too little for 2 others: at most sparsity="),
        (lambda: sparse_lab.sparsify(made("mlp"), layers={"1": 0.1}), "give sparsity= too"),
        (lambda: sparse_lab.sparsify(made("mlp"), "rigl"), "needs sparsity="),
        (lambda: sparse_lab.sparsify(made("mlp"), update_every=3), "say method=NAME too"),
        (lambda: sparse_lab.sparsify(made("mlp"), sparsity=0.9), "say method= too"),
        (lambda: sparse_lab.sparsify(nn.Linear, "rigl", 0.9), "an instance of nn.Module"),
        (lambda: sparse_lab.sparsify([nn.Linear(3, 3)], "rigl", 0.9), "an instance of nn.Module.* not list"),
        (lambda: sparsified("mlp", "rigl", exclude=[nn.Linear(3, 3)]), "names, globs or types of layers"),
        (lambda: sparsified("mlp", "rigl", layers={"1": "0.5"}), "a layer's name and its sparsity"),
        (lambda: sparsified("mlp", "rigl", layers=["1"]), "layers=.*a dict"),
        (lambda: sparsified("mlp", "rigl", seed=None), "seed=None: a whole number"),
        (lambda: sparsified("mlp", "rigl", seed=2**62), "seed=.*: at most"),
        (lambda: sparsified("mlp", "rigl", input_shape=192), r"input_shape=192: .*\(3, 32, 32\)"),
        (lambda: sparsified("mlp", "snip", loss="mse"), r"a function of \(outputs, targets\)"),
        (lambda: sparsified("mlp", "rigl", schedule=None), "unknown schedule None"),
        (lambda: sparsified("mlp", "rigl", total_step=9), "did you mean 'total_steps'"),
        (lambda: sparsified("mlp", "rigl", update_every="often"), "^drop_and_grow.update_every='often': "),
        (lambda: sparsified("mlp", "rigl", batches=None, prune={"score": "snipp"}), "unknown score 'snipp'"),
        (lambda: attached("mlp", "snip", batches=iter([])), "no batch came: give batches="),
        (lambda: attached("mlp", "snip", batches=[(torch.zeros(3, 192), torch.zeros(2).long())]), "3 inputs, and 2"),
        (lambda: attached("mlp", "synflow", input_shape=(1, 8, 8)), r"shape \(1, 8, 8\) does not go through"),
        (lambda: attached("dict", "synflow"), "one tensor, not a dict"),
        (lambda: attached("dict", "grasp"), "one tensor, not a dict"),
        (lambda: attached("mlp", "rigl").plan(9), "attached already, and under way"),
        (lambda: sparse_lab.sparsify(made("mlp")).load_state_dict({}), "no state of a handle"),
        (lambda: sparse_lab.sparsify(made("mlp")).masks.set({"one": torch.ones(3)}), "no layer 'one' has a mask"),
        (lambda: sparse_lab.sparsify(made("mlp")).masks.set({"1": torch.ones(192)}), r"has shape \(48, 192\), not"),
        (lambda: sparse_lab.sparsify(made("mlp")).prune(0.5, iterations=0), "iterations=0: a whole number"),
        (lambda: sparse_lab.plain_state_dict({}), "an instance of nn.Module.*not dict"),
        (lambda: without_masks().prune(0.5), "the masks were removed"),
        (lambda: without_masks().remove_masks(), "the masks were removed"),
        (lambda: sparse_lab.sparsify(made("mlp")).prune(1.5), r"outside \(0, 1\)"),
        (lambda: sparse_lab.sparsify(made("mlp")).regrow(0.5), "give dense="),
    ],
)  # fmt: skip
def test_bad_use_gets_one_clear_line(act, said):
    with pytest.raises(sparse_lab.SparseLabError, match=said) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_single_names_are_taken():
    settings = {
        "total_steps": np.int64(STEPS),
        "epochs": np.int32(4),
        "seed": np.int64(7),
        "drop_fraction": np.float32(0.5),
    }
    network = made("mlp")
    handle = sparse_lab.sparsify(
        network,
        "rigl",
        np.float32(0.9),
        exclude="5",
        layers={"1": np.float32(0.95)},
        update_every=np.int64(3),
        **settings,
    )
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    train(network, optimizer, STEPS, after=Watch(handle, optimizer))
    assert set(handle.masks.layers) == {"1", "3"} and handle.total_steps == STEPS
    assert set(sparsified("cnn", "rigl", include=nn.Conv2d)[1].masks.layers) == {"0", "4"}
    assert set(sparsified("cnn", "rigl", include=None, exclude=None)[1].masks.layers) == {"0", "4", "8"}


def test_a_summary_of_a_network_that_takes_tokens_or_two_inputs_has_no_flops():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(192, CLASSES)

        def forward(self, one, two):
            return self.head((one + two).flatten(1))

    tokens = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(24, CLASSES))
    image = torch.randn(2, 3, SIDE, SIDE)
    for network, inputs in ((tokens, (torch.randint(0, 20, (2, 4)),)), (Two(), (image, image))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the embedding
            handle = sparse_lab.sparsify(network, "static", 0.5)
        network(*inputs)
        assert [row.flops for row in handle.summary().layers] == [None]
    handle = sparse_lab.sparsify(made("mlp"), "static", 0.5, input_shape=(1, SIDE, SIDE))
    with pytest.raises(sparse_lab.SparseLabError, match=r"shape \(1, 8, 8\) does not go through Sequential"):
        handle.summary()  # what the user has said is not thrown away in silence


def test_masks_that_are_taken_off_leave_no_hooks():
    network = made("mlp")
    before = len(network._load_state_dict_pre_hooks), len(network._forward_pre_hooks)
    for _ in range(3):
        sparse_lab.sparsify(network, "static", 0.9).remove_masks()
    assert (len(network._load_state_dict_pre_hooks), len(network._forward_pre_hooks)) == before


def test_an_optimizer_that_does_not_fit_is_refused():
    network, handle = sparsified("mlp", "rigl")
    for optimizer, said in (
        (OPTIMIZERS["adam"](made("mlp").parameters()), "moves none of the 3 layers"),
        (OPTIMIZERS["adam"](network[1].parameters()), "does not move '3' and 1 more"),
        (torch.optim.LBFGS(network.parameters()), "LBFGS"),
        (network, "takes an optimizer of torch.optim"),
    ):
        with pytest.raises(sparse_lab.SparseLabError, match=said):
            handle.attach(optimizer)
    optimizer = OPTIMIZERS["adam"](network.parameters())
    handle.attach(optimizer)
    with pytest.raises(sparse_lab.SparseLabError, match="attached already"):
        handle.attach(optimizer)
    with pytest.raises(sparse_lab.SparseLabError, match="is sparsified already"):
        sparse_lab.sparsify(network, "set", 0.9)
    with pytest.raises(sparse_lab.SparseLabError, match="this state is of method None"):
        handle.load_state_dict(sparse_lab.sparsify(made("mlp")).state_dict())
    network, handle = sparsified("mlp", "rigl", total_steps=None, epochs=None)
    with pytest.raises(sparse_lab.UserError, match="how long is the training"):
        handle.attach(OPTIMIZERS["adam"](network.parameters()))
    network = made("residual")
    early = OPTIMIZERS["adam"](network.parameters())
    handle = sparse_lab.sparsify(network, "east", 0.9, total_steps=400, input_shape=(3, SIDE, SIDE))
    with pytest.raises(sparse_lab.SparseLabError, match=r"lacks \d+ parameters that sparsify\(\) has put in"):
        handle.attach(early)
    network = made("mlp")
    early = OPTIMIZERS["adam"](network.parameters())
    with pytest.raises(sparse_lab.SparseLabError, match="lacks 3 parameters"):
        sparse_lab.sparsify(network, "dctps", 0.9).attach(early)


def test_a_step_without_attach_is_stopped_and_one_after_detach_is_told_of():
    network, handle = sparsified("mlp", "rigl")
    other = made("mlp")
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    train(other, OPTIMIZERS["momentum"](other.parameters()), 1)  # another network's training is nobody's business
    with pytest.raises(sparse_lab.SparseLabError, match=r"call handle\.attach\(optimizer\) first"):
        train(network, optimizer, 1)
    handle.attach(optimizer)
    train(network, optimizer, 2)
    handle.detach()
    with pytest.warns(UserWarning, match="detached, and it trains dense"):
        train(network, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(network, optimizer, 1)  # said once
    handle.attach(optimizer)
    train(network, optimizer, 1, after=Watch(handle, optimizer))


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_what_somebody_writes_into_the_weights_is_masked_after_the_next_step(method):
    """A dense checkpoint, an edit in place, other memory: nobody's step moves it there, and nobody's step zeroes it."""
    network, handle = sparsified("cnn", method)
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    train(network, optimizer, 1)

    def written():
        with torch.no_grad():
            network[4].weight.add_(1.0)

    def put():
        network[4].weight.data = torch.ones_like(network[4].weight)

    for change in (lambda: network.load_state_dict(made("cnn", seed=3).state_dict(), strict=False), written, put):
        change()
        train(network, optimizer, 1, after=Watch(handle, optimizer))


def test_a_second_optimizer_of_the_same_weights_is_stopped():
    network, handle = sparsified("cnn", "rigl")
    first, second = OPTIMIZERS["momentum"](network.parameters()), OPTIMIZERS["adam"](network.parameters())
    handle.attach(first)
    train(network, first, 2)
    with pytest.raises(sparse_lab.SparseLabError, match=r"masks hang on another one: handle\.detach\(\)"):
        train(network, second, 1)
    handle.detach()
    handle.attach(second)
    train(network, second, 2, after=Watch(handle, second))
    assert handle.step == 4
    train(made("mlp"), OPTIMIZERS["adam"](made("mlp").parameters()), 1)


def test_an_optimizer_around_another_is_looked_into():
    class SAM(torch.optim.Optimizer):
        """Of which torch's hooks see nothing: its own step is never called."""

        def __init__(self, params):
            super().__init__(params, {})
            self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)

        @torch.no_grad()
        def second_step(self):
            self.base_optimizer.step()

    network, handle = sparsified("cnn", "rigl")
    optimizer = SAM(network.parameters())
    handle.attach(optimizer)
    for images, labels in batches(STEPS):
        functional.cross_entropy(network(images), labels).backward()
        optimizer.second_step()
        Watch(handle, optimizer.base_optimizer)(0, True)
    assert handle.step == STEPS


def test_soft_pruning_ends_pruned():
    """What a plain loop begins after its last step is no epoch more, in which all would live."""
    network, handle = sparsified("cnn", "sfp", 0.5, input_shape=(3, SIDE, SIDE))
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    watch = Watch(handle, optimizer)
    train(network, optimizer, STEPS, after=watch)
    total = handle.masks.total()
    assert watch.kept[2] == total and handle.masks.kept() <= round(0.5 * total)
    train(network, optimizer, 1, after=watch)
    assert handle.masks.kept() <= round(0.5 * total)


def test_frozen_tied_unused_and_grouped_parameters():
    network = made("cnn")
    network.unused = nn.Linear(7, 9)  # never gets a gradient, nor a place in forward: torch's Sequential calls it
    network.forward = lambda x: nn.Sequential(*list(network)[:9])(x)
    network[0].weight.requires_grad_(False)
    handle = sparse_lab.sparsify(network, "snip", 0.9, batches=batches(2))  # a frozen layer can be pruned
    groups = [
        {"params": [one for one in network.parameters() if one.dim() > 1 and one.requires_grad], "weight_decay": 1e-2},
        {"params": [one for one in network.parameters() if one.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    handle.attach(optimizer)
    frozen = network[0].weight.clone()
    train(network, optimizer, 4, after=Watch(handle, optimizer))
    assert torch.equal(frozen, network[0].weight) and handle.masks.kept() == round((1.0 - 0.9) * handle.masks.total())
    frozen = made("cnn")
    frozen[0].weight.requires_grad_(False)
    handle = sparse_lab.sparsify(frozen, "rigl", 0.9, total_steps=400)
    with pytest.raises(sparse_lab.SparseLabError, match="'0' is frozen, and what rigl grows there would never train"):
        handle.attach(OPTIMIZERS["adam"](frozen.parameters()))
    tied = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 5)
    )
    tied[3].weight = tied[1].weight
    handle = sparse_lab.sparsify(tied, "rigl", 0.9, total_steps=STEPS, update_every=3)
    assert handle.masks.total() == 192 * 192 + 192 * 5
    optimizer = OPTIMIZERS["momentum"](tied.parameters())
    handle.attach(optimizer)
    train(tied, optimizer, STEPS, after=Watch(handle, optimizer))
    assert tied[3].mask is tied[1].mask


@pytest.mark.parametrize("method", ["rigl", "gmp", "mest", "snip", "granet"])
def test_layers_left_out_stay_dense_and_those_of_their_own_keep_their_count(method):
    network, handle = sparsified("cnn", method, exclude=[nn.Linear], layers={"0": 0.8})
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    train(network, optimizer, STEPS, after=Watch(handle, optimizer))
    counted = network[0].weight.numel() + network[4].weight.numel()
    assert set(handle.masks.layers) == {"0", "4"} and not hasattr(network[8], "mask")
    assert handle.masks.kept() == round((1.0 - 0.9) * counted)
    assert int(network[0].mask.sum()) == round((1.0 - 0.8) * network[0].weight.numel())
    assert (network[8].weight != 0).all()
    assert {"name": "8.weight", "kind": "excluded", "weights": 320} in handle.summary().uncounted
    only, handle = sparsified("cnn", method, include=["[48]"])
    assert set(handle.masks.layers) == {"4", "8"} and not hasattr(only[0], "mask")


def test_what_no_mask_could_hold_on_can_be_left_out():
    network = made("mlp")
    nn.utils.parametrizations.weight_norm(network[3])
    with pytest.raises(sparse_lab.SparseLabError, match="'3' is computed from others"):
        sparse_lab.sparsify(network, "static", 0.9)
    handle = sparse_lab.sparsify(network, "static", 0.9, exclude=["3"])
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    train(network, optimizer, 3, after=Watch(handle, optimizer))


def test_a_request_that_is_refused_leaves_the_network_as_it_was():
    network = made("residual")
    for request in ({"method": "mest", "total_steps": 9}, {"method": "east"}, {"method": "snip"}):
        with pytest.raises(sparse_lab.SparseLabError):
            sparse_lab.sparsify(network, sparsity=0.9, **request)
        assert network.state_dict().keys() == made("residual").state_dict().keys()
    train(network, OPTIMIZERS["momentum"](network.parameters()), 1)  # and nobody waits for an attach


def test_several_optimizers():
    """One moves all that has masks and another the rest: right. Two that move weights with masks: refused."""
    network, handle = sparsified("cnn", "rigl")
    weights = OPTIMIZERS["momentum"]([one for one in network.parameters() if one.dim() > 1])
    others = torch.optim.Adam([one for one in network.parameters() if one.dim() == 1])
    handle.attach(weights)
    train(network, weights, STEPS, after=lambda step, moved: (others.step(), Watch(handle, weights)(step, moved)))
    network, handle = sparsified("cnn", "rigl")
    with pytest.raises(sparse_lab.SparseLabError, match="does not move"):
        handle.attach(OPTIMIZERS["momentum"](network[0].parameters()))


def test_channels_last_and_a_move_to_another_type():
    network, handle = sparsified("cnn", "rigl")
    network.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    watch = Watch(handle, optimizer)
    train(network, optimizer, STEPS, after=watch)
    *_, other = trained("cnn", "rigl")
    for name, mask in other.masks[0].items():  # the layout has no say in which weights are chosen
        assert torch.equal(mask, watch.masks[0][name])
    network, handle = sparsified("mlp", "rigl")
    network.double()
    optimizer = OPTIMIZERS["adam"](network.parameters())
    handle.attach(optimizer)
    for _ in range(STEPS):
        network(torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64)).sum().backward()
        optimizer.step()
        Watch(handle, optimizer)(0, True)
    assert all(factor.dtype == torch.float64 for factor in handle.masks._factors)


def test_an_average_of_the_weights_gets_the_masks():
    network, handle = sparsified("cnn", "rigl")
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    train(network, optimizer, STEPS, after=lambda step, moved: average.update_parameters(network))
    alive = sum(int((layer.weight != 0).sum()) for layer in layers(average.module).values())
    assert alive > handle.masks.kept()  # the masks have moved meanwhile
    values = {name: layer.weight.clone() for name, layer in layers(average.module).items()}
    handle.copy_masks_to(average)
    for name, layer in layers(average.module).items():
        assert torch.equal(layer.weight, values[name] * handle.masks[name]) and torch.equal(
            layer.mask, handle.masks[name]
        )
    assert sparse_lab.plain_state_dict(average).keys() == made("cnn").state_dict().keys()
    with pytest.raises(sparse_lab.SparseLabError, match="has other layers"):
        handle.copy_masks_to(made("mlp"))
    copied = copy.deepcopy(network)
    copied.load_state_dict(network.state_dict())
    pickle.loads(pickle.dumps(network))


def test_a_copy_of_a_network_holds_its_masks_when_it_is_sparsified_itself():
    network, handle = sparsified("cnn", "rigl")
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    train(network, optimizer, 4)
    copied = copy.deepcopy(network)
    own = sparse_lab.sparsify(copied)
    assert all(torch.equal(mask, handle.masks[name]) for name, mask in own.masks.masks().items())
    theirs = OPTIMIZERS["momentum"](copied.parameters())
    with pytest.raises(sparse_lab.SparseLabError, match=r"call handle\.attach"):
        train(copied, theirs, 1)
    own.attach(theirs)
    train(copied, theirs, 3, after=Watch(own, theirs))
    train(network, optimizer, 3, after=Watch(handle, optimizer))


def test_clipping_schedulers_and_closures():
    network, handle = sparsified("cnn", "rigl")
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)
    watch = Watch(handle, optimizer)
    train(network, optimizer, STEPS, clip=0.1, after=lambda step, moved: (scheduler.step(), watch(step, moved)))
    by_closure, handle = sparsified("cnn", "rigl")
    optimizer = OPTIMIZERS["momentum"](by_closure.parameters())
    handle.attach(optimizer)
    for images, labels in batches(STEPS):

        def compute(images=images, labels=labels):
            optimizer.zero_grad()
            loss = functional.cross_entropy(by_closure(images), labels)
            loss.backward()
            return loss

        optimizer.step(compute)
        Watch(handle, optimizer)(0, True)
    same, *_ = trained("cnn", "rigl")
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in by_closure.state_dict().items())
    for optimizer in (
        torch.optim.Rprop,
        torch.optim.Adagrad,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.ASGD,
    ):
        network, handle = sparsified("mlp", "rigl")
        one = optimizer(network.parameters(), lr=1e-2)
        handle.attach(one)
        train(network, one, STEPS, after=Watch(handle, one))


def test_what_is_large_and_not_counted_is_named_once_and_stands_in_the_summary():
    network = made("vit")
    with pytest.warns(UserWarning, match="not counted") as caught:
        handle = sparse_lab.sparsify(network, "static", 0.9)
    assert len([one for one in caught if "not counted" in str(one.message)]) == 1
    handle.attach(OPTIMIZERS["adamw"](network.parameters()))
    summary = handle.summary()
    assert {one["name"] for one in summary.uncounted} >= {"encoder.layers.0.self_attn.in_proj_weight"}
    assert "in_proj_weight" in str(summary)
    assert [row.flops for row in summary.layers] == [None] * len(summary.layers)
    network(torch.randn(2, 3, SIDE, SIDE))  # now the shape of an input is known
    rows = {row.layer: row for row in handle.summary().layers}
    assert rows["patches"].flops == 2 * rows["patches"].kept * 4 and rows["head"].flops == 2 * rows["head"].kept
    assert sum(row.kept for row in rows.values()) == summary.kept == handle.masks.kept()
    assert str(summary).splitlines()[0].split() == [
        "layer",
        "shape",
        "kept",
        "of",
        "density",
        "dead",
        "channels",
        "FLOPs",
    ]


def test_dead_channels_are_those_whose_weights_are_all_pruned():
    network = made("mlp")
    handle = sparse_lab.sparsify(network)
    mask = torch.ones_like(network[1].weight, dtype=torch.bool)
    mask[5:9] = False
    handle.masks.set({"1": mask})
    assert [row.dead for row in handle.summary().layers] == [4, 0, 0]


def test_a_loss_of_ones_own_is_what_scores_look_at():
    """SNIP by mean squared error, against autograd by hand."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    plain = copy.deepcopy(network)
    data = [(torch.randn(5, 6), torch.randn(5, 1)) for _ in range(2)]
    handle = sparse_lab.sparsify(network, "snip", 0.5, batches=data, loss=functional.mse_loss, per_class=None)
    handle.attach(torch.optim.SGD(network.parameters(), lr=0.1))
    for inputs, targets in data:
        (functional.mse_loss(plain(inputs), targets) / 2).backward()
    scores = torch.cat([(plain[at].weight * plain[at].weight.grad).abs().flatten() for at in (0, 2)])
    wanted = torch.zeros_like(scores, dtype=torch.bool)
    wanted[scores.topk(28).indices] = True
    found = torch.cat([handle.masks[at].flatten() for at in ("0", "2")])
    assert torch.equal(found, wanted)


def test_nothing_is_kept_alive_and_a_handle_that_nobody_keeps_lives_with_its_optimizer():
    network, handle = sparsified("cnn", "rigl")
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    handle.attach(optimizer)
    train(network, optimizer, 2)
    del handle
    gc.collect()
    with pytest.raises(sparse_lab.SparseLabError, match="is sparsified already"):
        sparse_lab.sparsify(network, "set", 0.9)
    one = sparse_lab.sparsify(nn.Linear(8, 8), "static", 0.5)
    left = [weakref.ref(value) for value in (network, optimizer, one.network)]
    del network, optimizer, one
    gc.collect()
    assert [value() for value in left] == [None] * 3


def test_public_classes_hang_on_an_optimizer_by_themselves():
    network = made("cnn")
    masks = sparse_lab.Masks.of(network)
    optimizer = OPTIMIZERS["momentum"](network.parameters())
    sparse_lab.GMP(network, masks, Cubic(0.9, 0, 8, 2)).attach(optimizer)
    train(network, optimizer, STEPS)
    assert masks.kept() == round(0.1 * masks.total())
    assert sum(int((layer.weight != 0).sum()) for layer in masks.layers.values()) <= masks.kept()
    sparse_lab.WeightSharing(made("residual"))
    with pytest.raises(sparse_lab.SparseLabError, match="cannot be shared in Sequential"):
        sparse_lab.WeightSharing(made("mlp"))
    with pytest.raises(sparse_lab.SparseLabError, match="no DyReLU in this network"):
        sparse_lab.DyReLUPhasing(network, 0, 5).attach(optimizer)


@pytest.mark.full
def test_a_compiled_network(tmp_path: Path):
    network = made("cnn")
    compiled = torch.compile(network)
    handle = sparse_lab.sparsify(compiled, "rigl", 0.9, total_steps=STEPS, update_every=3)
    assert handle.network is network
    optimizer = OPTIMIZERS["momentum"](compiled.parameters())
    handle.attach(optimizer)
    train(compiled, optimizer, STEPS, after=Watch(handle, optimizer))
    assert sparse_lab.plain_state_dict(compiled).keys() == made("cnn").state_dict().keys()


def test_the_names_at_the_root():
    assert set(NETWORKS) and all(getattr(sparse_lab, name) is not None for name in sparse_lab.PUBLIC)
    assert sparse_lab.callbacks.Sparsify is not None
    with pytest.raises(AttributeError):
        sparse_lab.sparsfy  # noqa: B018
