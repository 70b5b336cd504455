"""Stages: checked parameters, one folder and one manifest each, and the loop that runs their notebooks."""

import ast
import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .storage import plain, write_json
from .tables import read_folds


def assigned_literals(source):
    """The names a parameters cell assigns, with their literal values.

    source: the text of the cell. Returns a dict name -> value, in order.
    Raises ValueError where a value is not a literal: papermill can only inject literals, and values that depend on
    others must be derived in a later cell, after the injection.
    """
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        targets = node.targets if isinstance(node, ast.Assign) else []
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            raise ValueError(f"parameters cell, line {node.lineno}: write one `NAME = literal` a line")
        try:
            values[targets[0].id] = ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(f"parameters cell: {targets[0].id} must be a literal") from None
    return values


def check_values(defaults, given, where="parameters"):
    """Refuse names that do not exist and values of another type than the default's.

    defaults, given: dicts name -> value. Returns `defaults` updated with `given` (an int is welcome where a float
    is expected). Raises ValueError naming the closest parameter, TypeError naming both types.
    """
    merged = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            close = difflib.get_close_matches(name.upper(), defaults, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"{where}: there is no parameter {name!r}.{hint} There are: {', '.join(defaults)}")
        default = defaults[name]
        is_number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        if default is not None and not is_number and type(value) is not type(default):
            hint = f"; papermill takes it as -y '{{{name}: {value}}}'" if isinstance(default, (list, dict)) else ""
            raise TypeError(
                f"{where}: {name} must be {type(default).__name__} (as in {name} = {default!r}), "
                f"not {type(value).__name__} {value!r}{hint}"
            )
        merged[name] = float(value) if is_number else value
    return merged


def notebook_parameters(history, namespace):
    """The parameters in force in the running notebook, checked.

    history: IPython's `In`; namespace: `globals()`. papermill warns of a mistyped parameter and runs on with the
    default: here it is an error. Found by their first lines: our parameters cell starts with `# Parameters:` and
    papermill's injected one is `# Parameters` alone.
    """
    cells = [cell for cell in history if cell.startswith("# Parameters:")]
    if not cells:
        raise ValueError("run the parameters cell (its first line starts with '# Parameters:') before this one")
    defaults = assigned_literals(cells[-1])
    injected = [cell for cell in history if cell.startswith("# Parameters\n")]
    if injected:
        check_values(defaults, assigned_literals(injected[-1]))
    return check_values(defaults, {name: namespace[name] for name in defaults})


def versions():
    """Versions of what decides the results: a dict package -> version."""
    found = {"python": platform.python_version()}
    for name in (
        "torch",
        "timm_3d",
        "spacecutter",
        "ultralytics-opencv-headless",
        "ultralytics",
        "open3d-cpu",
        "open3d",
        "pydicom",
        "numpy",
        "pandas",
        "papermill",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(path):
    """A short hash that changes when a stage's input does.

    A folder of an earlier stage is known by its manifest, a data folder by the contents of its CSV files and the
    names of its studies and series, weights and other files by size and time.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if (path / "manifest.json").is_file():
        digest.update((path / "manifest.json").read_bytes())
    elif path.is_dir():
        for table in sorted(path.glob("*.csv")):
            digest.update(table.name.encode() + table.read_bytes())
        for folder in sorted(path.glob("*_images/*/*")):
            digest.update(f"{folder.parent.name}/{folder.name}".encode())
        for weights in sorted(path.glob("*.safetensors")):
            digest.update(f"{weights.name} {weights.stat().st_size} {weights.stat().st_mtime_ns}".encode())
    elif path.is_file():
        digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    else:
        raise FileNotFoundError(f"input {path} does not exist: run the stage that writes it, or correct the path")
    return digest.hexdigest()[:16]


# What may differ between two runs of the same work.
PARAMETERS_WITHOUT_EFFECT = (
    "OUT",
    "WORKERS",
    "THREADS",
    "DEVICE",
    "PROCESSES",
    "READERS",
    "BATCH_STUDIES",
    "HOURS",
    "RESERVE",
)


@dataclass
class Stage:
    """One stage's folder. `done`: an earlier run finished the same work with the same parameters and inputs."""

    dir: Path
    name: str
    done: bool
    identity: dict
    started: float

    def pause(self):
        """End the notebook here, without a manifest and without a failure: time is up, the next start goes on.

        Raises SystemExit(0), which papermill (and with it Kaggle) takes for a notebook that ended well.
        """
        print(
            f"{self.name}: time is up. {self.dir} has what the next start continues from; on Kaggle push this kernel "
            "again with its own output attached (CONTINUE in notebooks/publish.ipynb)."
        )
        sys.exit(0)

    def close(self, outputs=(), scores=None, counts=None):
        """Write manifest.json, the sign that the stage is complete. Returns the manifest.

        outputs: files (relative to the folder); each must exist. scores, counts: dicts of numbers for the report.
        """
        if self.done:
            return json.loads((self.dir / "manifest.json").read_text())
        missing = [str(name) for name in outputs if not (self.dir / name).exists()]
        if missing:
            raise FileNotFoundError(f"{self.name} did not write {', '.join(missing)} in {self.dir}")
        manifest = {
            "stage": self.name,
            **self.identity,
            "outputs": {str(name): (self.dir / name).stat().st_size for name in outputs},
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_mb": round(peak_memory_mb()),
            "versions": versions(),
            "code": code_fingerprint(),
            "scores": scores or {},
            "counts": counts or {},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        write_json(self.dir / "manifest.json", manifest)
        return manifest


def code_fingerprint():
    """A short hash of the kit's modules, to tell results of an older version."""
    digest = hashlib.sha256()
    for module in sorted(path for ending in ("py", "js", "css") for path in Path(__file__).parent.glob(f"*.{ending}")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:12]


def peak_memory_mb():
    """The largest resident memory of this process or one of its children so far, in MB (Linux: ru_maxrss is in KiB)."""
    import resource

    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def _is_complete(folder):
    """True if a stage's folder has a manifest and everything that it lists."""
    path = Path(folder) / "manifest.json"
    return path.is_file() and all((path.parent / name).exists() for name in json.loads(path.read_text())["outputs"])


_LOCKS = {}  # stage folder -> open file, kept for as long as this process lives


def _lock(folder):
    """Keep a second process from writing into the same stage; the system frees the lock when this process ends."""
    import fcntl

    if folder in _LOCKS:
        return
    file = open(folder.with_name(f".{folder.name}.lock"), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"another process is working in {folder}: wait until it ends, or stop it") from None
    except OSError:
        pass  # a file system without locks
    _LOCKS[folder] = file


def open_stage(out, name, parameters, inputs=()):
    """Open the folder OUT/name of a stage: new, to be continued, or finished.

    parameters: dict, as notebook_parameters returns it; inputs: files or folders that the stage reads.
    Finished work with the same parameters and inputs is found (`.done`); a killed run with the same ones continues,
    with HOURS also in a new folder where an attached input (an earlier version of the Kaggle kernel) has some of it;
    anything else is moved aside to name.old-1, .old-2, ... so that results never mix and nothing is lost.
    """
    folder = Path(out).resolve() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    identity = {
        "parameters": {k: v for k, v in parameters.items() if k not in PARAMETERS_WITHOUT_EFFECT},
        "inputs": {str(path): fingerprint(path) for path in inputs},
    }
    identity = json.loads(json.dumps(identity, default=plain))
    begun = folder / "begun.json"

    def same():
        return begun.is_file() and json.loads(begun.read_text()) == identity

    # Finished work needs no lock: jobs that share it run side by side.
    if not (same() and _is_complete(folder)):
        _lock(folder)
        if begun.is_file() and not same():
            number = 1
            while (old := folder.with_name(f"{name}.old-{number}")).exists():
                number += 1
            folder.rename(old)
            print(f"{name}: other parameters or inputs than last time; the old results are now in {old}")
        # Only trainings with an end are continued so, and publish attaches nobody else's: a detector's checkpoint is a
        # pickle, which must not be read from whatever input happens to have one.
        if not folder.exists() and parameters.get("HOURS"):
            _continue_attached(folder, identity)
        folder.mkdir(parents=True, exist_ok=True)
        if not begun.is_file():
            write_json(begun, identity)
    done = _is_complete(folder)
    print(f"{name}: " + ("already finished, found by its manifest" if done else f"working in {folder}"))
    return Stage(folder, name, done, identity, time.time())


def _continue_attached(folder, identity):
    """Copy into a new stage's folder what an attached input has of the same work, unfinished, if one has."""
    from .kaggle import unfinished_stages

    for source in unfinished_stages(folder.name):
        begun = json.loads((source / "begun.json").read_text())
        # Where inputs are mounted may have changed; what they hold may not.
        same = sorted(begun["inputs"].values()) == sorted(identity["inputs"].values())
        if begun["parameters"] != identity["parameters"] or not same:
            print(f"{source} is not continued: other parameters or inputs")
            continue
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            target = part / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # without its mode: inputs are read-only
        os.replace(part, folder)
        print(f"{folder.name}: continues what {source} has")
        return


class time_limit:
    """Stops what runs in its block when the hours are over: `with time_limit(10.5) as limit: ...`, then limit.reached.

    hours: from here on, 0 for no end. What runs is stopped as Ctrl-C would, wherever it is; so only work that a kill
    does not harm belongs inside. In the main thread only, where notebooks run (signal.setitimer).
    """

    class TimeIsUp(BaseException):
        """Not an Exception: libraries that catch those must let it through."""

    def __init__(self, hours):
        self.hours, self.reached = hours, False

    def _ring(self, *_):
        raise self.TimeIsUp

    def __enter__(self):
        if self.hours > 0:
            self.before = signal.signal(signal.SIGALRM, self._ring)
            signal.setitimer(signal.ITIMER_REAL, max(3600 * self.hours, 1e-3))
        return self

    def __exit__(self, kind, *_):
        if self.hours > 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)
        self.reached = kind is self.TimeIsUp
        return self.reached


def member_folder(name, folds):
    """The folder of a stage that trains these folds: with one fold only, its number is added.

    Jobs of single folds, on one machine or many, can so share an OUT; later stages read all folders that they find.
    """
    return f"{name}_{folds[0]}" if len(folds) == 1 else name


def check_folds(folds, preprocessed):
    """Refuse folds that the folds.csv of 01_preprocess (its folder) does not have, before a stage begins."""
    path = Path(preprocessed) / "folds.csv"
    if not path.is_file():
        raise FileNotFoundError(f"PREPROCESSED: {path} is missing; run 01_preprocess first, or correct the path")
    known = sorted(set(read_folds(path)["fold"]))
    if not folds or not set(folds) <= set(known):
        raise ValueError(f"FOLDS must be some of {', '.join(map(str, known))}, not {list(folds)}")


def is_finished(stage):
    """True if a stage of the table has a manifest with these parameters and with inputs that have not changed since."""
    folder = Path(stage["parameters"].get("OUT", "")) / stage["name"]
    if not _is_complete(folder):
        return False
    manifest = json.loads((folder / "manifest.json").read_text())
    parameters = check_notebook_parameters(stage["notebook"], stage["parameters"])
    same = {k: v for k, v in parameters.items() if k not in PARAMETERS_WITHOUT_EFFECT} == manifest["parameters"]
    same = same and all(Path(p).exists() and fingerprint(p) == known for p, known in manifest["inputs"].items())
    if same and manifest["code"] != code_fingerprint():
        print(f"{stage['name']}: finished by another version of lumbar/; delete {folder} to do it again")
    return same


def check_notebook_parameters(notebook, given):
    """Refuse parameters that a notebook does not have, before it starts. See check_values."""
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    source = next((c.source for c in cells if "parameters" in c.metadata.get("tags", [])), None)
    if source is None:
        raise ValueError(f"{notebook} has no cell tagged `parameters`")
    return check_values(assigned_literals(source), given, Path(notebook).name)


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


def run_notebook(notebook, output, parameters, threads=1):
    """Run a notebook by papermill in a process of its own; its log goes to this process' stdout, a line at a time.

    A process and not papermill's function: stages can then run side by side with their own number of threads.
    Raises RuntimeError with the last lines when it fails; what ran until then is in `output`.
    """
    import ctypes
    import signal
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
    tail = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        preexec_fn=(lambda: libc.prctl(1, signal.SIGTERM)) if libc else None,
    ) as process:
        for line in process.stdout:
            line = line.rstrip().split("\r")[-1]
            if line and not line.startswith(_LOG_NOISE):
                tail = [*tail[-29:], line]
                print(f"[{output.stem}] {line}", flush=True)
    if process.returncode:
        raise RuntimeError(f"{notebook} failed; see {output}. Its last lines:\n" + "\n".join(tail))


def run_stages(stages, runs, workers=2):
    """Run a table of stages, side by side where they do not need each other.

    stages: list of dicts: name, notebook, parameters, after (names of stages to wait for), threads.
    runs: folder for the executed notebooks. A finished stage (see is_finished) is not run again. When a stage fails,
    running ones finish and the first error is raised. Returns dict name -> seconds, of the stages that ran.
    """
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    for stage in stages:
        check_notebook_parameters(stage["notebook"], stage["parameters"])
    seconds, finished, running, waiting, failure = {}, set(), {}, list(stages), None

    def run(stage):
        started = time.time()
        run_notebook(stage["notebook"], Path(runs) / f"{stage['name']}.ipynb", stage["parameters"], stage["threads"])
        return time.time() - started

    with ThreadPoolExecutor(workers) as pool:
        while (waiting and failure is None) or running:
            free = workers - sum(stage["threads"] for stage in running.values())
            for stage in list(waiting) if failure is None else []:
                if not set(stage["after"]) <= finished:
                    continue
                if is_finished(stage):
                    waiting.remove(stage)
                    finished.add(stage["name"])
                    print(f"== {stage['name']} is finished: found by its manifest", flush=True)
                elif min(stage["threads"], workers) <= free:
                    waiting.remove(stage)
                    free -= stage["threads"]
                    running[pool.submit(run, stage)] = stage
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


# Settings by stage or notebook; what is not named keeps the notebooks' full-size defaults. Mixup is for longer
# trainings than these.
DEMO = {
    "01_preprocess": {"YOLO_IMGSZ": 256},
    # The shipped weights, tuned as briefly as shows how it goes.
    "02_train_spinenet": {"ANATOMIES": 8, "FINE_TUNE_STEPS": 30, "FINE_TUNE_STUDIES": 10},
    "03_train_yolo": {
        "MODEL": "yolov10n.yaml",
        "EPOCHS": 6,
        "BATCH": 4,
        "LEARNING_RATE": 3.0e-3,
        "TRANSLATE": 0.05,
        "SCALE": 0.0,
        "ROTATE": 0.0,
    },
    "03_train_yolo_ss": {"EPOCHS": 4, "BATCH": 8},
    "04_train_vit": {"MIX": 0.0},
    "04_train_vit_level": {
        "BACKBONE": "tiny",
        "SHAPE": [32, 48, 48],
        "EXTENT_MM": [44.0, 72.0, 72.0],
        "EPOCHS": 14,
        "BATCH": 8,
        "ACCUMULATE": 1,
        "LEARNING_RATE": 2.0e-3,
        "DROPOUT": 0.2,
        "EMA": 0.98,
        "CACHE": True,
    },
    "04_train_vit_study": {
        "BACKBONE": "tiny_stride8",
        "SHAPE": [96, 64, 32],
        "EXTENT_MM": [230.0, 80.0, 130.0],
        "EPOCHS": 40,  # it looks for the levels first: little shows before some 300 steps
        "BATCH": 4,
        "ACCUMULATE": 1,
        "LEARNING_RATE": 3.0e-3,
        "DROPOUT": 0.2,
        "EMA": 0.95,
        "CACHE": True,
    },
}
# On top of DEMO: for some 300 studies, so that the phantom's real frequencies show enough disease.
HOUR = {
    "04_train_vit_level": {
        "SHAPE": [32, 48, 64],
        "EXTENT_MM": [40.0, 64.0, 48.0],
        "EPOCHS": 10,
        "BATCH": 16,
        "LEARNING_RATE": 3.0e-3,
    },
    "04_train_vit_study": {"EPOCHS": 16, "BATCH": 8},
    "03_train_yolo": {"EPOCHS": 5},
}
# On top of DEMO: everything once, as fast as it goes. The scores mean nothing.
SMOKE = {
    # As on Kaggle: volumes in 8 bits, and the detectors' images cut by each training for itself.
    "01_preprocess": {"BITS": 8, "DETECTOR_IMAGES": False},
    # Tuning needs a detector that finds something: this one is only there to be trained.
    "02_train_spinenet": {
        "WEIGHTS": "",
        "STEPS": 30,
        "ANATOMIES": 3,
        "WIDTHS": [32, 48, 64, 96],
        "BLOCKS": 1,
        "RESOLUTION_MM": 2.0,
        "CROP_PX": [128, 96],
        "BATCH": 4,
        "FINE_TUNE_STEPS": 4,
    },
    "03_train_yolo": {"EPOCHS": 1, "IMGSZ": 128},
    "03_train_yolo_ss": {"EPOCHS": 1},
    "04_train_vit_level": {"EPOCHS": 2, "SHAPE": [16, 32, 32]},
    "04_train_vit_study": {"EPOCHS": 2, "SHAPE": [48, 32, 16]},
}


# The members' trainings, longest first.
MEMBER_STAGES = (
    "04_train_vit_level",
    "03_train_yolo_ss",
    "03_train_yolo_nfn",
    "03_train_yolo_scs",
    "04_train_vit_study",
)
ALL_FOLDS = (0, 1, 2, 3, 4)  # 01_preprocess deals as many


def pipeline_stages(notebooks, data, out, size="demo", folds=(), seed=0, workers=2):
    """The table of stages that run_stages takes: one direction, each reads what earlier ones wrote.

    size: `demo` (DEMO's settings, fold 0), `smoke` (the same, as short as possible), `hour` (HOUR's, fold 0) or
    `full` (the notebooks' defaults, every fold); folds: to train, empty for the size's own. Each fold of each member
    is a stage of its own with a folder of its own, `<member>_<fold>`: independent jobs, wherever they run.
    Raises ValueError on another size or fold.
    """
    presets = {"demo": [DEMO], "smoke": [DEMO, SMOKE], "hour": [DEMO, HOUR], "full": []}
    if size not in presets:
        raise ValueError(f"SIZE must be {', '.join(presets)}, not {size!r}")
    notebooks, data, out = Path(notebooks), str(data), str(out)
    small = size != "full"
    folds = list(folds) or ([0] if small else list(ALL_FOLDS))
    if not set(folds) <= set(ALL_FOLDS):
        raise ValueError(f"FOLDS must be some of {', '.join(map(str, ALL_FOLDS))}, not {folds}")
    before = {"PREPROCESSED": f"{out}/01_preprocess", "LEVELS_DIR": f"{out}/02_train_spinenet"}
    stages = []

    def add(name, notebook, after, threads=workers, **parameters):
        parameters = {"OUT": out, "DATA": data, **parameters}
        for preset in presets[size]:
            parameters |= preset.get(notebook, {}) | preset.get(name, {}) | preset.get(name.rpartition("_")[0], {})
        path = notebooks / f"{notebook}.ipynb"
        stages.append({"name": name, "notebook": path, "after": after, "threads": threads, "parameters": parameters})

    add("01_preprocess", "01_preprocess", [], SEED=seed, WORKERS=workers)
    loaders = {"WORKERS": 0} if small else {}  # small crops are faster made than sent between processes
    add(
        "02_train_spinenet",
        "02_train_spinenet",
        ["01_preprocess"],
        PREPROCESSED=before["PREPROCESSED"],
        SEED=seed,
        **loaders,
    )
    # Small trainings run side by side on one core each; at full size each takes the GPUs, one after the other. The
    # longest come first, so that the short ones fill the gaps.
    shared = {**before, **loaders, "SEED": seed}
    threads = 1 if small else workers
    trained = []
    for fold in folds:
        for member in MEMBER_STAGES:
            notebook, _, own = member.rpartition("_")
            key = "SCOPE" if notebook == "04_train_vit" else "CONDITION"
            name = member_folder(member, [fold])
            add(name, notebook, ["02_train_spinenet"], threads, **shared, **{key: own, "FOLDS": [fold]})
            trained.append(name)
    add("05_inference", "05_inference", trained, WEIGHTS=[f"{out}/{name}" for name in ("02_train_spinenet", *trained)])
    add("06_report", "06_report", ["05_inference"], RUN=out)
    return stages


def choose_stages(stages, names):
    """The stages with these names (all, if none is given). What they wait for must be finished or chosen too.

    A member's name without a fold (04_train_vit_level) is all of its folds.
    """
    known = [stage["name"] for stage in stages]
    for name in names:
        if name not in known and name not in MEMBER_STAGES:
            member, _, fold = name.rpartition("_")
            hint = f" FOLDS leaves fold {fold} out: add it there." if member in MEMBER_STAGES and fold.isdigit() else ""
            there = ", ".join([*known, *MEMBER_STAGES])
            raise ValueError(f"STAGES: there is no stage {name!r}.{hint} There are {there}")
    chosen = [s for s in stages if not names or s["name"] in names or s["name"].rpartition("_")[0] in names]
    return [{**stage, "after": [a for a in stage["after"] if a in [s["name"] for s in chosen]]} for stage in chosen]


def write_run_manifest(out, parameters, seconds, wall_seconds):
    """OUT/manifest.json: the run's parameters and every finished stage's manifest. Returns it.

    seconds: of the stages that ran this time, as run_stages returns them; wall_seconds: of the whole run. Stages run
    side by side, so theirs add up to more.
    """
    out = Path(out)
    stages = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(out.glob("*/manifest.json"))
        if ".old-" not in path.parent.name
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
