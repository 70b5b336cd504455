"""Independent pieces of work: on threads of this machine, or as tasks of a Dask cluster.

A cluster is anything that `dask scheduler` and `dask worker` run on: other machines of a group, SLURM by dask-jobqueue,
Kubernetes. All of them see the same files under the same paths, and have the same version of the kit. Results go
through files of the shared folder, so a worker that dies costs the task that it was at, which another one gets.

May use: nothing of the kit.
"""

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from distributed import Client

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")

CONNECT_S = 30.0  # for the scheduler to answer
WAIT_S = 600.0  # for the first worker: a queue may take its time
GPU = "GPU"  # the resource that workers with a GPU are started with: dask worker ... --resources GPU=1


@contextlib.contextmanager
def connect(scheduler: str) -> Iterator["Client"]:
    """A client of the Dask scheduler at this address (`tcp://host:8786`, or a file that it wrote: `--scheduler-file`).

    Raises ModuleNotFoundError without the package distributed, ValueError where nobody answers, no worker comes, or a
    worker runs another version of the kit.
    """
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise ModuleNotFoundError("SCHEDULER needs Dask: pip install distributed") from None
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        client = Client(**where, timeout=CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ValueError(f"SCHEDULER {scheduler!r}: no Dask scheduler answers there ({error})") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=WAIT_S)
        except TimeoutError:
            raise ValueError(f"SCHEDULER {scheduler!r} has no worker: start some, `dask worker {scheduler}`") from None
        own = kit_digest()
        try:
            theirs = client.run(kit_digest)
        except Exception as error:  # most often the kit is not on the worker's path
            raise ValueError(
                f"SCHEDULER {scheduler!r}: its workers cannot import the kit ({type(error).__name__}: {error}). Start "
                "them in the repository's folder, or install it there: pip install -e ."
            ) from None
        others = [worker for worker, digest in theirs.items() if digest != own]
        if others:
            raise ValueError(f"SCHEDULER {scheduler!r}: {', '.join(others[:3])} run another version of the kit")
        yield client


def kit_digest() -> str:
    """A hash of the kit's code, to see that two machines run the same."""
    root = Path(__file__).resolve().parent
    files = sorted([*root.rglob("*.py"), *root.parent.glob("phantom/*.py")])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def gpu_of(client: "Client") -> dict[str, float]:
    """What a task that wants a GPU asks for: one of them, where the cluster's workers say that they have any."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return {GPU: 1.0} if any(worker.get("resources", {}).get(GPU) for worker in workers) else {}


def spread(
    work: Callable[[Any, Item], Result],
    items: Sequence[Item],
    shared: Any = None,
    workers: int = 2,
    scheduler: str = "",
    lost: Callable[[Item, str], Result] | None = None,
    gpu: bool = False,
    done: Callable[[], object] = lambda: None,
) -> dict[Item, Result]:
    """Do work(shared, item) for each item.

    Parameters
    ----------
    work : callable
        A function of a module, so that workers can import it; on a cluster it may run more than once for an item.
    items : sequence
        What differs from call to call.
    shared : object
        What they have in common, such as a network: sent to each worker once.
    workers : int
        Threads, on this machine.
    scheduler : str
        Address of a Dask scheduler; empty: this machine.
    lost : callable, optional
        lost(item, why) stands in for an item at which worker after worker died; default: RuntimeError.
    gpu : bool
        The work wants a GPU, see gpu_of.
    done : callable
        Called after each item, such as a progress bar's update.

    Returns
    -------
    dict
        item -> result, in the order of the items.

    Raises
    ------
    Exception
        The first that `work` raised; what has not begun by then is not begun.
    """
    if not scheduler:
        pool = ThreadPoolExecutor(max(int(workers), 1))
        found = {}
        try:
            for item, result in zip(items, pool.map(lambda item: work(shared, item), items), strict=True):
                found[item] = result
                done()
        finally:  # an interrupted run must not finish the queue first
            pool.shutdown(cancel_futures=True)
        return found
    with connect(scheduler) as client:
        return _spread_over(client, work, items, shared, lost, gpu, done)


def _same(value: Any) -> Any:
    return value


def _spread_over(client, work, items, shared, lost, gpu, done):
    from distributed import KilledWorker, as_completed

    # Submitted as a task, not scattered, so that Dask computes it again if the worker that holds it dies.
    held = client.submit(_same, shared, pure=False) if shared is not None else None
    resources = (gpu_of(client) if gpu else {}) or None
    futures = {client.submit(work, held, item, pure=False, resources=resources): item for item in items}
    found: dict[Any, Any] = {}
    suspects: list[Any] = []
    for future in as_completed(futures, loop=client.loop):
        try:
            found[futures[future]] = future.result()
            done()
        except KilledWorker:
            suspects.append(futures[future])
    # Whoever waited at a worker when it died is suspected as well: each is tried once more, with nothing beside it.
    for item in suspects:
        try:
            found[item] = client.submit(work, held, item, pure=False, resources=resources).result()
        except KilledWorker as error:
            if lost is None:
                raise RuntimeError(f"worker after worker died at {item}: {error}") from None
            found[item] = lost(item, str(error).split(".")[0])
        done()
    return {item: found[item] for item in items}
