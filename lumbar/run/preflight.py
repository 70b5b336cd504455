"""Check a machine against what a stage needs, before hours are spent.

May use: costs, parameters, mounts.
"""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .costs import Cost, hours_on, stage_cost
from .mounts import find_input
from .parameters import check_notebook_parameters

NEVER_HOURS = 14 * 24.0  # an estimate above that without a GPU is no plan
# Estimates may be wrong by so much; beyond it a stage is refused, below it only warned of.
HOURS_DOUBT, GPU_DOUBT = 3.0, 1.3
OFF = "LUMBAR_PREFLIGHT"  # set to `warn`, the environment variable turns refusals into warnings


@dataclass(frozen=True)
class Machine:
    """What a stage may use. gpus: (name, gigabytes) of each, none on a CPU; shared_gb: free in /dev/shm, infinite where
    the system has none; disk_gb: free where OUT lies."""

    gpus: tuple[tuple[str, float], ...]
    cores: int
    memory_gb: float
    disk_gb: float
    shared_gb: float = math.inf


def this_machine(out: str | Path = ".", device: str = "auto") -> Machine:
    """This machine as a stage with this OUT and DEVICE sees it: GPUs, cores and memory that the process may use."""
    import torch

    count = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    wanted = [int(part) for part in device.removeprefix("cuda:").split(",") if part.isdigit()] or range(count)
    properties = [torch.cuda.get_device_properties(number) for number in wanted if number < count]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    place = Path(out).resolve()
    while not place.exists():
        place = place.parent
    return Machine(
        tuple((found.name, found.total_memory / 1e9) for found in properties),
        cores,
        _available_memory_gb(),
        shutil.disk_usage(place).free / 1e9,
        shutil.disk_usage("/dev/shm").free / 1e9 if os.path.isdir("/dev/shm") else math.inf,
    )


def _available_memory_gb():
    """What this process may still take, a container's limit included."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass  # not Linux
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            # Not less what is used: that counts files that were read, which make room again.
            found.append(int((Path("/sys/fs/cgroup") / limit).read_text()) / 1e9)
        except (OSError, ValueError):
            continue  # no such group, or no limit
    return min(found)


def findings(name: str, cost: Cost, given: Mapping[str, Any], machine: Machine) -> tuple[list[str], list[str]]:
    """(why it cannot work, what else to know), in sentences that name the parameter to change.

    name: of the stage; cost: of stage_cost; given: the stage's parameters.
    """
    wrong, known = [], []
    gpus = [gpu for gpu, _ in machine.gpus]
    processes = max(len(gpus), 1)
    hours = hours_on(cost, gpus, machine.cores) if not math.isnan(cost.gpu_hours) else math.nan
    limit = given.get("HOURS", 0.0) if cost.epochs else 0.0
    smaller = {"level": "SHAPE", "study": "SHAPE", "slices": "SIZE_PX", "yolo": "IMGSZ"}.get(cost.kind, "")
    if cost.epochs and not math.isnan(hours):
        cores = f"{machine.cores} CPU core{'s' * (machine.cores > 1)}"
        where = f"{len(gpus)} x {gpus[0]}" if gpus else cores
        known.append(f"about {_duration(hours)} on {where}, by counted operations")
        epoch = hours / cost.epochs
        if not gpus and hours > NEVER_HOURS:
            wrong.append(
                f"DEVICE: there is no GPU here, and {cores} would take about {_duration(hours)}. Run "
                f"it on a machine with one, or take a smaller BACKBONE, {smaller} or EPOCHS (of 00_pipeline: SIZE)"
            )
        elif limit and epoch > HOURS_DOUBT * limit:
            wrong.append(
                f"HOURS: one pass over the training studies takes about {_duration(epoch)}, and {limit:g} hours are "
                f"given: nothing would be kept. Give more HOURS, or a smaller {smaller} or BACKBONE"
            )
        elif limit and hours > limit:
            sessions = math.ceil(hours / limit)
            known.append(
                f"HOURS = {limit:g} ends it before: it takes about {sessions} starts, each goes on where it was"
            )
    if machine.gpus and cost.gpu_gb:
        least = min(gigabytes for _, gigabytes in machine.gpus)
        need = f"about {cost.gpu_gb:.0f} GB of GPU memory, and there are {least:.0f}"
        if cost.gpu_gb > GPU_DOUBT * least:
            batch = "BATCH" if given.get("BATCH", 0) != 1 else smaller
            wrong.append(f"{batch}: a step takes {need}. Make BATCH, {smaller} or BACKBONE smaller")
        elif cost.gpu_gb > 0.9 * least:
            known.append(f"a step takes {need}: if it runs out of memory, make BATCH smaller")
    memory = 4.0 + (cost.memory_gb - 4.0) * processes
    if memory > machine.memory_gb:
        known_or_wrong = wrong if memory > 1.5 * machine.memory_gb else known
        known_or_wrong.append(
            f"WORKERS: about {memory:.0f} GB of memory are needed, and {machine.memory_gb:.0f} are free. "
            f"Make WORKERS (now {given.get('WORKERS', 0)}) smaller"
        )
    if given.get("WORKERS", 0) and cost.shared_gb * processes > machine.shared_gb:
        wrong.append(
            f"WORKERS: its loader processes need {cost.shared_gb * processes:.1f} GB of shared memory, and /dev/shm "
            f"has {machine.shared_gb:.1f} free. Make WORKERS smaller, or give the container more (--shm-size=8g)"
        )
    if cost.disk_gb > machine.disk_gb:
        parameter = "CACHE" if given.get("CACHE") else "BITS" if given.get("BITS", 8) > 8 else "OUT"
        way = {
            "CACHE": "Set CACHE to false, which cuts crops anew in each pass",
            "BITS": "Set BITS to 8, which halves it, or put OUT on a larger disk",
            "OUT": "Put OUT on a larger disk",
        }[parameter]
        wrong.append(
            f"{parameter}: about {cost.disk_gb:.0f} GB of disk are needed, and {machine.disk_gb:.0f} are free. {way}"
        )
    return [f"{name}: {text}" for text in wrong], [f"{name}: {text}" for text in known]


def _together(sentences):
    """What is said of several stages alike, such as the folds of a training, said once."""
    stages: dict[str, list[str]] = {}
    for sentence in sentences:
        name, _, text = sentence.partition(": ")
        stages.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in stages.items()]


def _duration(hours):
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    return f"{hours:.1f} hours" if hours >= 0.1 else f"{60 * hours:.0f} minutes"


def _judge(wrong, known):
    for text in known:
        print(f"preflight: {text}")
    if wrong and os.environ.get(OFF) == "warn":
        print(*(f"preflight: {text}" for text in wrong), sep="\n")
    elif wrong:
        raise ValueError(
            "this machine is not enough, and hours would be lost:\n- "
            + "\n- ".join(wrong)
            + f"\n({OFF}=warn in the environment starts it all the same.)"
        )


def preflight(
    notebook: str | Path, parameters: Mapping[str, Any], machine: Machine | None = None, studies: int = 0
) -> None:
    """Hold a training against this machine before it starts: print what to expect, refuse what cannot work.

    Parameters
    ----------
    notebook : path
        Its path, or the name of one of the kit's.
    parameters : mapping
        As notebook_parameters returns them.
    machine : Machine, optional
        Instead of this one, to try things out.
    studies : int
        To train on and to hold out, 0 to count those of DATA.

    Raises
    ------
    ValueError
        This machine is not enough, naming the parameter to change (only printed where the environment has
        LUMBAR_PREFLIGHT=warn), or the notebook refuses a parameter.
    TypeError
        A parameter of another type.
    """
    own = Path(__file__).resolve().parents[2] / "notebooks" / f"{notebook}.ipynb"
    notebook = notebook if Path(notebook).suffix else own
    given = check_notebook_parameters(notebook, parameters)
    machine = machine or this_machine(given.get("OUT", "."), given.get("DEVICE", "auto"))
    cost = stage_cost(notebook, given, studies or count_studies(given.get("DATA", "")))
    _judge(*findings(Path(notebook).stem, cost, given, machine))


def preflight_stages(
    stages: Sequence[Mapping[str, Any]], machine: Machine | None = None, studies: int = 0
) -> dict[str, float]:
    """The same of a table of stages that are to run one after the other, as run_stages takes it.

    What they write adds up; those that have a manifest are passed over.

    Parameters
    ----------
    stages : sequence of dict
        Of pipeline_stages.
    machine, studies
        As preflight takes them.

    Returns
    -------
    dict of str to float
        Name to hours expected, of those whose hours are known.

    Raises
    ------
    ValueError
        As preflight, with everything that is wrong.
    TypeError
        As preflight.
    """
    wrong: list[str] = []
    known: list[str] = []
    hours: dict[str, float] = {}
    written = 0.0
    for stage in stages:
        given = check_notebook_parameters(stage["notebook"], stage["parameters"])
        if (Path(given.get("OUT", "")) / stage["name"] / "manifest.json").is_file():
            continue
        here = machine or this_machine(given.get("OUT", "."), given.get("DEVICE", "auto"))
        cost = stage_cost(stage["notebook"], given, studies or count_studies(given.get("DATA", "")))
        more_wrong, more_known = findings(stage["name"], cost, given, here)
        wrong, known = wrong + more_wrong, known + more_known
        written += cost.output_gb
        if cost.epochs and not math.isnan(cost.gpu_hours):
            hours[stage["name"]] = hours_on(cost, [name for name, _ in here.gpus], here.cores)
    if len(hours) > 1:
        known.append(f"all trainings: about {_duration(sum(hours.values()))}, one after the other")
        if not here.gpus and sum(hours.values()) > NEVER_HOURS:
            wrong.insert(
                0, f"all trainings: there is no GPU here, and they would take {_duration(sum(hours.values()))}"
            )
    if written and written > here.disk_gb:
        wrong.append(f"all stages: OUT: they write about {written:.0f} GB, and {here.disk_gb:.0f} are free")
    _judge(_together(wrong), _together(known))
    return hours


def count_studies(data: str | Path) -> int:
    """The studies of train.csv in a competition folder; the competition's number where it is not there yet."""
    from .costs import STUDIES

    try:
        lines = (Path(find_input(data)) / "train.csv").read_text(encoding="utf-8", errors="replace").split("\n")
    except (OSError, ValueError):
        return STUDIES
    return max(sum(bool(line.strip()) for line in lines) - 1, 1)
