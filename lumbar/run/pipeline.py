"""The stages in their order, here and as Kaggle kernels, and notebooks run one after another.

May use: stages, parameters, mounts, data.
"""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..data.tables import read_folds
from ..storage import plain, write_json
from .fingerprint import code_fingerprint, read_manifest, versions
from .mounts import KAGGLE_INPUT
from .parameters import check_device_here, check_notebook_parameters
from .stages import _identity, _state, stage_inputs


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
    try:
        known = sorted(set(read_folds(path)["fold"]))
    except (ValueError, KeyError) as error:
        raise ValueError(f"PREPROCESSED: {path} is damaged ({error}); run 01_preprocess again") from None
    if not folds or not set(folds) <= set(known):
        raise ValueError(f"FOLDS must be some of {', '.join(map(str, known))}, not {list(folds)}")


def is_finished(stage):
    """True if a stage of the table has a manifest with these parameters and with inputs of the same content."""
    folder = Path(stage["parameters"].get("OUT", "")) / stage["name"]
    if not (folder / "manifest.json").is_file():
        return False
    parameters = check_notebook_parameters(stage["notebook"], stage["parameters"])
    try:
        identity, places = _identity(parameters, stage_inputs(parameters, stage["name"]))
    except FileNotFoundError:
        return False
    if _state(folder, identity, places)[0] != "finished":
        return False
    if read_manifest(folder)["code"] != code_fingerprint():
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


def run_notebook(notebook, output, parameters, threads=1):
    """Run a notebook by papermill in a process of its own; its log goes to this process' stdout, a line at a time.

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
    from concurrent.futures import FIRST_COMPLETED, wait

    for stage in stages:
        check_device_here(check_notebook_parameters(stage["notebook"], stage["parameters"]).get("DEVICE", "auto"))
    seconds, finished, running, waiting, failure = {}, set(), {}, list(stages), None

    def run(stage):
        started = time.monotonic()
        run_notebook(stage["notebook"], Path(runs) / f"{stage['name']}.ipynb", stage["parameters"], stage["threads"])
        return time.monotonic() - started

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


# ---- Staging: everything that Kaggle needs, in folders ----


TRAINING_HOURS = 10.5  # of the 12 that Kaggle gives a kernel: the rest is for what comes before and after


def kaggle_kernels(base="lumbar-spine", folds=(0,)):
    """The kernels that make up a run on Kaggle, in their order: dict name -> dict.

    base: what all slugs begin with; folds: to train, a kernel for each fold of each member. Fold 0 has the member's
    plain name (train-vit-level), the others their number behind it (train-vit-level-3). A training that is not done
    in TRAINING_HOURS ends there, see stage_kaggle's `continued`.
    Each has notebook (its file's stem), parameters, needs (names of kernels whose outputs it reads) and gpu.
    """

    def output(kernel, stage):
        return f"{KAGGLE_INPUT}/{base}-{kernel}/{stage}"

    if not folds or not set(folds) <= set(ALL_FOLDS):
        raise ValueError(f"folds must be some of {', '.join(map(str, ALL_FOLDS))}, not {list(folds)}")
    volumes = {"PREPROCESSED": output("preprocess", "01_preprocess")}
    located = {**volumes, "LEVELS_DIR": output("train-spinenet", "02_train_spinenet")}
    kernels = {
        # A kernel's output holds 20 GB, and is slow to attach with 100,000 files.
        "preprocess": ("01_preprocess", {"BITS": 8, "DETECTOR_IMAGES": False}, [], False),
        "train-spinenet": ("02_train_spinenet", volumes, ["preprocess"], True),
    }
    for fold in sorted(folds):
        for member in MEMBER_STAGES:
            notebook, _, own = member.rpartition("_")
            key = "SCOPE" if notebook == "04_train_vit" else "CONDITION"
            name = member[3:].replace("_", "-") + (f"-{fold}" if fold else "")
            own = {**located, key: own, "FOLDS": [fold], "HOURS": TRAINING_HOURS}
            kernels[name] = (notebook, own, ["preprocess", "train-spinenet"], True)
    trained = [name for name in kernels if name.startswith("train-")]
    stages = ["preprocess", *trained]
    kernels["inference"] = ("05_inference", {"WEIGHTS": [KAGGLE_INPUT]}, trained, True)
    kernels["report"] = ("06_report", {"RUN": KAGGLE_INPUT}, [*stages, "inference"], False)
    shown = {**located, "PREDICTIONS": [KAGGLE_INPUT], "INFERENCE": output("inference", "05_inference")}
    kernels["inspect"] = ("inspect", shown, [*stages, "inference"], False)
    return {
        name: {"notebook": notebook, "parameters": parameters, "needs": needs, "gpu": gpu}
        for name, (notebook, parameters, needs, gpu) in kernels.items()
    }
