"""Which items a process was at when it died, so that the next start gets past the one that it died of.

May use: storage.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import select
import signal
import stat
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn, Self

from .storage import file_digest, plain, remove_parts, write_json

MAX_JSON_BYTES = 1 << 24  # of a file that an earlier run left; a study's result has some 20 kB


def read_left_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file that an earlier run left, as dict.

    Raises ValueError, saying what is wrong, for anything else: whatever lies at `path` may be damaged or foreign.
    """
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # opening a FIFO would block, a device never ends
            raise ValueError("not a regular file")
        if about.st_size > MAX_JSON_BYTES:
            raise ValueError(f"{about.st_size >> 20} MB: too large")
        with open(path, "rb") as file:
            value = json.loads(file.read(MAX_JSON_BYTES))
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


_MOST_HASHED = 1 << 30  # bytes of a file: no slice is larger


def images_digest(folder: str | Path) -> str:
    """A short hash of the names and contents of the files in a study's folder: it changes when a file is mended.

    Times are left out, which every mounting of the same data sets anew. Links to folders are not followed. Of files too
    large for slices (_MOST_HASHED) the size stands for the content. Never raises: what cannot be looked at counts as
    absent.
    """
    found = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in files:
            path = os.path.join(place, name)
            try:
                size = os.stat(path).st_size
                content = file_digest(path) if size <= _MOST_HASHED and os.path.isfile(path) else ""
                found.append(f"{os.path.relpath(path, folder)} {size} {content}")
            except OSError:
                continue
    return hashlib.sha256("\n".join(sorted(found)).encode(errors="surrogateescape")).hexdigest()[:16]


DIED = "the process died while it was at this"  # so begins what InFlight says of an item that it passes over


class InFlight:
    """A journal of the items that this process is at: one small file for each, from `begin` to `end`.

    What kills a process outright (the kernel for want of memory, a decoder's segmentation fault) leaves nothing else
    behind. The next start finds the files of the dead process: `suspects`. Several items are in flight at a time, and
    a kill may come from outside (a session's time limit, a power cut), so being in flight proves nothing. Suspects are
    therefore done after everything else and one at a time, and where possible in a child (run_in_child): if that dies,
    the suspect is guilty (`condemn`) and the run goes on. So a deadly item is passed over at the second start.

    Where there can be no child, an item is guilty at which the process died twice, the last time with nothing else in
    flight: passed over at the third start. Should the parent keep dying together with its child (some containers end
    all processes at once when memory is short), three such deaths count as guilt: one or two may well be kills from
    outside, since a process that is killed again and again is mostly killed at its last, lonely items.

    Ctrl-C, exceptions and SIGTERM end the block in order and blame nobody. A guilty verdict (`passed_over`) stands as
    long as the item's key does; see `key_of`. Files of a process that still runs are left alone.
    A disk that cannot be written to costs this protection, not the run.

    Parameters
    ----------
    folder : path
        Of the journal; made when needed, removed when empty.
    what : str
        What an item is called in messages.
    key_of : callable
        item -> str: whatever the item's fate depends on (its files, the weights). With another key an item is new.
    is_done : callable
        item -> bool: True for an item that was finished before the process died.
    items : collection of int, optional
        The items of this process, where several processes, on other machines perhaps, share the folder: entries of
        others are left alone. Default: all are its own.
    """

    def __init__(
        self,
        folder: str | Path,
        what: str,
        key_of: Callable[[int], str],
        is_done: Callable[[int], bool] = lambda item: False,
        items: Collection[int] | None = None,
    ) -> None:
        self.folder, self.what, self.key_of = Path(folder), what, key_of
        self.suspects: dict[int, dict[str, Any]] = {}  # item -> its entry
        self.passed_over: dict[int, str] = {}  # item -> why, a sentence
        self._open: dict[int, dict[str, Any]] = {}
        self._lock, self._closed, self._silent = threading.RLock(), False, False
        self._read(is_done, items)

    def _read(self, is_done: Callable[[int], bool], items: Collection[int] | None) -> None:
        left = {}
        remove_parts(self.folder)  # the process may have died while it wrote an entry
        for path in sorted(self.folder.glob("*.json")):
            if items is not None and path.stem not in map(str, items):
                continue
            entry = _read_entry(path)
            if entry is not None and _lives(entry["process"]):
                continue
            item = int(path.stem) if path.stem.isdecimal() else None
            if item is None or entry is None or entry["key"] != self.key_of(item):
                self._remove(path)
            elif entry["guilty"]:
                self.passed_over[item] = entry["guilty"]
            elif is_done(item):
                self._remove(path)
            else:
                left[item] = entry
        together = Counter(json.dumps(entry["process"]) for entry in left.values())
        for item, entry in left.items():
            if entry["process"]:
                entry["deaths"] += 1
                entry["alone"] += together[json.dumps(entry["process"])] == 1
                entry["process"] = None
            self.suspects[item] = entry
            if entry["alone"] >= (3 if entry["child"] else 1) and entry["deaths"] > 1:
                self.condemn(item)
            else:
                self._write(item, entry)
        # Those with fewest deaths first: when the run is killed again, the others have been done.
        self.suspects = dict(sorted(self.suspects.items(), key=lambda pair: pair[1]["deaths"]))

    def begin(self, item: int, child: bool = False) -> None:
        """The process is at this item from now on. child: it is done in one, see run_in_child."""
        with self._lock:
            if not self._closed:
                before = self.suspects.get(item, {"deaths": 0, "alone": 0})
                entry = before | {"process": _process(), "key": self.key_of(item), "child": child, "guilty": ""}
                self._open[item] = entry
                self._write(item, entry)

    def end(self, item: int) -> None:
        """The item is finished, whether well or not."""
        with self._lock:
            self._open.pop(item, None)
            self.suspects.pop(item, None)
            self._remove(self._path(item))

    def condemn(self, item: int, how: str = "") -> str:
        """The process, or its child, died of this item. how: of what, in words. Returns the sentence that says so."""
        with self._lock:
            self._open.pop(item, None)
            entry = self.suspects.pop(item)
            times = entry["deaths"] + bool(how)
            why = f"{DIED} {self.what} ({times} times{how and f', at last of {how}'})"
            why += f"; passed over until its files change or {self._path(item)} is deleted"
            self._write(item, entry | {"process": None, "key": self.key_of(item), "guilty": why})
            self.passed_over[item] = why
            return why

    def close(self) -> None:
        """Nothing is in flight any more. Items that were begun and not ended are as they were before."""
        with self._lock:
            self._closed = True
            for item, entry in self._open.items():
                if entry["deaths"]:
                    self._write(item, entry | {"process": None})
                else:
                    self._remove(self._path(item))
            self._open.clear()
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def __enter__(self) -> Self:
        # SIGTERM would leave the files behind. Only where nobody else handles it, and in the main thread.
        self._handled = threading.current_thread() is threading.main_thread() and (
            signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        )
        if self._handled:
            signal.signal(signal.SIGTERM, self._terminated)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _terminated(self, number, _):
        self.close()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _path(self, item: int) -> Path:
        return self.folder / f"{item}.json"

    def _write(self, item: int, entry: dict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._path(item), entry)
        except OSError as error:
            if not self._silent:
                print(f"{self._path(item)} cannot be written ({error}): after a crash nobody knows where it was")
            self._silent = True

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()


def _read_entry(path):
    """What InFlight wrote, None where it is something else."""
    kinds = {"process": (dict, type(None)), "deaths": int, "alone": int, "child": bool, "guilty": str, "key": str}
    try:
        entry = read_left_json(path)
    except ValueError:
        return None
    return entry if all(isinstance(entry.get(name), kind) for name, kind in kinds.items()) else None


def _process():
    """What tells this process from others of the same number, earlier or later."""
    return {"pid": os.getpid(), "began": _began(os.getpid())}


def _began(pid):
    """When a process began, as text that no other process has; None for one that has ended or is not known."""
    if sys.platform != "linux":
        return "" if pid == os.getpid() else None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"  # a zombie has ended; proc(5): field 22, starttime


def _lives(process):
    began = _began(process["pid"]) if process and isinstance(process.get("pid"), int) else None
    return began is not None and began == process.get("began")


# -- a child to do what may be deadly


class ChildDied(RuntimeError):
    """The child died; the message says of what."""


def can_run_in_child() -> bool:
    """Whether run_in_child works here: forking a process that has threads is safe enough on Linux alone."""
    return sys.platform == "linux"


def run_in_child(work: Callable[[], Any], patience_s: float) -> Any:
    """The result of work() in a forked copy of this process, whose death costs nothing else.

    Parameters
    ----------
    work : callable
        No arguments; returns what json.dumps takes (NumPy's values included). It runs in the only thread of its
        process, must not use a GPU, and what it prints is lost.
    patience_s : float
        After so many seconds the child is killed.

    Returns
    -------
    What `work` returned, after a round trip through JSON.

    Raises
    ------
    ChildDied
        A signal ended the child, or it exited.
    RuntimeError
        `work` raised an exception; its type and message.
    TimeoutError
        The child took longer than patience_s.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if not child:
        _be_the_child(work, read, write)
    os.close(write)
    status = None
    try:
        answer = _read_until(read, time.monotonic() + patience_s)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:  # too late, or stopped while waiting
        os.close(read)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if status or not answer:
        raise ChildDied(_death(status))
    result = json.loads(answer)
    if "error" in result:
        raise RuntimeError(result["error"])
    return result["result"]


def _read_until(pipe: int, until_s: float) -> bytes:
    """All bytes of a pipe. Raises TimeoutError."""
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, until_s - time.monotonic()))
        if not ready:
            raise TimeoutError("not having finished in time")
        part = os.read(pipe, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _be_the_child(work: Callable[[], Any], read: int, write: int) -> NoReturn:
    """Run in the child: send the result and exit, whatever happens."""
    status = 1
    try:
        os.close(read)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends the child
        sys.stdout = sys.stderr = open(os.devnull, "w")
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: with the parent the child ends, too
            # When memory is short, the kernel kills the child and not the parent.
            Path("/proc/self/oom_score_adj").write_text("1000")
        try:
            answer = {"result": work()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with open(write, "wb") as pipe:
            pipe.write(json.dumps(answer, default=plain).encode())
        status = 0
    finally:
        os._exit(status)


def _death(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name
