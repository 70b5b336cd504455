"""The stages in their order, here and as Kaggle kernels, and notebooks run one after another.

May use: stages, parameters, mounts, grade.registry, data, grade, fingerprint, cluster, storage.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cluster import connect, gpu_of
from ..data.tables import read_folds
from ..grade.member import TrainingStage
from ..grade.pretrained import pretrained_file, published_weights
from ..grade.registry import MEMBERS
from ..storage import plain, write_json
from .fingerprint import code_fingerprint, read_manifest, versions
from .mounts import KAGGLE_INPUT
from .parameters import check_device_here, check_notebook_parameters, nearest
from .stages import BUSY, stage_identity, stage_inputs, stage_state


def member_folder(name: str, folds: Sequence[int]) -> str:
    """The folder of a stage that trains these folds: with one fold only, its number is added.

    Jobs of single folds, on one machine or many, can so share an OUT; later stages read all folders that they find.

    Parameters
    ----------
    name : str
        Of the training, such as 04_train_vit_level.
    folds : sequence of int

    Returns
    -------
    str
        Name of the folder in OUT.
    """
    return f"{name}_{folds[0]}" if len(folds) == 1 else name


def check_folds(folds: Iterable[int], preprocessed: str | Path) -> None:
    """Refuse folds that the folds.csv of 01_preprocess does not have, before a stage begins.

    Parameters
    ----------
    folds : iterable of int
    preprocessed : path
        The folder 01_preprocess of a run.

    Raises
    ------
    FileNotFoundError
        There is no folds.csv.
    ValueError
        It is damaged, or does not have all of these folds, or none are given.
    """
    path = Path(preprocessed) / "folds.csv"
    if not path.is_file():
        raise FileNotFoundError(f"PREPROCESSED: {path} is missing; run 01_preprocess first, or correct the path")
    try:
        known = sorted(set(read_folds(path)["fold"]))
    except (ValueError, KeyError) as error:
        raise ValueError(f"PREPROCESSED: {path} is damaged ({error}); run 01_preprocess again") from None
    if not folds or not set(folds) <= set(known):
        raise ValueError(f"FOLDS must be some of {', '.join(map(str, known))}, not {list(folds)}")


def is_finished(stage: Mapping[str, Any]) -> bool:
    """True if a stage of the table has a manifest with these parameters and with inputs of the same content."""
    folder = Path(stage["parameters"].get("OUT", "")) / stage["name"]
    if not (folder / "manifest.json").is_file():
        return False
    parameters = check_notebook_parameters(stage["notebook"], stage["parameters"])
    try:
        identity, places = stage_identity(parameters, stage_inputs(parameters, stage["name"]))
    except FileNotFoundError:
        return False
    if stage_state(folder, identity, places)[0] != "finished":
        return False
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    if manifest["code"] != code_fingerprint():
        print(f"{stage['name']}: finished by another version of lumbar/; delete {folder} to do it again")
    return True


# What papermill and the kernel say of themselves, and what pictures look like as text.
_LOG_NOISE = (
    "Executing ",
    "Ending Cell",
    "Input Notebook",
    "Output Notebook",
    "[IPKernelApp]",
    "<Figure",
    "<IPython.core",
)


def run_notebook(
    notebook: str | Path,
    output: str | Path,
    parameters: Mapping[str, Any],
    threads: int = 1,
    say: Callable[..., None] = print,
    folder: str | Path | None = None,
) -> None:
    """Run a notebook by papermill in a process of its own; its log goes to `say`, a line at a time.

    folder: to run it in; default: this process' own.

    A process and not papermill's function: stages can then run side by side with their own number of threads.
    Raises RuntimeError with the last lines when it fails; what ran until then is in `output`.
    """
    import ctypes
    import subprocess

    import yaml

    check_notebook_parameters(notebook, parameters)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Not JSON, whose 1e-05 is a text in YAML.
    settings = output.with_suffix(".parameters.yaml")
    settings.write_text(yaml.safe_dump(json.loads(json.dumps(parameters, default=plain)), sort_keys=False))
    # PASSIVE: threads that wait for work sleep. Spinning ones slow a shared machine down by an order of magnitude.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        str(output),
        "-f",
        str(settings),
        "-k",
        "python3",
        "--log-output",
        "--no-progress-bar",
        "--no-request-save-on-cell-execute",
        "--autosave-cell-every",
        "60",
    ]
    # A run that is killed outright takes its stages with it (prctl's PR_SET_PDEATHSIG is 1): they would go on unseen.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    tail: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=folder,
        preexec_fn=(lambda: libc.prctl(1, signal.SIGTERM)) if libc else None,
    ) as process:
        for line in process.stdout or ():
            line = line.rstrip().split("\r")[-1]
            if line and not line.startswith(_LOG_NOISE):
                tail = [*tail[-29:], line]
                say(f"[{output.stem}] {line}", flush=True)
    if process.returncode:
        raise RuntimeError(f"{notebook} failed; see {output}. Its last lines:\n" + "\n".join(tail))


def run_stages(
    stages: Sequence[dict[str, Any]], runs: str | Path, workers: int = 2, scheduler: str = ""
) -> dict[str, float]:
    """Run a table of stages, side by side where they do not need each other.

    A finished stage (see is_finished) is not run again. When a stage fails, running ones finish and the first error is
    raised.

    Parameters
    ----------
    stages : sequence of dict
        name, notebook, parameters, after (names of stages to wait for), threads, gpu (whether it wants one); as
        pipeline_stages makes them.
    runs : path
        Folder for the executed notebooks.
    workers : int
        Cores of this machine to use.
    scheduler : str
        Address of a Dask scheduler whose workers run the stages, as many at a time as they have threads, see
        cluster.connect; empty: this machine.

    Returns
    -------
    dict of str to float
        Name to seconds, of the stages that ran.

    Raises
    ------
    RuntimeError
        A stage's notebook failed; the message has its last lines.
    ValueError
        A parameter that a notebook refuses, a DEVICE that this machine does not have, a stage that waits for one that
        is not in the table, or a scheduler that cannot be used, see cluster.connect.
    TypeError
        A parameter of another type.
    ModuleNotFoundError
        A scheduler without the package distributed.
    """
    with contextlib.ExitStack() as held:
        if scheduler:
            client = held.enter_context(connect(scheduler))
            client.subscribe_topic(_LOG_TOPIC, lambda event: print(event[1], flush=True))
            wanted = {False: None, True: gpu_of(client) or None}
            pools = {gpu: client.get_executor(pure=False, resources=asked) for gpu, asked in wanted.items()}
            for stage in stages:
                check_notebook_parameters(stage["notebook"], stage["parameters"])
            return _run_stages(stages, Path(runs).resolve(), math.inf, pools, _run_on_worker)
        for stage in stages:
            check_device_here(check_notebook_parameters(stage["notebook"], stage["parameters"]).get("DEVICE", "auto"))
        pool = held.enter_context(ThreadPoolExecutor(workers))
        return _run_stages(stages, Path(runs), workers, {False: pool, True: pool}, _run_here)


def _run_stages(
    stages: Sequence[dict[str, Any]],
    runs: Path,
    cores: float,
    pools: Mapping[bool, Executor],
    run: Callable[[dict[str, Any], Path], float],
) -> dict[str, float]:
    """run_stages on executors, by whether a stage wants a GPU; cores: how many threads run at a time."""
    from concurrent.futures import FIRST_COMPLETED, wait

    seconds: dict[str, float] = {}
    finished: set[str] = set()
    running: dict[Future[float], dict[str, Any]] = {}
    waiting, failure = list(stages), None
    while (waiting and failure is None) or running:
        free = cores - sum(stage["threads"] for stage in running.values())
        for stage in list(waiting) if failure is None else []:
            if not set(stage["after"]) <= finished:
                continue
            if is_finished(stage):
                waiting.remove(stage)
                finished.add(stage["name"])
                print(f"== {stage['name']} is finished: found by its manifest", flush=True)
            elif min(stage["threads"], cores) <= free:
                waiting.remove(stage)
                free -= stage["threads"]
                running[pools[stage.get("gpu", False)].submit(run, stage, runs)] = stage
        if not running:
            if any(set(stage["after"]) <= finished for stage in waiting) or not waiting:
                continue
            names = ", ".join(stage["name"] for stage in waiting)
            raise ValueError(f"{names}: waits for a stage that is not in the table")
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            stage = running.pop(future)
            if future.exception() is None:
                seconds[stage["name"]] = round(future.result(), 1)
                finished.add(stage["name"])
                done = f"{len(finished)} of {len(stages)} stages"
                print(f"== {stage['name']} finished in {seconds[stage['name']]:.0f} s ({done})", flush=True)
            else:
                failure = failure or future.exception()
    if failure is not None:
        raise failure
    return seconds


def _run_here(stage: dict[str, Any], runs: Path) -> float:
    """Run a stage's notebook; returns its seconds."""
    started = time.monotonic()
    run_notebook(stage["notebook"], runs / f"{stage['name']}.ipynb", stage["parameters"], stage["threads"])
    return time.monotonic() - started


_LOG_TOPIC = "lumbar stages"
LOCK_S = 120.0  # for what a worker that died has left running to end


def _run_on_worker(stage: dict[str, Any], runs: Path) -> float:
    """As _run_here, on a worker of a cluster; what the stage prints goes to the client of run_stages."""
    from distributed import get_worker, secede

    worker = get_worker()
    if stage["parameters"].get("SCHEDULER"):
        secede()  # it waits for tasks of its own, which must not wait for its thread
    started, root = time.monotonic(), Path(stage["notebook"]).resolve().parents[1]
    output = runs / f"{stage['name']}.ipynb"

    def say(line: str, **_: Any) -> None:
        worker.log_event(_LOG_TOPIC, line)  # not distributed.print: that reaches the stage's own client, too

    while True:
        try:
            run_notebook(stage["notebook"], output, stage["parameters"], stage["threads"], say, root)
            return time.monotonic() - started
        except RuntimeError as error:
            if BUSY not in str(error) or time.monotonic() - started > LOCK_S:
                raise
            time.sleep(5)  # the worker before this one died, and its kernel has not noticed yet


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages, for this machine and for Kaggle.

    name: of its folder; notebook: its stem; reads: dict parameter -> the stages whose folders it names; parameters:
    what the notebook is told besides DATA and OUT; after: the stages that have to be finished; gpu: whether Kaggle
    gives it one; training: True for a fold of a member, which may share a machine with others; pretrained: name of the
    weights that it starts from where they were fetched, or empty.
    """

    name: str
    notebook: str
    reads: Mapping[str, str | list[str]] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    gpu: bool = False
    training: bool = False
    pretrained: str = ""

    @property
    def kernel(self) -> str:
        """Its name on Kaggle: train-vit-level for fold 0 of 04_train_vit_level, train-vit-level-3 for fold 3."""
        name = self.name.partition("_")[2].replace("_", "-")
        return name.removesuffix("-0") if self.training else name


ALL_FOLDS = (0, 1, 2, 3, 4)  # 01_preprocess deals as many

# Settings of the first stages over the notebooks' full-size defaults; the members' are in their own modules. Each size
# takes those of the sizes before it, too.
SETTINGS = {
    "demo": {
        "01_preprocess": {"YOLO_IMGSZ": 256},
        # The shipped weights, tuned as briefly as shows how it goes.
        "02_train_spinenet": {"ANATOMIES": 6, "FINE_TUNE_STEPS": 10, "FINE_TUNE_STUDIES": 6},
    },
    # For some 300 studies, so that the phantom's real frequencies show enough disease.
    "hour": {},
    # Everything once, as fast as it goes. The scores mean nothing.
    "smoke": {
        # As on Kaggle: volumes in 8 bits, and the detectors' images cut by each training for itself.
        "01_preprocess": {"BITS": 8, "DETECTOR_IMAGES": False},
        # Tuning needs a detector that finds something: this one is only there to be trained.
        "02_train_spinenet": {
            "WEIGHTS": "",
            "STEPS": 2,
            "ANATOMIES": 2,
            "WIDTHS": [32, 48, 64, 96],
            "BLOCKS": 1,
            "RESOLUTION_MM": 2.0,
            "CROP_PX": [128, 96],
            "BATCH": 4,
            "FINE_TUNE_STEPS": 4,
        },
    },
}
SIZES = {"demo": ("demo",), "smoke": ("demo", "smoke"), "hour": ("demo", "hour"), "full": ()}


def trainings(members: Sequence[str] = ()) -> list[TrainingStage]:
    """The members' trainings (all, or those of the named ones), longest first: the short ones then fill the gaps."""
    chosen = [member for name, member in MEMBERS.items() if not members or name in members]
    return sorted((t for member in chosen for t in member.trainings), key=lambda t: -t.seconds)


def stage_table(folds: Sequence[int], size: str = "full", members: Sequence[str] = ()) -> list[Stage]:
    """Every stage in one order: each reads what earlier ones wrote.

    Each fold of each member is a stage of its own with a folder of its own, `<training>_<fold>`: independent jobs,
    wherever they run. members: to train, by their names in the registry; empty for all. Raises ValueError on another
    size, fold or member.
    """
    if size not in SIZES:
        raise ValueError(f"SIZE must be {', '.join(SIZES)}, not {size!r}.{nearest(size, SIZES)}")
    if not folds or not set(folds) <= set(ALL_FOLDS):
        raise ValueError(f"FOLDS must be some of {', '.join(map(str, ALL_FOLDS))}, not {list(folds)}")
    for name in members:
        if name not in MEMBERS:
            there = ", ".join(MEMBERS)
            raise ValueError(f"MEMBERS: there is no member {name!r}.{nearest(name, MEMBERS)} There are {there}")
    before = {"PREPROCESSED": "01_preprocess", "LEVELS_DIR": "02_train_spinenet"}
    located = ("01_preprocess", "02_train_spinenet")

    def own(settings):
        return {key: value for step in SIZES[size] for key, value in settings.get(step, {}).items()}

    def first(name):
        return own({step: settings.get(name, {}) for step, settings in SETTINGS.items()})

    table = [
        Stage("01_preprocess", "01_preprocess", parameters=first("01_preprocess")),
        Stage(
            "02_train_spinenet",
            "02_train_spinenet",
            {"PREPROCESSED": "01_preprocess"},
            first("02_train_spinenet"),
            after=("01_preprocess",),
            gpu=True,
        ),
    ]
    for fold in folds:
        for training in trainings(members):
            parameters = {**training.parameters, "FOLDS": [fold], **own(training.settings)}
            name = member_folder(training.name, [fold])
            start = training.pretrained if size == "full" else ""
            table.append(Stage(name, training.notebook, before, parameters, located, True, True, start))
    trained = tuple(stage.name for stage in table if stage.training)
    weights = ["02_train_spinenet", *trained]
    table.append(Stage("05_inference", "05_inference", {"WEIGHTS": weights}, after=tuple(weights), gpu=True))
    table.append(Stage("06_report", "06_report", after=("01_preprocess", *weights, "05_inference")))
    return table


def pretrained_names(members: Sequence[str] = ()) -> list[str]:
    """The weights that trainings start from at full size, as `python -m lumbar.grade.pretrained` fetches them.

    Parameters
    ----------
    members : sequence of str
        Of these members, by their names in the registry; empty for all.

    Returns
    -------
    list of str
        Names, sorted.
    """
    return sorted({training.pretrained for training in trainings(members) if training.pretrained})


def _start_of(stage: Stage, given: Mapping[str, Any]) -> str:
    """Name of the weights that a stage starts from at full size with these SETTINGS; empty for none."""
    if not stage.training or "PRETRAINED" in given:  # the settings' own file
        return ""
    backbone = given.get("MODEL") or given.get("BACKBONE")
    return published_weights(backbone) if backbone else stage.pretrained


def _check_pretrained(folder: str | Path, names: Sequence[str]) -> None:
    """Raise ValueError where the folder lacks weights that a training starts from, before the first stage begins."""
    for name in names:
        try:
            pretrained_file(folder, name)
        except (FileNotFoundError, ValueError) as error:
            fetch = f"python -m lumbar.grade.pretrained {' '.join(names)} --out {folder}"
            raise ValueError(f'{error}. `{fetch}` fetches them; PRETRAINED = "" starts from noise') from None


def pipeline_stages(
    notebooks: str | Path,
    data: str | Path,
    out: str | Path,
    size: str = "demo",
    folds: Sequence[int] = (),
    seed: int = 0,
    workers: int = 2,
    pretrained: str = "",
    members: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    scheduler: str = "",
) -> list[dict[str, Any]]:
    """The table of stages as run_stages takes it.

    Parameters
    ----------
    notebooks : path
        The kit's folder of notebooks.
    data : path
        The competition's folder, or one of the phantom's.
    out : path
        The run's folder, in which each stage has its own.
    size : {"demo", "smoke", "hour", "full"}
        `demo`, `smoke` (the same, as short as possible) and `hour` train fold 0 with the small settings, `full` every
        fold with the notebooks' defaults.
    folds : sequence of int
        To train, empty for the size's own.
    seed : int
        Of every stage that has SEED.
    workers : int
        CPU cores, which every stage gets that has WORKERS or READERS; small trainings run side by side and share them.
    pretrained : str
        Folder with the weights that the full size starts from (those of pretrained_names), empty for none.
    members : sequence of str
        To train, by their names in the registry; empty for all.
    settings : dict of str to dict, optional
        Parameters over all of these, see stage_settings.
    scheduler : str
        Address of a Dask scheduler whose workers share the studies of 01, 02 and 05; empty: this machine.

    Returns
    -------
    list of dict
        In the order of stage_table, as run_stages takes them.

    Raises
    ------
    ValueError
        As stage_table and stage_settings, and where `pretrained` lacks weights that a training starts from.
    TypeError
        As stage_settings.
    """
    notebooks, small = Path(notebooks), size != "full"
    table = stage_table(list(folds) or ([0] if small else list(ALL_FOLDS)), size, members)
    own = stage_settings(table, settings or {}, notebooks)
    starts = {} if small or not pretrained else {stage.name: _start_of(stage, own[stage.name]) for stage in table}
    _check_pretrained(pretrained, sorted({name for name in starts.values() if name}))
    # Small trainings run side by side on a core each, and small crops are faster made than sent between processes: only
    # cores that would be idle load for them. At full size each training takes the GPUs, and all cores, in turn.
    side_by_side = sum(stage.training for stage in table)
    stages = []
    for stage in table:
        reads = {
            key: f"{out}/{names}" if isinstance(names, str) else [f"{out}/{name}" for name in names]
            for key, names in stage.reads.items()
        }
        alone = small and stage.training
        notebook = notebooks / f"{stage.notebook}.ipynb"
        shared = {
            "SEED": seed,
            "WORKERS": max(workers // side_by_side - 1, 0) if alone else workers,
            "READERS": min(workers, 4),
            "RUN": str(out),
            "SCHEDULER": scheduler,
            **({"PRETRAINED": str(pretrained)} if starts.get(stage.name) else {}),
        }
        known = check_notebook_parameters(notebook, {})
        parameters: dict[str, Any] = {"OUT": str(out), "DATA": str(data), **reads}
        parameters |= {name: value for name, value in shared.items() if name in known}
        stages.append(
            {
                "name": stage.name,
                "notebook": notebook,
                "after": list(stage.after),
                "threads": 1 if alone else workers,
                "gpu": stage.gpu and not small,
                "parameters": parameters | stage.parameters | own[stage.name],
            }
        )
    return stages


def stage_settings(
    table: Sequence[Stage], settings: Mapping[str, Mapping[str, Any]], notebooks: str | Path
) -> dict[str, dict[str, Any]]:
    """SETTINGS of 00_pipeline and publish, stage by stage: dict name of a stage -> dict parameter -> value.

    settings: dict of a stage (04_train_vit_level_0), a training of all folds (04_train_vit_level), a notebook
    (04_train_vit) or a kernel (train-vit-level) -> its parameters; the narrower name wins. Raises ValueError for a name
    or parameter that is not there, naming the nearest, and for one that the pipeline itself sets, TypeError for a value
    of another type.
    """
    found = settings_of({stage.name: names_of(stage) for stage in table}, settings)
    for stage in table:
        given = found[stage.name]
        where = f"SETTINGS of {', '.join(name for name in dict.fromkeys(names_of(stage)) if name in settings)}"
        try:
            checked = check_notebook_parameters(Path(notebooks) / f"{stage.notebook}.ipynb", given)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{where}: {error}") from None
        fixed = {"OUT", "DATA", "RUN", *stage.reads} | ({"FOLDS", *_of_training(stage)} if stage.training else set())
        if wrong := sorted(fixed & set(given)):
            raise ValueError(
                f"{where}: the pipeline itself sets {', '.join(wrong)}; "
                "FOLDS and MEMBERS say what is trained, DATA and OUT where things lie"
            )
        found[stage.name] = {name: checked[name] for name in given}
    return found


def names_of(stage: Stage) -> tuple[str, ...]:
    """What a stage may be called in SETTINGS, the widest name first: notebook, training, kernel, stage."""
    training = (stage.name.rpartition("_")[0],) if stage.training else ()
    return (stage.notebook, *training, stage.kernel, stage.name)


def settings_of(
    names: Mapping[str, Sequence[str]], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """SETTINGS by stage (or kernel): dict of it -> parameters, of all its names, those of the last name winning.

    names: dict stage -> what it may be called, the widest name first. Raises ValueError for a name that is not there,
    naming the nearest, TypeError where a name does not hold parameters.
    """
    known = dict.fromkeys(name for own in names.values() for name in own)
    for name, parameters in settings.items():
        if name not in known:
            there = ", ".join(known)
            hint = nearest(name, known)
            raise ValueError(f"SETTINGS: there is no stage, notebook or kernel {name!r}.{hint} There are {there}")
        if not isinstance(parameters, Mapping):
            raise TypeError(f"SETTINGS: {name} must hold parameters, such as {{EPOCHS: 3}}, not {parameters!r}")
    return {stage: {k: v for name in own for k, v in settings.get(name, {}).items()} for stage, own in names.items()}


def _of_training(stage):
    """The parameters that say which of a notebook's trainings a stage is, such as SCOPE."""
    return next(t.parameters for t in trainings() if t.name == stage.name.rpartition("_")[0])


def choose_stages(stages: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The stages with these names (all, if none is given). What they wait for must be finished or chosen too.

    Of the folders of weights that a stage reads, those are left that will be there: of chosen stages, and of those that
    lie there already. So 05_inference alone takes whatever was trained.

    Parameters
    ----------
    stages : sequence of dict
        Of pipeline_stages.
    names : sequence of str
        A training's name without a fold (04_train_vit_level) is all of its folds.

    Returns
    -------
    list of dict
        As run_stages takes them, in the order of `stages`; what is not chosen is not waited for.

    Raises
    ------
    ValueError
        There is no stage of such a name.
    """
    known, without_fold = [stage["name"] for stage in stages], [training.name for training in trainings()]
    for name in names:
        if name not in known and name not in without_fold:
            training, _, fold = name.rpartition("_")
            hint = (
                f" FOLDS leaves fold {fold} out: add it there."
                if training in without_fold and fold.isdigit()
                else nearest(name, [*known, *without_fold])
            )
            there = ", ".join([*known, *without_fold])
            raise ValueError(f"STAGES: there is no stage {name!r}.{hint} There are {there}")
    chosen = [s for s in stages if not names or s["name"] in names or s["name"].rpartition("_")[0] in names]
    own = {stage["name"] for stage in chosen}

    def left(parameters):
        weights = parameters.get("WEIGHTS")
        if not isinstance(weights, list):
            return parameters
        return {**parameters, "WEIGHTS": [p for p in weights if Path(p).name in own or Path(p).is_dir()]}

    return [
        {**stage, "after": [a for a in stage["after"] if a in own], "parameters": left(stage["parameters"])}
        for stage in chosen
    ]


def write_run_manifest(
    out: str | Path, parameters: Mapping[str, Any], seconds: Mapping[str, float], wall_seconds: float
) -> dict[str, Any]:
    """OUT/manifest.json: the run's parameters and every finished stage's manifest.

    Parameters
    ----------
    out : path
        The run's folder, OUT.
    parameters : dict
        Of the run.
    seconds : mapping of str to float
        Of the stages that ran this time, as run_stages returns them.
    wall_seconds : float
        Of the whole run. Stages run side by side, so theirs add up to more.

    Returns
    -------
    dict
        What was written: parameters, versions, stages (name to its manifest), wall_seconds_of_this_run,
        seconds_of_all_stages, finished (local time).
    """
    out = Path(out)
    stages = {
        path.parent.name: manifest
        for path in sorted(out.glob("*/manifest.json"))
        if ".old-" not in path.parent.name and (manifest := read_manifest(path.parent)) is not None
    }
    for name, stage in stages.items():
        stage["wall_seconds_last_run"] = seconds.get(name)
    manifest = {
        "parameters": parameters,
        "versions": versions(),
        "stages": stages,
        "wall_seconds_of_this_run": round(wall_seconds, 1),
        "seconds_of_all_stages": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    write_json(out / "manifest.json", manifest)
    return manifest


PRETRAINED_STAGE = "00_pretrained"  # folder of what pretrained.ipynb fetches
TRAINING_HOURS = 10.5  # of the 12 that Kaggle gives a kernel: the rest is for what comes before and after


def kaggle_kernels(
    base: str = "lumbar-spine",
    folds: Sequence[int] = (0,),
    members: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """The table of stages as kernels on Kaggle, in their order.

    One that is not done in TRAINING_HOURS ends there, see stage_kaggle's `continued`.

    Parameters
    ----------
    base : str
        What all slugs begin with.
    folds, members
        To train, a kernel for each fold of each training, see Stage.kernel; no members for all.
    settings : dict of str to dict, optional
        As settings_of takes them: with another network a training starts from other weights, which `pretrained` then
        fetches. Where no training starts from any, there is no such kernel.

    Returns
    -------
    dict of str to dict
        Kernel's name to
        stage: the folder that it writes; empty for `inspect`.
        training: whether it can run out of time.
        names: of it in SETTINGS.
        notebook: its file's stem.
        parameters: what the notebook is told besides DATA and OUT.
        needs: names of kernels whose outputs it reads.
        gpu, internet: whether it has them; internet only `pretrained`, which fetches what trainings start from, and
        needs nothing else.

    Raises
    ------
    ValueError
        As stage_table.
    """
    table = stage_table(sorted(folds), members=members)
    names = {stage.name: stage.kernel for stage in table}
    own_names = {stage.name: names_of(stage) for stage in table}
    known = {name for group in own_names.values() for name in group}
    given = settings_of(own_names, {name: value for name, value in (settings or {}).items() if name in known})
    starts = {stage.name: _start_of(stage, given[stage.name]) for stage in table}
    fetched = sorted({name for name in starts.values() if name})

    def output(stage):
        return f"{KAGGLE_INPUT}/{base}-{names[stage]}/{stage}"

    # Outputs are found below what is attached, whichever there are. A kernel's own output holds 20 GB and is slow to
    # attach with 100,000 files.
    own: dict[str, dict[str, Any]] = {
        "01_preprocess": {"BITS": 8, "DETECTOR_IMAGES": False},
        "05_inference": {"WEIGHTS": [KAGGLE_INPUT]},
        "06_report": {"RUN": KAGGLE_INPUT},
    }
    kernels = {
        "pretrained": {
            "stage": PRETRAINED_STAGE,
            "names": ("pretrained",),
            "notebook": "pretrained",
            "parameters": {"NAMES": fetched},
            "needs": [],
            "gpu": False,
            "internet": True,
            "training": False,
        }
    }
    for stage in table:
        reads = {key: output(read) for key, read in stage.reads.items() if isinstance(read, str)}
        limit = {"HOURS": TRAINING_HOURS} if stage.training else {}
        if starts[stage.name]:
            reads["PRETRAINED"] = f"{KAGGLE_INPUT}/{base}-pretrained/{PRETRAINED_STAGE}"
        kernels[stage.kernel] = {
            "stage": stage.name,
            "names": names_of(stage),
            "notebook": stage.notebook,
            "parameters": {**reads, **stage.parameters, **limit, **own.get(stage.name, {})},
            "needs": [names[name] for name in stage.after] + ["pretrained"] * bool(starts[stage.name]),
            "gpu": stage.gpu,
            "internet": False,
            "training": stage.training,
        }
    if not fetched:
        del kernels["pretrained"]
    located = {"PREPROCESSED": output("01_preprocess"), "LEVELS_DIR": output("02_train_spinenet")}
    shown = {**located, "PREDICTIONS": [KAGGLE_INPUT], "INFERENCE": output("05_inference")}
    if members and "level" not in members:  # whose errors inspect lists by default
        shown["MEMBER"] = members[0]
    every = [names[stage.name] for stage in table if stage.name != "06_report"]
    inspect = {
        "notebook": "inspect",
        "parameters": shown,
        "needs": every,
        "gpu": False,
        "internet": False,
        "training": False,
    }
    return kernels | {"inspect": {"stage": "", "names": ("inspect",), **inspect}}


SMOKE_STUDIES = {"TRAIN_STUDIES": 10, "TEST_STUDIES": 2}  # phantoms of a smoke run


def smoke_kernels(base: str = "lumbar-spine", members: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """A chain of small kernels that proves the large ones' before GPU hours are spent: as kaggle_kernels, smoke-*.

    The first makes phantom studies and preprocesses them (00_pipeline, which Kaggle's papermill runs), the others
    train, predict and report on its output with the settings of SIZE smoke. No GPU, no internet, no competition data;
    minutes each.
    """
    table = stage_table((0,), "smoke", members)
    names = {stage.name: f"smoke-{stage.kernel}" for stage in table}
    first = names["01_preprocess"]

    def output(stage, folder=""):
        return f"{KAGGLE_INPUT}/{base}-{names[stage]}/{folder or stage}"

    own: dict[str, dict[str, Any]] = {"05_inference": {"WEIGHTS": [KAGGLE_INPUT]}, "06_report": {"RUN": KAGGLE_INPUT}}
    kernels = {}
    for stage in table:
        reads = {key: output(read) for key, read in stage.reads.items() if isinstance(read, str)}
        parameters = {"DATA": output("01_preprocess", "data"), **reads, **stage.parameters, **own.get(stage.name, {})}
        if stage.training:
            # Weights that are "installed" are of a package that Kaggle's image lacks; loaders would only slow it down.
            parameters |= {"PRETRAINED": "", "WORKERS": 0, "HOURS": 1.0}
        elif stage.name == "01_preprocess":
            parameters = {"DATA": "", "SIZE": "smoke", "STAGES": [stage.name], "SEED": 5, **SMOKE_STUDIES}
        kernels[names[stage.name]] = {
            "stage": stage.name,
            "names": (*names_of(stage), names[stage.name]),
            "notebook": "00_pipeline" if stage.name == "01_preprocess" else stage.notebook,
            "parameters": parameters,
            "needs": [] if stage.name == "01_preprocess" else [*dict.fromkeys([first, *map(names.get, stage.after)])],
            "gpu": False,
            "internet": False,
            "training": stage.training,
        }
    return kernels
