"""A training in several processes or on several GPUs.

The training loop is the same for one process and for many: rank() is 0, world() is 1 and all_sum() does nothing where
no group of processes was formed.

May use: storage; trainer inside its jobs.
"""

import codecs
import ctypes
import json
import os
import re
import signal
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..storage import write_json


def rank():
    """This process' number, from 0; the first one writes files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(tensor):
    """The tensor's sum over all processes, in place and returned."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def processes_for(processes, device="auto"):
    """How many processes to train with: 0 -> one for each GPU (one, where a certain device is asked for).

    Raises ValueError on a negative number, or on more than one for each GPU.
    """
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    if processes < 0:
        raise ValueError(f"PROCESSES must be 0 (one for each GPU) or more, not {processes}")
    if processes > 1 and (0 < gpus < processes or device.isdigit() or device.startswith("cuda:")):
        raise ValueError(f"PROCESSES {processes} on DEVICE {device!r}: there is one process for each GPU ({gpus} here)")
    return processes or max(1, gpus)


def bytes_of(item):
    """The bytes of all tensors and arrays in a data set's item, however they are nested."""
    if isinstance(item, dict):
        return sum(bytes_of(value) for value in item.values())
    if isinstance(item, (list, tuple)):
        return sum(bytes_of(value) for value in item)
    return int(getattr(item, "nbytes", 0))


_OUT_OF_SHARED_MEMORY = re.compile(r"\bbus error\b|shared memory (object|file|limit)|</?torch_\d+", re.IGNORECASE)
_SHARED_MEMORY = "/dev/shm"


@contextmanager
def loader_memory(workers, batch_bytes=0):
    """Say in words where loader processes lack shared memory: before they start, and when they die of it.

    workers: loader processes, of all that train; batch_bytes: of a batch, which each of them holds in shared memory.
    Docker gives a container 64 MB of it, and a process that finds it full is killed. Raises RuntimeError.
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


def launch(folder, job, processes):
    """Run a job by torchrun in several processes of this machine; their output streams to this process' stderr.

    folder: for job.json and the processes' error messages; job: dict of JSON values for run_job. Returns when all are
    done. Raises RuntimeError with the last lines as soon as one fails: torchrun then ends the others. They end with
    this process, too, also when it is killed outright.
    """
    import subprocess

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("error_*.txt"):
        old.unlink()
    write_json(folder / "job.json", job)
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for work sleep
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),  # all on one machine, whatever its name
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    engine = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    decode, tail = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
    with subprocess.Popen(
        [*engine, "-m", __name__, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env=environment,
        preexec_fn=(lambda: libc.prctl(1, signal.SIGTERM)) if libc else None,
    ) as process:
        try:
            # As it comes and not by lines: a progress bar writes over itself.
            while block := process.stdout.read(4096):
                text = decode(block)
                tail = (tail + text)[-8000:]
                sys.stderr.write(text)
                sys.stderr.flush()
        except BaseException:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if process.returncode:
        errors = sorted(folder.glob("error_*.txt"), key=lambda path: path.stat().st_mtime_ns)
        text = errors[0].read_text() if errors else tail
        lines = [line.rstrip().split("\r")[-1] for line in text.splitlines()][-30:]
        raise RuntimeError(f"one of {processes} processes failed. Its last lines:\n" + "\n".join(lines))


def run_job(folder):
    """What each process of `launch` does: join the others, find its device, do the job.

    An exception goes to folder/error_<rank>.txt and ends this process with a status that tells torchrun.
    """
    folder = Path(folder)
    try:
        job = json.loads((folder / "job.json").read_text())
        device = torch.device(job["device"])
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # A process that is late for so long is taken for lost: the others then fail instead of waiting on.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))

        from .trainer import train_described

        train_described(folder, job, str(device))
        dist.destroy_process_group()
    except Exception:
        (folder / f"error_{os.environ.get('RANK', '0')}.txt").write_text(traceback.format_exc())
        raise


def end_with_parent():
    """From here on this process is killed when the one that started it ends: torchrun, killed outright, leaves its
    processes at work. On Linux only (prctl's PR_SET_PDEATHSIG is 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    run_job(sys.argv[1])
