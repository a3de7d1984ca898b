"""Import Lightning in a third of the time: without what it imports at its start and a run of ours never touches.

torchmetrics (which brings torchvision and scipy) stands behind `self.log`, and torch._dynamo behind torch.compile;
together they take longer to import than torch, and every command would wait for them. They are kept out only while
Lightning is imported: whoever needs one later, torch.compile among them, imports it as ever.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any, NoReturn

LIGHTNING = ("pytorch_lightning", "lightning_fabric")
# package -> the classes that Lightning takes from it, to ask what an object is an instance of
TAKEN = {"torchmetrics": ("Metric", "MetricCollection"), "torch._dynamo": ("OptimizedModule",)}


class _IsInstance(type):
    """Asks the real class, once somebody has imported it; before that nothing can be an instance of it."""

    def __instancecheck__(cls, thing: Any) -> bool:
        package = vars(cls).get("package")
        if package is None:  # a class that Lightning derives
            return super().__instancecheck__(thing)
        real = sys.modules.get(package)
        return real is not None and isinstance(thing, getattr(real, cls.__name__))


def import_lightning() -> None:
    """Import pytorch_lightning, if nobody has. For the command's own processes: `self.log` does not work afterwards."""
    if "pytorch_lightning" in sys.modules:
        return
    gc.disable()  # it would look through ever more modules, and find no garbage
    try:
        _import()
    finally:
        gc.enable()
    _step_without_dynamo()


def _import() -> None:
    import torch  # noqa: F401  is not kept from importing what it needs itself

    with kept_out():
        try:
            importlib.import_module("pytorch_lightning")
        except (ImportError, AttributeError, TypeError):  # another version of Lightning takes more: slower, then
            for name in [one for one in sys.modules if one.partition(".")[0] in LIGHTNING]:
                del sys.modules[name]
    importlib.import_module("pytorch_lightning")


@contextmanager
def kept_out() -> Iterator[None]:
    """Keep torchmetrics and torch._dynamo, unless they are here already, from being imported while the block lasts.

    torch imports the second also to follow shapes through a network on the device "meta", and uses nothing of it.
    """
    stand_ins = {name: _stand_in(name, classes) for name, classes in TAKEN.items() if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _stand_in(package: str, classes: tuple[str, ...]) -> ModuleType:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{package} was kept out when the command started: self.log cannot be used in its runs")

    module: Any = ModuleType(package)
    module.__path__ = []
    module.__version__ = version(package.partition(".")[0])
    module.disable = lambda function, *_, **__: function  # what torch.compiler.disable calls
    for name in classes:
        setattr(module, name, _IsInstance(name, (), {"package": package, "__init__": refuse}))
    return module


def _step_without_dynamo() -> None:
    """torch's optimizers import torch._dynamo at the first call of some methods and in every step, for the sake of
    programs that torch.compile a step of an optimizer. Nothing here does.
    """
    from torch.optim import SGD, Adam, AdamW, Optimizer

    for method in vars(Optimizer).values():
        plain, code = getattr(method, "__wrapped__", None), getattr(method, "__code__", None)
        if plain is not None and code is not None and code.co_filename.endswith("_compile.py"):
            plain.__dynamo_disable = plain
    for kind in (SGD, Adam, AdamW):
        if "step" in vars(kind) and hasattr(kind.step, "__wrapped__"):
            kind.step = _step(kind.step.__wrapped__)  # type: ignore[method-assign]


def _step(plain: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(plain)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    return step
