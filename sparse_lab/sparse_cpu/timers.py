"""Where the time goes: seconds of each kind of kernel, while somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_IDLE = nullcontext()
_seconds: dict[str, float] | None = None


@contextmanager
def recording() -> Iterator[dict[str, float]]:
    """Seconds by kind of kernel, filled while the context is open."""
    global _seconds
    before, _seconds = _seconds, {}
    try:
        yield _seconds
    finally:
        _seconds = before


def timed(kind: str) -> AbstractContextManager[None]:
    """Count what is done inside as `kind`; free where nobody records."""
    return _IDLE if _seconds is None else _count(kind, _seconds)


@contextmanager
def _count(kind: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - start
