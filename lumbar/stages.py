"""Stages: one folder and one manifest each, known by what went in and came out; the loop that runs their notebooks.

May use: names, storage, tables, parameters; kaggle and inference, inside functions, to find what is attached.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from .parameters import PATH_PARAMETERS, READ_PATHS, check_device_here, check_notebook_parameters
from .storage import dead_part, plain, read_json, remove_parts, write_json
from .tables import read_folds


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


# ---- What is in a file or folder ----


@functools.lru_cache(maxsize=100_000)
def _digest_of(path, size, changed_ns, inode):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path):
    """The SHA-256 of a file's contents, as hexadecimal digits. Computed once in a process, unless the file changes."""
    status = os.stat(path)
    # ctime and not mtime: nobody can set it back.
    return _digest_of(str(path), status.st_size, status.st_ctime_ns, status.st_ino)


# What comes and goes in a folder without being part of its content.
_PASSING = re.compile(r"^\.|\.(cache|lock|tmp)$|\.part(\.\w+)?$")


def _files_below(folder):
    """(name relative to the folder, size in bytes) of each file below it, in order."""
    found = []
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not _PASSING.search(name))
        for name in files:
            if not _PASSING.search(name):
                path = Path(place, name)
                if path.is_file():
                    found.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    return sorted(found)


def _content(path):
    """(bytes, SHA-256) of an output: of a file, or of a folder's files and their names."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size, file_digest(path)
    files = _files_below(path)
    with ThreadPoolExecutor(4) as pool:  # hashing and reading leave Python's lock alone
        digests = pool.map(lambda entry: file_digest(path / entry[0]), files)
        text = "".join(f"{digest} {name}\n" for digest, (name, _) in zip(digests, files, strict=True))
    return sum(size for _, size in files), hashlib.sha256(text.encode()).hexdigest()


def fingerprint(path):
    """A short hash of what a stage reads, which changes when its content does: not when it is copied or moved.

    A file is known by its bytes. Of a folder these count: the bytes of the tables, weights and ensemble.json in it, the
    names of studies and series below *_images, the names and sizes of what lies in the folders among a finished
    stage's outputs (thousands of volumes), and of a finished stage its parameters, inputs and what its manifest says of
    the contents of its outputs. Times, memory and places do not.
    """
    path = Path(path)
    if path.is_file():
        return file_digest(path)[:16]
    if not path.is_dir():
        raise FileNotFoundError(f"input {path} does not exist: run the stage that writes it, or correct the path")
    digest = hashlib.sha256()
    known = sorted(p for pattern in ("*.csv", "*.safetensors", "ensemble.json") for p in path.glob(pattern))
    for file in known:
        if file.is_file():
            digest.update(f"{file.name} {file_digest(file)}\n".encode())
    for folder in sorted(path.glob("*_images/*/*")):
        digest.update(f"{folder.parent.name}/{folder.name}\n".encode())
    manifest = read_manifest(path) or {"outputs": {}}
    for name in sorted(name for name in manifest["outputs"] if (path / name).is_dir()):
        digest.update(f"{name} {_files_below(path / name)}\n".encode())
    if "sha256" in manifest:
        made = {"stage": manifest["stage"], "work": _work(manifest), "outputs": _lasting(manifest["sha256"])}
        digest.update(json.dumps(made, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _lasting(contents):
    """The contents of outputs without pictures and pages, which no stage reads and which may show times."""
    return {name: value for name, value in contents.items() if PurePath(name).suffix not in (".png", ".html")}


def stage_inputs(parameters, name=""):
    """What a stage of these parameters reads: dict parameter -> path, or list of paths, in their order.

    parameters: as notebook_parameters returns them; name: of the stage, which does not read itself. Of READ_PATHS those
    that are not empty; relative paths count from the working directory, else from the kit's folder, and what an input
    on Kaggle is called is found where it is mounted (kaggle.find_input). A list of WEIGHTS stands for the folders with
    weights in and below them, RUN for the finished stages in it.
    Raises FileNotFoundError, naming the parameter.
    """
    found = {}
    for key in READ_PATHS:
        value = parameters.get(key)
        if not value or not isinstance(value, (str, Path, list)):
            continue
        places = [place for text in (value if isinstance(value, list) else [value]) for place in _located(key, text)]
        if key == "WEIGHTS" and isinstance(value, list):
            from .inference import weight_folders

            found[key] = weight_folders(places)
        elif key == "RUN":
            stages = [p.parent for place in places for p in sorted(place.glob("*/manifest.json"))]
            extra = [place / "solutions" / "predictions.npz" for place in places]  # of tests/benchmarks
            found[key] = [p for p in stages if p.name != name and ".old-" not in p.name and read_manifest(p)]
            found[key] += [p for p in extra if p.is_file()]
        else:
            found[key] = places if isinstance(value, list) else places[0]
    return found


def _located(key, text):
    """The paths that one text of a path parameter stands for."""
    from .kaggle import find_input, find_inputs

    value = find_inputs({key: [str(text)]}).get(key, [str(text)])
    places = []
    for place in map(Path, value):
        own = Path(__file__).resolve().parents[1] / place
        if not place.exists() and own.exists():
            place = own
        elif not place.exists():
            try:
                place = find_input(str(text))
            except FileNotFoundError as error:
                message = f"{key}: {error} If an earlier stage writes it, run that first."
                raise FileNotFoundError(message) from None
        places.append(place)
    return places


# ---- What makes two runs the same ----

# What may differ between two runs of the same work, besides PATH_PARAMETERS: of these only what they lead to counts.
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


def _work(known):
    """What must be the same for two runs to have done the same: of an identity, of begun.json or a manifest."""
    left_out = (*PARAMETERS_WITHOUT_EFFECT, *PATH_PARAMETERS)
    return {
        "parameters": {name: value for name, value in known["parameters"].items() if name not in left_out},
        "inputs": known["inputs"],
    }


def _is_same_work(known, identity, inputs):
    """Whether begun.json or a manifest (`known`) is of the same work as `identity`.

    inputs: dict parameter -> path or list of paths, for what was written when inputs were known by their paths.
    """
    if _work(known) == _work(identity):
        return True
    by_path = not any(key in READ_PATHS or key.startswith("input ") for key in known["inputs"])
    return by_path and _was_same_work(known, identity, inputs)


# Until inputs were known by what is in them, their paths were their names, and a stage's folder was known by the bytes
# of its manifest. Runs of that time are still found, wherever they lie now, until one of their stages is done again.


def _was_same_work(known, identity, inputs):
    if _work(known)["parameters"] != _work(identity)["parameters"]:
        return False
    own = Path(__file__).resolve().parents[1]
    read = {key: value if isinstance(value, list) else [value] for key, value in inputs.items()}
    # The weights that come with the kit are part of it, as its code is: what they were known by is when they were
    # checked out.
    shipped = [path for path in read.get("WEIGHTS", ()) if Path(path).resolve().is_relative_to(own / "weights")]
    names = tuple(path.name for path in shipped)
    old = Counter(value for place, value in known["inputs"].items() if not place.endswith(names))
    now = Counter(_old_fingerprint(p) for paths in read.values() for p in paths if p not in shipped)
    # The report knew the data by the stages that read it.
    stages = Counter(_old_fingerprint(p) for key, paths in read.items() if key != "DATA" for p in paths)
    return old == now or ("RUN" in read and old == stages)


def _old_fingerprint(path):
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
    else:
        digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


# ---- A stage's folder ----


@dataclass
class Stage:
    """One stage's folder.

    done: an earlier run finished the same work with the same parameters and inputs; inputs: what its parameters lead to
    (stage_inputs); started: of time.monotonic, in seconds.
    """

    dir: Path
    name: str
    done: bool
    identity: dict
    started: float
    inputs: dict = field(default_factory=dict)

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

        outputs: files and folders (relative to this stage's, and below it); each must exist. Their contents are read
        once more, to be known by. scores, counts: dicts of numbers for the report.
        """
        if self.done:
            manifest = read_manifest(self.dir)
            if manifest is not None:
                return manifest
        outputs = list(map(str, outputs))
        outside = [name for name in outputs if not _is_below(name)]
        if outside:
            raise ValueError(f"{self.name}: outputs must lie in its own folder, not at {', '.join(outside)}")
        missing = [name for name in outputs if not (self.dir / name).exists()]
        if missing:
            raise FileNotFoundError(f"{self.name} did not write {', '.join(missing)} in {self.dir}")
        contents = {name: _content(self.dir / name) for name in outputs}
        manifest = {
            "stage": self.name,
            **self.identity,
            "outputs": {name: size for name, (size, _) in contents.items()},
            "sha256": {name: digest for name, (_, digest) in contents.items()},
            "seconds": round(time.monotonic() - self.started, 1),
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


def _is_below(name):
    """True for a path that leads from a folder to something in it."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


_OF_IDENTITY = {"parameters": dict, "inputs": dict}
_OF_MANIFEST = _OF_IDENTITY | {
    "stage": str,
    "outputs": dict,
    "seconds": (int, float),
    "versions": dict,
    "code": str,
    "scores": dict,
    "counts": dict,
    "finished": str,
}


# What 00_phantom's manifest lists in runs of the time when paths counted.
_OLD_OUTPUTS = ("../data/train.csv", "../data/train_images", "../data/test_images")


def _read_identity(path, expected=_OF_IDENTITY):
    """begun.json or manifest.json; None where there is none. Raises ValueError, naming the file, if it is not ours."""
    if not path.exists() and not path.is_symlink():
        return None
    try:
        known = read_json(path, "")
    except FileNotFoundError:
        raise ValueError(f"{path} is damaged (it is no file)") from None
    for key, kind in expected.items():
        if not isinstance(known.get(key), kind) or isinstance(known[key], bool):
            raise ValueError(f"{path} is damaged or not of this kit ({key!r} is missing or of the wrong type)")
    if not all(isinstance(value, (str, list)) for value in known["inputs"].values()):
        raise ValueError(f"{path} is damaged or not of this kit (its inputs are no fingerprints)")
    if expected is _OF_MANIFEST:
        if not all(type(size) is int for size in known["outputs"].values()):
            raise ValueError(f"{path} is damaged or not of this kit (the sizes of its outputs are no numbers)")
        outside = [name for name in known["outputs"] if not _is_below(name) and name not in _OLD_OUTPUTS]
        if outside:
            raise ValueError(f"{path} lists outputs outside its folder: {', '.join(outside[:3])}")
        sums = known.get("sha256", {})
        if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
            raise ValueError(f"{path} is damaged or not of this kit ('sha256' is of the wrong type)")
    return known


def read_manifest(folder):
    """The manifest of a finished stage's folder, a dict; None where there is none.

    One that is damaged, foreign, or lists outputs outside the folder counts as none, and a line says so.
    """
    try:
        return _read_identity(Path(folder) / "manifest.json", _OF_MANIFEST)
    except ValueError as error:
        print(f"{error}: it does not count, and its stage is done again")
        return None


def _missing_output(folder, manifest):
    """What is wrong with the first output of a manifest that is not as it was written, in words; otherwise ""."""
    for name, size in manifest["outputs"].items():
        path = Path(folder) / name
        if not os.path.exists(path):
            return f"{path} is missing"
        if "sha256" in manifest:
            there = path.stat().st_size if path.is_file() else sum(size for _, size in _files_below(path))
            if there != size:
                return f"{path} has {there:,} bytes in place of {size:,}"
    return ""


def _state(folder, identity, places):
    """What a stage's folder holds: (None or "finished", "begun", "other", a sentence about what is wrong with it)."""
    if not folder.is_dir() or not any(not _PASSING.search(path.name) for path in folder.iterdir()):
        return None, ""
    try:
        begun = _read_identity(folder / "begun.json")
    except ValueError as error:
        return "other", f"{error}: what the folder is of is not known, and it is done again"
    try:
        manifest, problem = _read_identity(folder / "manifest.json", _OF_MANIFEST), ""
    except ValueError as error:
        manifest, problem = None, f"{error}: it is done again"
    known = begun or manifest
    if known is None:
        return "other", f"{folder} has no begun.json that says what it is of"
    if not _is_same_work(known, identity, places):
        return "other", "other parameters or inputs than last time"
    if manifest is None or not _is_same_work(manifest, identity, places):
        return "begun", problem or (manifest and f"{folder / 'manifest.json'} is of other work: it is done again") or ""
    problem = _missing_output(folder, manifest)
    return ("begun", f"{problem}: it is done again") if problem else ("finished", "")


_LOCKS = {}  # stage folder -> open file, kept for as long as this process lives


def _lock(folder):
    """Keep a second process from writing into the same stage; the system frees the lock when this process ends.

    Returns whether it has been taken just now, so that nobody else can have been at work in the folder.
    """
    import fcntl

    if folder in _LOCKS:
        return False
    file = open(folder.with_name(f".{folder.name}.lock"), "w")
    locked = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        locked = False
        own = [os.fstat(held.fileno()) for held in _LOCKS.values()]  # of a folder that was moved meanwhile
        if not any(os.path.samestat(os.fstat(file.fileno()), mine) for mine in own):
            raise RuntimeError(f"another process is working in {folder}: wait until it ends, or stop it") from None
    except OSError:
        locked = False  # a file system without locks
    _LOCKS[folder] = file
    return locked


def _remove_parts(folder):
    """Remove what killed processes left half written in a stage's folder, which this process has just locked.

    Not what bears the number of a living process: a worker of the killed one may live a moment longer.
    """
    remove_parts(folder)
    shutil.rmtree(folder.with_name(f"{folder.name}.part"), ignore_errors=True)  # of _continue_attached
    # OUT is not locked, and other machines may be writing in it, for as long as it takes to write a table.
    for path in folder.parent.glob("*.[0-9]*.part"):
        if path.is_file() and time.time() - path.stat().st_mtime > 3600 and dead_part(path):
            path.unlink(missing_ok=True)


def open_stage(out, name, parameters, inputs=()):
    """Open the folder OUT/name of a stage: new, to be continued, or finished.

    parameters: dict, as notebook_parameters returns it. What a stage reads is found by those of them that are paths
    (see stage_inputs) and known by its content: where it lies, and where OUT is, makes no difference. inputs: files or
    folders that the stage reads besides.
    Finished work with the same parameters and inputs is found (`.done`); a killed run with the same ones continues,
    with HOURS also in a new folder where an attached input (an earlier version of the Kaggle kernel) has some of it;
    anything else, and what cannot be read, is moved aside to name.old-1, .old-2, ... so that results never mix and
    nothing is lost. What killed processes left half written is removed.
    """
    started = time.monotonic()
    folder = Path(out).resolve() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    places = stage_inputs(parameters, name)
    identity, places = _identity(parameters, places, inputs)
    state, reason = _state(folder, identity, places)
    # Finished work needs no lock: jobs that share it run side by side.
    if state != "finished":
        fresh = _lock(folder)
        state, reason = _state(folder, identity, places)  # another process may have been at work until now
        if reason:
            print(f"{name}: {reason}")
        if state == "other":
            number = 1
            while (old := folder.with_name(f"{name}.old-{number}")).exists():
                number += 1
            folder.rename(old)
            print(f"{name}: the old results are now in {old}")
        elif state != "finished" and fresh:
            _remove_parts(folder)
        # Only trainings with an end are continued so, and publish attaches nobody else's: a detector's checkpoint is a
        # pickle, which must not be read from whatever input happens to have one.
        if not folder.exists() and parameters.get("HOURS"):
            _continue_attached(folder, identity, places)
        folder.mkdir(parents=True, exist_ok=True)
        if state != "finished":
            if (folder / "manifest.json").is_file():
                os.replace(folder / "manifest.json", folder / "manifest.json.old")
            write_json(folder / "begun.json", identity)
    done = state == "finished"
    print(f"{name}: " + ("already finished, found by its manifest" if done else f"working in {folder}"))
    return Stage(folder, name, done, identity, started, places)


def _identity(parameters, places, inputs=()):
    """(identity, places): what begun.json holds, and dict name -> path or list of paths of all inputs.

    places: of stage_inputs; inputs: further paths, or dict name -> path, which are named by their order.
    """
    known = {Path(p).resolve() for value in places.values() for p in (value if isinstance(value, list) else [value])}
    more = inputs if isinstance(inputs, dict) else {}
    further = [] if isinstance(inputs, dict) else [path for path in inputs if Path(path).resolve() not in known]
    places = {**places, **more, **{f"input {number}": path for number, path in enumerate(further, 1)}}
    identity = {
        "parameters": {k: v for k, v in parameters.items() if k not in PARAMETERS_WITHOUT_EFFECT},
        "inputs": {
            key: [fingerprint(path) for path in value] if isinstance(value, list) else fingerprint(value)
            for key, value in places.items()
        },
    }
    return json.loads(json.dumps(identity, default=plain)), places


def _continue_attached(folder, identity, places):
    """Copy into a new stage's folder what an attached input has of the same work, unfinished, if one has."""
    from .kaggle import unfinished_stages

    for source in unfinished_stages(folder.name):
        try:
            same = _is_same_work(_read_identity(source / "begun.json"), identity, places)
            reason = "other parameters or inputs"
        except ValueError as error:
            same, reason = False, error
        if not same:
            print(f"{source} is not continued: {reason}")
            continue
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            target = part / path.relative_to(source)
            if dead_part(path) is None:
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
