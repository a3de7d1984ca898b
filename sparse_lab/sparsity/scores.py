"""How good each weight is. One function a score; higher is better; a new score is a function here and a YAML.

A score looks at a network through `View` and returns one tensor a counted layer, in the weight's shape. It is found
by its own name: `method.prune.score=lamp` runs `lamp`. Gradients are computed only for the scores that ask for them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_lab.errors import SparseLabError, nearest
from sparse_lab.registering import check_function, enter
from sparse_lab.sparsity import names
from sparse_lab.sparsity.images import Shape, check_forward, image_like, send
from sparse_lab.sparsity.masks import layers

Scores = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]
Mode = Callable[[nn.Module], AbstractContextManager[None]]

GRASP_TEMPERATURE = 200.0  # the paper's: logits near zero, so that the softmax of a random network is not saturated
# our choice: the paper's value could not be read; a weight just grown is zero and only its gradient speaks for it
MEST_LAMBDA = 1.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then each module has its own mode again (a frozen BatchNorm stays frozen)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm by the batch's own statistics for a while, its running ones neither used nor moved; all else as in
    `evaluating`. For a network that was just initialised: its running statistics mean nothing yet.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                norm.training, norm.track_running_stats = True, False
            yield
        finally:
            for norm, flag in zip(norms, tracked, strict=True):
                norm.track_running_stats = flag


@contextmanager
def requiring_gradients(weights: Iterable[Tensor]) -> Iterator[None]:
    """Gradients of frozen weights too, for a while."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def gradients_of(scalar: Tensor, weights: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """The gradient of each weight; zero for one that has no part in it."""
    found = torch.autograd.grad(scalar, weights, create_graph=create_graph, allow_unused=True)
    return tuple(
        torch.zeros_like(weight) if grad is None else grad for weight, grad in zip(weights, found, strict=True)
    )


@dataclass(frozen=True)
class Probe:
    """How a score runs the network. `shape` gives that of one input, for scores that make an image of their own;
    `loss`: of (outputs, targets) of a batch, a scalar; the mean over the batch.
    """

    shape: Callable[[], Shape] = lambda: 32
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy


USUAL = Probe()  # images of CIFAR, classified


def as_input(images: Tensor, weight: Tensor) -> Tensor:
    """`images` where `weight` lies, in its type unless they are whole numbers (tokens)."""
    return images.to(weight) if images.is_floating_point() else images.to(weight.device)


@dataclass
class View:
    """What a score may look at: the network, batches of (images, labels), and a random generator (on the CPU).

    `batches` may be a function that makes them: decoding photos for a score of weights alone would be for nothing.
    `grads`: dense gradients that are at hand already (those of a training step); then no batch is looked at.
    `probe`: how the network is run, see there.
    """

    model: nn.Module
    batches: Batches | Callable[[], Batches] = ()
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    reference: Scores | None = None
    grads: Scores | None = None
    probe: Probe = USUAL

    def weights(self) -> Scores:
        return {name: module.weight.detach() for name, module in layers(self.model).items()}

    def seen(self) -> Batches:
        """The batches, made once: a score that passes over them twice sees the same ones."""
        if callable(self.batches):
            self.batches = self.batches()
        return self.batches

    def losses(self, temperature: float = 1.0) -> Iterator[Tensor]:
        """The loss of outputs / temperature, one a batch, each with its graph."""
        weight = next(iter(layers(self.model).values())).weight
        for images, labels in self.seen():
            with torch.enable_grad():
                output = self._output(as_input(images, weight))
                output = output if temperature == 1.0 else _one_tensor(output) / temperature
                loss = self.probe.loss(output, labels.to(weight.device))
            yield loss

    def _output(self, images: Tensor) -> Any:
        try:
            return self.model(images)
        except NotImplementedError as error:
            check_forward(self.model, error)
            raise

    def gradients(self, power: int = 1, mode: Mode = evaluating, temperature: float = 1.0) -> Scores:
        """Mean over batches of gradient ** power, dense: pruned positions too. Leaves the network as it was.

        mode: `evaluating` uses BatchNorm's running statistics, `batch_statistics` each batch's own; neither moves them.
        temperature: the loss is that of outputs / temperature. Raises ValueError without batches.
        """
        if self.grads is not None:
            return {name: grad.pow(power) for name, grad in self.grads.items()}
        if not self.seen():
            raise ValueError("this score needs batches")
        weights = [module.weight for module in layers(self.model).values()]
        sums = [torch.zeros_like(weight) for weight in weights]
        with mode(self.model), requiring_gradients(weights):
            for loss in self.losses(temperature):
                for total, grad in zip(sums, gradients_of(loss, weights), strict=True):
                    total += grad.pow(power)
        return {name: total / len(self.seen()) for name, total in zip(layers(self.model), sums, strict=True)}


def _one_tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise SparseLabError(
            f"this score adds up the network's outputs, or divides them: one tensor, not a {type(output).__name__}"
        )
    return output


SCORES: dict[str, Callable[[View], Scores]] = {}


OF_WEIGHTS: set[str] = set()
OWN_PASSES: set[str] = set()
WITHOUT_PASSES: set[str] = set()


def score(
    function: Callable[[View], Scores] | None = None,
    *,
    of_weights: bool = False,
    own_passes: bool = False,
    without_passes: bool = False,
) -> Any:
    """Enter a score under its function's name: `@score`, or with what a request has to know of it.

    of_weights: a weight of zero scores zero, so it cannot say which pruned weight is to come back.
    own_passes: it runs the network itself, and gradients that a training step has at hand are not enough.
    without_passes: it runs no network and looks at no gradients.
    """
    if function is None:
        return partial(score, of_weights=of_weights, own_passes=own_passes, without_passes=without_passes)
    SCORES[function.__name__] = function
    OF_WEIGHTS.update([function.__name__] * of_weights)
    OWN_PASSES.update([function.__name__] * own_passes)
    WITHOUT_PASSES.update([function.__name__] * without_passes)
    return function


def register_score(
    function: Callable[[View], Scores] | None = None,
    *,
    of_weights: bool = False,
    own_passes: bool = False,
    without_passes: bool = False,
) -> Any:
    """Make a score of your own known under its function's name, as a decorator: `@register_score`, or with keywords.

    The function takes a `View` and returns one tensor a counted layer, in the weight's shape; higher is better. Then
    `method.prune.score=NAME` and every other key that takes a score take it.

    of_weights: a weight of zero scores zero, so it cannot say which pruned weight is to come back.
    own_passes: it runs the network itself, and gradients that a training step has at hand are not enough.
    without_passes: it runs no network and looks at no gradients, so that no training images are read for it.

    Raise SparseLabError for a name that is taken or no plain word, and for what is no function.
    """
    from sparse_lab.sparsity.structured.filter_scores import FILTER_SCORES

    if function is None:
        return partial(register_score, of_weights=of_weights, own_passes=own_passes, without_passes=without_passes)
    # one key takes scores of weights and of filters: neither may have a name of the other
    name = check_function("score", function, {*SCORES, *FILTER_SCORES, *names.WITHOUT_DATA, "none"})
    known = names.WITHOUT_DATA if without_passes else names.FROM_GRADIENTS

    def forget() -> None:
        del SCORES[name]
        for group in (OF_WEIGHTS, OWN_PASSES, WITHOUT_PASSES, known):
            group.discard(name)

    score(_checked(function), of_weights=of_weights, own_passes=own_passes, without_passes=without_passes)
    known.add(name)
    enter("score", name, forget)
    return function


def _checked(function: Callable[[View], Scores]) -> Callable[[View], Scores]:
    """A score that says so where it returns no tensor, or one of another shape, for a layer."""

    @wraps(function)
    def checked(view: View) -> Scores:
        found = function(view)
        for name, weight in view.weights().items():
            one = found.get(name) if isinstance(found, dict) else None
            if not isinstance(one, Tensor) or one.shape != weight.shape:
                raise SparseLabError(
                    f"score {function.__name__!r} returns no tensor of shape {list(weight.shape)} for layer {name}"
                )
        return found

    return checked


def find_score(name: str) -> Callable[[View], Scores]:
    """The score of that name. Raises SparseLabError with the nearest known one."""
    if name not in SCORES:
        raise SparseLabError(f"unknown score {name!r}; {nearest(name, list(SCORES))}")
    return SCORES[name]


@score(of_weights=True, without_passes=True)
def magnitude(view: View) -> Scores:
    """|w|."""
    return {name: weight.abs() for name, weight in view.weights().items()}


@score(of_weights=True, without_passes=True)
def lamp(view: View) -> Scores:
    """Layer-adaptive magnitude (Lee et al. 2021, arXiv 2010.07611), to be ranked over all layers at once."""
    return {name: lamp_of(weight) for name, weight in view.weights().items()}


def lamp_of(weight: Tensor) -> Tensor:
    """LAMP of one layer: w^2 over the sum of it and all larger squares; the largest weight scores 1.

    Among equal weights the lowest index counts as the largest. Zeros score 0, also in a layer of zeros. Sums run in
    float64: over 2 M squares float32 would lose the small ones.
    """
    squares = weight.detach().reshape(-1).double().square()
    descending, order = torch.sort(squares, descending=True, stable=True)
    values = torch.where(descending > 0, descending / descending.cumsum(0), 0.0)
    return torch.empty_like(squares).index_copy_(0, order, values).reshape(weight.shape)


@score
def gradient(view: View) -> Scores:
    """|mean gradient| of the loss (RigL's growth score)."""
    return {name: grad.abs() for name, grad in view.gradients().items()}


@score(of_weights=True)
def taylor(view: View) -> Scores:
    """g^2 w^2, the mean over batches: the squared first-order change of the loss (Molchanov et al. 2019)."""
    squares = view.gradients(power=2)
    return {name: squares[name] * weight.square() for name, weight in view.weights().items()}


@score(of_weights=True)
def snip(view: View) -> Scores:
    """|w g|, g the mean gradient: how much the loss feels each connection (SNIP, Lee et al. 2019, arXiv 1810.02340).

    With batch statistics: it is meant for a network that was just initialised.
    """
    grads = view.gradients(mode=batch_statistics)
    return {name: (weight * grads[name]).abs() for name, weight in view.weights().items()}


@score(of_weights=True, own_passes=True)
def grasp(view: View) -> Scores:
    """w (H g), what a weight adds to the gradient's flow (GraSP, Wang et al. 2020, arXiv 2002.07376); signed.

    g is the mean gradient over all batches, held constant; H g the gradient of g's dot product with the gradient, the
    mean over batches. The paper scores -w (H g) and removes the highest. With batch statistics. Raises SparseLabError
    without batches: gradients at hand say nothing of H.
    """
    if view.grads is not None or not view.seen():
        raise SparseLabError(
            "grasp needs batches: it can prune or regrow, but not drop and grow by the gradients of a step"
        )
    weights = [module.weight for module in layers(view.model).values()]
    along = view.gradients(mode=batch_statistics, temperature=GRASP_TEMPERATURE)
    products = {name: torch.zeros_like(direction) for name, direction in along.items()}
    # of torch's ways to compute attention only this one can be differentiated twice
    plainly = sdpa_kernel(SDPBackend.MATH)
    with batch_statistics(view.model), requiring_gradients(weights), torch.enable_grad(), plainly:
        for loss in view.losses(GRASP_TEMPERATURE):
            grads = gradients_of(loss, weights, create_graph=True)
            flow = torch.stack([(g * d).sum() for g, d in zip(grads, along.values(), strict=True)]).sum()
            for total, product in zip(products.values(), gradients_of(flow, weights), strict=True):
                total += product / len(view.seen())
    return {name: weight * products[name] for name, weight in view.weights().items()}


@score(of_weights=True, own_passes=True)
def synflow(view: View) -> Scores:
    """|w dR/dw|, R the summed logits for an image of ones (SynFlow, Tanaka et al. 2020, arXiv 2006.05467). No data.

    R is of a copy in which all weights are positive and everything passes on what it gets, in float64: R is a product
    over all layers. Every layer on all paths has the same sum of scores, so a small layer has large ones. The paper
    prunes in 100 steps and scores anew at each.
    """
    probe = copy.deepcopy(view.model).double().eval()
    _pass_all_on(probe)
    for name, value in (*probe.named_parameters(), *probe.named_buffers()):
        if name.endswith(("bias", "running_mean")):
            value.data.zero_()
        elif isinstance(value, nn.Parameter):
            value.data.abs_()
    weights = {name: module.weight for name, module in layers(probe).items()}
    ones = image_like(probe, view.probe.shape(), 1.0)
    with requiring_gradients(weights.values()), torch.enable_grad():
        grads = gradients_of(_one_tensor(send(probe, ones)).sum(), list(weights.values()))
    return {name: weight.detach() * grad for (name, weight), grad in zip(weights.items(), grads, strict=True)}


def _pass_all_on(module: nn.Module) -> None:
    """Put the identity in place of all activations, those with parameters of their own too, in place."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ReLU, nn.ReLU6)) or not getattr(child, "counted", True):
            setattr(module, name, nn.Identity())
        else:
            _pass_all_on(child)


@score
def mest(view: View) -> Scores:
    """|w| + lambda |g|, g the mean gradient (MEST, Yuan et al. 2021, arXiv 2110.14032)."""
    grads = view.gradients()
    return {name: weight.abs() + MEST_LAMBDA * grads[name].abs() for name, weight in view.weights().items()}


@score(without_passes=True)
def random(view: View) -> Scores:
    """Uniform in [0, 1): the control of every comparison."""
    return {
        name: torch.rand(weight.shape, generator=view.generator, dtype=torch.float64).to(weight.device)
        for name, weight in view.weights().items()
    }


@score(without_passes=True)
def reference(view: View) -> Scores:
    """Weights alive in a less sparse reference network first, by |w| there; then the rest by |w| in the network
    viewed.
    """
    if view.reference is None:
        raise SparseLabError("the score reference needs the weights of a reference network")
    result = {}
    for name, weight in view.weights().items():
        there = view.reference[name].to(weight).abs().double()
        here = weight.abs().double()
        result[name] = torch.where(
            there > 0, 1.0 + there / there.max().clamp_min(1e-30), here / (here.max() * 2.0).clamp_min(1e-30)
        )
    return result
