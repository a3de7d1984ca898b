"""What every algorithm is: it hangs on an optimizer's own hooks, counts the steps that really happened, carries its
state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.processes import broadcast_from_rank0

HOOKS = "sparse_lab_hooks"


class Algorithm:
    """Something that changes a network while it trains. A subclass says what, in the moments that it needs:

    begin_step: before the forward pass of a step.
    gradients_ready: the gradients are there, as early as the loop says so (in Lightning: before they are clipped).
    before_step: the gradients are as the optimizer will use them.
    after_step: after an optimizer step that really happened; `step` counts it.
    end_epoch: after the last step of an epoch.

    Of all algorithms on one optimizer those of a lower `order` are asked first; in which order they were attached has
    no say. `step` counts optimizer steps since the training began: one that a gradient scaler skipped is none.
    `ends_epoch_every`: where it is set an epoch ends after so many, in a loop that does not say so.
    """

    order = 0
    ends_epoch_every: int | None = None
    owner: object = None  # what is to live as long as this hangs on an optimizer

    def __init__(self) -> None:
        self.step = 0
        self.epoch = 0
        self.broadcast: Callable[[Any], Any] = broadcast_from_rank0
        self._begun_at = self._ended_at = -1
        self._optimizer: Optimizer | None = None

    def attach(self, optimizer: Optimizer, broadcast: Callable[[Any], Any] | None = None) -> None:
        """Hang on `optimizer`. broadcast: makes rank 0's value everyone's; torch.distributed's where it is not given.

        Raises SparseLabError where it hangs on one already.
        """
        if self._optimizer is not None:
            raise SparseLabError(f"{type(self).__name__} is attached already: detach it first")
        if broadcast is not None:
            self.broadcast = broadcast
        self._optimizer = optimizer
        StepHooks.of(optimizer).add(self)

    def detach(self) -> None:
        """Leave the optimizer alone; nothing happens where it hangs on none."""
        if self._optimizer is not None:
            StepHooks.of(self._optimizer).remove(self)
            self._optimizer = None

    def begin_step(self, optimizer: Optimizer) -> None:
        pass

    def gradients_ready(self, optimizer: Optimizer) -> None:
        pass

    def before_step(self, optimizer: Optimizer) -> None:
        pass

    def after_step(self, optimizer: Optimizer) -> None:
        pass

    def end_epoch(self, optimizer: Optimizer) -> None:
        pass

    def reads_gradients(self) -> bool:
        """Will it look at the gradients of pruned weights after the next step?"""
        return False

    def scores_next(self) -> bool:
        """Will it run a network over data before the next step, which may take long?"""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs: plain values and tensors."""
        return {"step": self.step, "epoch": self.epoch, "begun_at": self._begun_at, "ended_at": self._ended_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.epoch = state["step"], state["epoch"]
        self._begun_at, self._ended_at = state["begun_at"], state["ended_at"]


class StepHooks:
    """The algorithms on one optimizer, and its own hooks that ask them: `StepHooks.of(optimizer)`.

    What torch's optimizers have no hook for, a loop says: `begin` before the forward pass, `gradients_ready` where it
    clips, `end_epoch`. Each may be said more than once in a step; it counts once. Of the first two a loop may say
    nothing: then the moment before the optimizer moves will do. For a loop that says nothing at all there is
    `begin_each_step`.
    """

    @classmethod
    def of(cls, optimizer: Optimizer) -> StepHooks:
        # on the optimizer itself: in a table of ours the algorithms, which know it, would keep it alive for good
        own = vars(optimizer)
        if HOOKS not in own:
            own[HOOKS] = cls(optimizer)
        return own[HOOKS]

    def __init__(self, optimizer: Optimizer) -> None:
        self.algorithms: list[Algorithm] = []
        self._ready = False
        self._skipped = False
        self._itself = False
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def add(self, algorithm: Algorithm) -> None:
        self.algorithms.append(algorithm)
        self.algorithms.sort(key=lambda one: (one.order, type(one).__name__))

    def remove(self, algorithm: Algorithm) -> None:
        self.algorithms.remove(algorithm)

    def gradients_are_read(self) -> bool:
        """Will anything look at the gradients of pruned weights after the next step?"""
        return any(one.reads_gradients() for one in self.algorithms)

    def begin_each_step(self, optimizer: Optimizer) -> None:
        """Begin the first step now, and each other as soon as the one before it has happened."""
        self._itself = True
        self._begin(optimizer)

    def begin(self, optimizer: Optimizer) -> None:
        """Before the forward pass of a step. A step that was skipped is begun once."""
        self._ready = False
        self._begin(optimizer)

    def _begin(self, optimizer: Optimizer) -> None:
        for one in self.algorithms:
            if one._begun_at != one.step:
                one._begun_at = one.step
                one.begin_step(optimizer)

    def gradients_ready(self, optimizer: Optimizer) -> None:
        """The gradients are there: before they are clipped, where a loop clips."""
        if self._ready:
            return
        self._ready = True
        for one in self.algorithms:
            one.gradients_ready(optimizer)

    def end_epoch(self, optimizer: Optimizer) -> None:
        """After the last step of an epoch."""
        for one in self.algorithms:
            self._end(one, optimizer)

    def _end(self, one: Algorithm, optimizer: Optimizer) -> None:
        if one._ended_at != one.step:
            one._ended_at = one.step
            one.end_epoch(optimizer)
            one.epoch += 1

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A closure computes the gradients within the step (as in Lightning): then its end is the moment."""
        # a fused optimizer is called by the gradient scaler in any case, and skips the step by itself
        found = getattr(optimizer, "found_inf", None)
        self._skipped = found is not None and bool(found.item())
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self._skipped:
            return None
        if closure is None:
            self._ask_before(optimizer)
            return None

        def computed() -> Any:
            loss = closure()
            self._ask_before(optimizer)
            return loss

        return (args[0],), {**kwargs, "closure": computed}

    def _ask_before(self, optimizer: Optimizer) -> None:
        self._begin(optimizer)
        if self.gradients_are_read():
            _unscale(optimizer)
        self.gradients_ready(optimizer)
        for one in self.algorithms:
            one.before_step(optimizer)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._ready = False
        if self._skipped:
            return
        for one in self.algorithms:
            one.step += 1
        for one in self.algorithms:
            one.after_step(optimizer)
        for one in self.algorithms:
            if one.ends_epoch_every is not None and one.step % one.ends_epoch_every == 0:
                self._end(one, optimizer)
        if self._itself:
            self._begin(optimizer)


def _unscale(optimizer: Optimizer) -> None:
    """Do what a fused optimizer would do with the scale that a gradient scaler has handed it, before it moves: scores
    read gradients as the step uses them.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    with torch.no_grad():
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device).double().reciprocal().to(gradient.dtype))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
