"""Forward pass, loss and figures of one training batch: eager, compiled, or as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Say = Callable[[str], None]
# torch compiles the forward pass in the first one and the backward pass behind it; with CUDA graphs the second records
# them and the third is the first to play them
TRIALS = 3


def figures(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Float64 [3] on the device: summed loss, hits, images."""
    hits = (logits.detach().argmax(1) == labels).sum()
    return torch.stack([loss.detach().double() * len(labels), hits.double(), hits.new_full((), len(labels)).double()])


def compute(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """(cross-entropy of a batch, `figures`)."""
    logits = model(images)
    loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    return loss, figures(loss, logits, labels)


class Whole(nn.Module):
    """`compute` of one network as a module of its own: what is done to it leaves the network as it is."""

    def __init__(self, model: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return compute(self.model, images, labels, self.smoothing)


class TrainingStep:
    """`compute` of one network, made fast.

    how: 'full', torch.compile: fused kernels, on a GPU played as CUDA graphs; 'graphs', CUDA graphs of torch's own
    kernels, which takes a second instead of a minute.

    Everything that looks at the network (scores, hooks, state dicts) sees what it always sees, and evaluation is eager.
    The first batch is tried out before it counts, and again after `renew`; if anything fails there, that is said once
    and the run goes on in eager mode. Figures and loss are good until the next call.
    """

    def __init__(self, model: nn.Module, smoothing: float, how: str, say: Say) -> None:
        self.model = model
        self.smoothing = smoothing
        self.how = how
        self.say = say
        self.failed: str | None = None  # what went wrong, if anything did
        self._tried = False
        self._fast: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def renew(self) -> None:
        """The network's parts have changed: make it anew."""
        self._tried = False

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self._tried:
            self._tried = True
            self._try(images, labels)
        if self._fast is None:
            return compute(self.model, images, labels, self.smoothing)
        if self.how == "full" and images.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return self._fast(images, labels)

    def _try(self, images: Tensor, labels: Tensor) -> None:
        start = time.monotonic()
        torch.compiler.reset()  # what was compiled before in this process counts towards torch's limits
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            with torch.random.fork_rng([images.device] if images.is_cuda else []):
                self._fast = self._recorded(images, labels) if self.how == "graphs" else self._compiled(images)
                self._pass(images, labels)
        except Exception as error:  # the compiler's own, or whatever stands behind it: no C++ compiler, no headers
            self._fast = None
            line = (str(error).strip().splitlines() or [""])[0][:160]
            self.failed = f"trainer.compile={self.how} fails here ({type(error).__name__}: {line})"
            self.say(f"{self.failed}: goes on in eager mode")
        else:
            self.say(f"training step ready in {time.monotonic() - start:.0f} s (trainer.compile={self.how})")
        finally:
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(kept[name])

    def _compiled(self, images: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        mode = "reduce-overhead" if images.is_cuda else "default"
        return torch.compile(Whole(self.model, self.smoothing), dynamic=False, mode=mode)

    def _recorded(self, images: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        if not images.is_cuda:
            raise RuntimeError("CUDA graphs need a GPU")
        whole = Whole(self.model, self.smoothing)
        return torch.cuda.make_graphed_callables(  # type: ignore[return-value]
            whole, (images.clone(), labels.clone()), allow_unused_input=True
        )

    def _pass(self, images: Tensor, labels: Tensor) -> None:
        """Some passes that count for nothing: a compiler fails in the first ones if it fails."""
        moved = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for _ in range(TRIALS):
            if self.how == "full" and images.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            assert self._fast is not None
            loss, _ = self._fast(images, labels)
            torch.autograd.grad(loss, moved, allow_unused=True)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
