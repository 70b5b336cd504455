"""Several processes that train together: how many, their launch on one machine, shared memory for their loaders.

May use: nothing of the kit.
"""

import ctypes
import os
import re
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def processes_for(processes: int, device: str = "auto") -> int:
    """How many processes to train with: 0 -> one for each GPU (one, where a certain device is asked for).

    Parameters
    ----------
    processes : int
        0, or the number itself.
    device : str
        As names.device_for takes it.

    Returns
    -------
    int
        1 or more.

    Raises
    ------
    ValueError
        A negative number, or more than one for each GPU.
    """
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    if processes < 0:
        raise ValueError(f"PROCESSES must be 0 (one for each GPU) or more, not {processes}")
    if processes > 1 and (0 < gpus < processes or device.isdigit() or device.startswith("cuda:")):
        raise ValueError(f"PROCESSES {processes} on DEVICE {device!r}: there is one process for each GPU ({gpus} here)")
    return processes or max(1, gpus)


def processes_of_launcher() -> int:
    """How many processes torchrun or `accelerate launch` has started of this one, on all machines; 0 without either."""
    several = int(os.environ.get("WORLD_SIZE") or 1)
    return several if several > 1 and {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= set(os.environ) else 0


def bytes_of(item: Any) -> int:
    """The bytes of all tensors and arrays in a data set's item, however they are nested.

    Parameters
    ----------
    item : object
        A tensor or an array, or dicts, lists and tuples of them; anything else counts as 0.

    Returns
    -------
    int
    """
    if isinstance(item, dict):
        return sum(bytes_of(value) for value in item.values())
    if isinstance(item, (list, tuple)):
        return sum(bytes_of(value) for value in item)
    return int(getattr(item, "nbytes", 0))


_OUT_OF_SHARED_MEMORY = re.compile(r"\bbus error\b|shared memory (object|file|limit)|</?torch_\d+", re.IGNORECASE)
_SHARED_MEMORY = "/dev/shm"


@contextmanager
def loader_memory(workers: int, batch_bytes: int = 0) -> Iterator[None]:
    """Say in words where loader processes lack shared memory: before they start, and when they die of it.

    Docker gives a container 64 MB of it, and a process that finds it full is killed.

    Parameters
    ----------
    workers : int
        Loader processes, of all that train.
    batch_bytes : int
        Of a batch, which each of them holds in shared memory.

    Raises
    ------
    RuntimeError
        There is too little of it, at the start or in the `with` block.
    """
    way_out = "set WORKERS to 0 or less than now, or give the container more (docker run --shm-size=8g, or --ipc=host)"
    if workers > 0 and os.path.isdir(_SHARED_MEMORY):
        room = os.statvfs(_SHARED_MEMORY)
        free = room.f_bavail * room.f_frsize
        if free < workers * batch_bytes:
            raise RuntimeError(
                f"WORKERS: {workers} loader processes need at least {workers * batch_bytes / 1e6:,.0f} MB of shared "
                f"memory, and {_SHARED_MEMORY} has {free / 1e6:,.0f} MB free: {way_out}"
            )
    try:
        yield
    except (RuntimeError, OSError) as error:
        if workers > 0 and _OUT_OF_SHARED_MEMORY.search(str(error)):
            raise RuntimeError(f"WORKERS: loader processes ran out of shared memory: {way_out}. {error}") from error
        raise


def launch(function: Callable[..., Any], arguments: tuple, processes: int) -> None:
    """Call function(*arguments) in several new processes of this machine, and return when all are done.

    Their output goes where this process' does. They end with this process, also when it is killed outright, and as soon
    as one of them fails.

    accelerate's notebook_launcher forks them off the notebook's kernel, whose GPU and threads do not survive that. This
    is the launcher of torch that it is made of, and torchrun too, with processes that start afresh ("spawn"); function
    and arguments must be picklable, and no file carries them.

    Raises
    ------
    RuntimeError
        Where one of them failed, with its last lines.
    """
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait for work sleep
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # all on one machine, whatever its name
    environment = {name: value for name, value in environment.items() if name not in os.environ}
    environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    stopped = None
    try:
        with _own_signals(), patch_environment(**environment):
            elastic_launch(config, _process)(function, arguments)
    except SignalException as error:
        stopped = error.sigval
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        text = failure.message
        if isinstance(text, dict):  # an exception; text where it was killed
            text = text.get("extraInfo", {}).get("py_callstack") or text.get("message", "")
        lines = "\n".join(str(text).splitlines()[-30:])
        raise RuntimeError(f"one of {processes} processes failed. Its last lines:\n{lines}") from None
    if stopped is not None:
        signal.raise_signal(stopped)  # what it would have done without the launcher: Ctrl-C is a KeyboardInterrupt


@contextmanager
def _own_signals():
    """Put back this process' signal handlers, which torch's launcher replaces for good."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    handlers = {number: signal.getsignal(number) for number in (getattr(signal, n, None) for n in names) if number}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # it replaces them there only
            for number, handler in handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)


def _process(function, arguments):
    """What each process of `launch` does."""
    end_with_parent()
    function(*arguments)


def end_with_parent() -> None:
    """From here on this process is killed when the one that started it ends. A launcher that is killed outright leaves
    its processes at work. On Linux only (prctl's PR_SET_PDEATHSIG is 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
