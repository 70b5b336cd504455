"""Work that other threads do ahead, while this one uses what they have finished.

May use: nothing of the kit.
"""

import atexit
import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

CLOSING_S = 10.0  # for threads to end: the next check of a study's limit is a second away at most


class _Slot:
    """One job's place: whether (begun) and since when (since_s, of time.monotonic) it is worked on, by which
    thread, and its result."""

    def __init__(self, job: Any) -> None:
        self.job, self.begun, self.since_s = job, threading.Event(), 0.0
        self.result: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None


class ReadAhead:
    """Work on jobs in threads, a bounded number of them ahead of who takes the results, in the jobs' order.

    jobs: iterable; work: function of one job, and of a function that says whether the result is no longer wanted, which
    does not raise; threads: how many jobs are worked on at a time; ahead:
    how many are being worked on or waiting. The threads are daemons: one that hangs does not keep the process alive.
    """

    def __init__(
        self, jobs: Iterable[Any], work: Callable[[Any, Callable[[], bool]], Any], threads: int, ahead: int
    ) -> None:
        self.jobs, self.work, self.ahead = deque(jobs), work, ahead
        self.tasks: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self.slots: deque[_Slot] = deque()
        self.stopped = False
        self.threads: list[threading.Thread] = []
        self.given_up: list[threading.Thread] = []
        _AT_WORK.add(self)
        for _ in range(threads):
            self._start()

    def _start(self):
        thread = threading.Thread(target=self._run, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _run(self):
        while (slot := self.tasks.get()) is not None and not self.stopped:
            slot.since_s, slot.thread = time.monotonic(), threading.current_thread()
            slot.begun.set()
            slot.result.put(self.work(slot.job, lambda: self.stopped))

    def take(self, patience_s: float, wait_s: float = math.inf) -> Any:
        """The next job's result. Raises queue.Empty when it has been worked on for patience_s seconds, or was waited
        for wait_s seconds here; then another thread takes the place of the one that hangs, and the job is passed over.
        """
        while self.jobs and len(self.slots) < self.ahead:
            self.slots.append(_Slot(self.jobs.popleft()))
            self.tasks.put(self.slots[-1])
        slot, until_s = self.slots.popleft(), time.monotonic() + wait_s
        try:
            if not slot.begun.wait(min(wait_s, threading.TIMEOUT_MAX)):
                raise queue.Empty
            return slot.result.get(timeout=max(0.0, min(until_s, slot.since_s + patience_s) - time.monotonic()))
        except queue.Empty:
            if slot.thread in self.threads:
                self.threads.remove(slot.thread)
                self.given_up.append(slot.thread)
            self._start()
            raise

    def close(self, patience_s: float = CLOSING_S) -> None:
        """Work off nothing more; wait for what is being worked on, but no longer than patience_s.

        Python ends daemon threads wherever they are when the interpreter exits, and one that is then inside PyTorch
        takes the process with it ("terminate called without an active exception"). So they are waited for, and `work`
        should return early when its result is no longer wanted. Those that were given up get their time when the
        process exits.
        """
        self.stopped = True
        for _ in (*self.threads, *self.given_up):
            self.tasks.put(None)
        _join(self.threads, patience_s)


_AT_WORK: weakref.WeakSet[ReadAhead] = (
    weakref.WeakSet()
)  # all ReadAhead; one with threads at work stays in it, since they refer to it


@atexit.register
def _close_all():
    """Wait once more, for threads that were given up or whose ReadAhead nobody closed: see ReadAhead.close."""
    aheads = list(_AT_WORK)
    for ahead in aheads:
        ahead.close(0)
    _join([thread for ahead in aheads for thread in (*ahead.threads, *ahead.given_up)], CLOSING_S)


def _join(threads, patience_s):
    """Wait until all the threads have ended, or patience_s have passed."""
    until_s = time.monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))
