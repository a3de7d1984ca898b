"""Forward pass, loss and figures of one training batch: eager, compiled, or as a CUDA graph together with its backward
pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Say = Callable[[str], None]
Computed = tuple[Tensor, Tensor]  # loss and figures
WARM = 3  # passes before a graph is recorded: kernels are chosen and workspaces made in the first ones


def resolve_compile_mode(asked: str, device: torch.device) -> str:
    """trainer.compile as it is on this device: auto is 'full' on a GPU and 'off' on a CPU."""
    if asked != "auto":
        return asked
    return "full" if device.type == "cuda" else "off"


def figures(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Float64 [3] on the device: summed loss, hits, images."""
    hits = (logits.detach().argmax(1) == labels).sum()
    return torch.stack([loss.detach().double() * len(labels), hits.double(), hits.new_full((), len(labels)).double()])


def compute(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, smoothing: float) -> Computed:
    """(cross-entropy of a batch, `figures`)."""
    logits = model(images)
    loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    return loss, figures(loss, logits, labels)


class TrainingStep:
    """`compute` of one network, made fast.

    how: 'full', torch.compile; on a GPU what it makes is recorded as a CUDA graph. 'graphs', a CUDA graph of torch's
    own kernels, ready in a second instead of a minute.

    Everything that looks at the network (scores, hooks, state dicts) sees what it always sees, and evaluation is eager.
    The first batch is tried out before it counts, and again after `renew`; if anything fails there, that is said once
    and the run goes on in eager mode. Loss and figures are good until the next call.
    """

    def __init__(self, model: nn.Module, smoothing: float, how: str, say: Say) -> None:
        self.model = model
        self.smoothing = smoothing
        self.how = how
        self.say = say
        self.failed: str | None = None  # what went wrong, if anything did
        self._tried = False
        self._fast: Callable[[Tensor, Tensor], Computed] | None = None

    def renew(self) -> None:
        """The network's parts have changed: make it anew, unless that has failed before."""
        self._tried, self._fast = self.failed is not None, None

    def __call__(self, images: Tensor, labels: Tensor) -> Computed:
        if not self._tried:
            self._tried = True
            self._fast = self._made(images, labels)
        if self._fast is None:
            return compute(self.model, images, labels, self.smoothing)
        return self._fast(images, labels)

    def backward(self, loss: Tensor, group: int = 1) -> None:
        """Put the gradients of the last call in place, added to what is there. `loss` is divided by the `group` of
        batches that step together; a graph has computed the gradients of the whole one.
        """
        if isinstance(self._fast, Recorded):
            self._fast.hand_out(group)
        else:
            loss.backward()

    def _made(self, images: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Computed] | None:
        start = time.monotonic()
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            with torch.random.fork_rng([images.device] if images.is_cuda else []):
                fast = self._made_of(self._whole(), images, labels)
        except Exception as error:  # the compiler's own, or whatever stands behind it: no C++ compiler, no headers
            line = (str(error).strip().splitlines() or [""])[0][:160]
            self.failed = f"trainer.compile={self.how} fails here ({type(error).__name__}: {line})"
            self.say(f"{self.failed}: goes on in eager mode")
            return None
        finally:
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(kept[name])
        self.say(f"training step ready in {time.monotonic() - start:.0f} s (trainer.compile={self.how})")
        return fast

    def _whole(self) -> Callable[[Tensor, Tensor], Computed]:
        model, smoothing = self.model, self.smoothing

        def whole(images: Tensor, labels: Tensor) -> Computed:
            return compute(model, images, labels, smoothing)

        if self.how == "graphs":
            return whole
        torch.compiler.reset()  # what was compiled before in this process counts towards torch's limits
        return torch.compile(whole, dynamic=False)

    def _made_of(
        self, whole: Callable[[Tensor, Tensor], Computed], images: Tensor, labels: Tensor
    ) -> Callable[[Tensor, Tensor], Computed]:
        moved = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if images.is_cuda:
            return Recorded(whole, moved, images, labels)
        if self.how == "graphs":
            raise RuntimeError("CUDA graphs need a GPU")
        loss, _ = whole(images, labels)
        torch.autograd.grad(loss, moved, allow_unused=True)  # the backward pass is compiled when it is first asked for
        return whole


def _like(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """`gradient` laid out as its parameter is: a fused optimizer takes no other."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class Recorded:
    """Forward and backward pass of one batch as one CUDA graph: the host starts it by a single call.

    parameters: those that get gradients. images, labels: a batch like those to come.
    """

    def __init__(
        self,
        whole: Callable[[Tensor, Tensor], Computed],
        parameters: list[nn.Parameter],
        images: Tensor,
        labels: Tensor,
    ) -> None:
        self.parameters = parameters
        self._images, self._labels = images.clone(), labels.clone()
        side = torch.cuda.Stream(images.device)
        side.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._pass(whole)
        torch.cuda.current_stream(images.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss, self._figures, self._gradients = self._pass(whole)
        self._graph.replay()
        torch.cuda.synchronize(images.device)  # what cannot be played fails here

    def _pass(self, whole: Callable[[Tensor, Tensor], Computed]) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        loss, figures = whole(self._images, self._labels)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        laid = tuple(_like(one, gradient) for one, gradient in zip(self.parameters, gradients, strict=True))
        return loss.detach(), figures, laid

    def __call__(self, images: Tensor, labels: Tensor) -> Computed:
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss, self._figures

    def hand_out(self, group: int = 1) -> None:
        """Give each parameter its gradient: of a batch that steps alone the graph's own, else a share added up."""
        if group == 1:
            for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
                parameter.grad = gradient
            return
        sums, shares = [], []
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if gradient is not None:
                if parameter.grad is None:  # the next pass overwrites the graph's own
                    parameter.grad = torch.zeros_like(gradient)
                sums.append(parameter.grad)
                shares.append(gradient)
        torch._foreach_add_(sums, shares, alpha=1.0 / group)
