"""Bounds on the CPU time that one study may take.

May use: nothing of the kit.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


class TookTooLong(RuntimeError):
    """A piece of work was given up between two of its steps; the message says why."""


_active = threading.local()


@contextlib.contextmanager
def cpu_limit(seconds: float, stopped: Callable[[], bool] | None = None) -> Iterator[None]:
    """Limit what runs in this block, in this thread: check_limit raises TookTooLong once the limit is exceeded.

    CPU time of this thread counts, not time on the clock: whether a study is finished must not depend on what else the
    machine does. Limits nest; each of them holds.

    Parameters
    ----------
    seconds : float
        CPU time that the block may use.
    stopped : callable, optional
        No arguments; the work is also given up as soon as this returns True.
    """
    limits = _active.__dict__.setdefault("limits", [])
    limits.append((time.thread_time() + seconds, seconds, stopped))
    try:
        yield
    finally:
        limits.pop()


def check_limit() -> None:
    """Raise TookTooLong if a limit of this thread is exceeded. Cheap; long loops call it at every step."""
    for until_s, seconds, stopped in getattr(_active, "limits", ()):
        if stopped is not None and stopped():
            raise TookTooLong("no longer wanted: the run has ended")
        if time.thread_time() > until_s:
            raise TookTooLong(f"more than {seconds:g} s of CPU time")
