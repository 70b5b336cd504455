"""One folder and one manifest a stage: finished work is found, unfinished work goes on.

May use: fingerprint, parameters, mounts, storage, serve, grade.pretrained, grade.full_size.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, NoReturn, Self

from ..grade.full_size import FULL_SIZE
from ..grade.pretrained import INSTALLED, pretrained_file
from ..storage import is_dead_part, is_part, plain, remove_parts, write_json
from .fingerprint import (
    MANIFEST_FIELDS,
    PARAMETERS_WITHOUT_EFFECT,
    PASSING_FILES,
    code_fingerprint,
    content_digest,
    files_below,
    fingerprint,
    is_below,
    read_identity,
    read_manifest,
    versions,
    work_of,
)
from .parameters import READ_PATHS


def stage_inputs(parameters: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """What a stage of these parameters reads: dict parameter -> path, or list of paths, in their order.

    parameters: as notebook_parameters returns them; name: of the stage, which does not read itself. Of READ_PATHS those
    that are not empty; relative paths count from the working directory, else from the kit's folder, and what an input
    on Kaggle is called is found where it is mounted (mounts.find_input). A list of WEIGHTS stands for the folders with
    weights in and below them, of CLEAN for those with weights or tables of predictions, and for tables; RUN for the
    finished stages in it; PRETRAINED for the one file that is for the stage's network, where the folder has it.
    Raises FileNotFoundError, naming the parameter; ValueError for a CLEAN with what the stage's own run writes.
    """
    found = {}
    for key in READ_PATHS:
        value = parameters.get(key)
        if not value or not isinstance(value, (str, Path, list)):
            continue
        if key == "PRETRAINED" and value == INSTALLED:  # a package, which is part of the machine
            continue
        places = [place for text in (value if isinstance(value, list) else [value]) for place in _located(key, text)]
        if key in ("WEIGHTS", "CLEAN") and isinstance(value, list):
            from ..serve.members import prediction_places, weight_folders

            if key == "CLEAN" and parameters.get("OUT"):
                _check_other_run(places, Path(parameters["OUT"]), name)
            try:
                found[key] = (prediction_places if key == "CLEAN" else weight_folders)(places)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{key}: {error}") from None
        elif key == "RUN":
            stages = [p.parent for place in places for p in sorted(place.glob("*/manifest.json"))]
            found[key] = [p for p in stages if p.name != name and ".old-" not in p.name and read_manifest(p)]
        else:
            found[key] = places if isinstance(value, list) else places[0]
        if key == "PRETRAINED":
            found[key] = _file_for(found[key], parameters)
    return found


def _file_for(place, parameters):
    """The weights file in `place` that a stage of these parameters starts from; `place` where that is not known."""
    scope = parameters.get("SCOPE")
    own = (
        parameters.get("MODEL")
        or parameters.get("BACKBONE")
        or (FULL_SIZE[scope].backbone if scope in FULL_SIZE else "")
    )
    try:
        return pretrained_file(place, own) if own else place
    except (FileNotFoundError, ValueError):  # said by the notebook, with what to do
        return place


def _check_other_run(places, out, name):
    """Refuse to clean labels with predictions that the stage itself will write, or others of its run, which may change
    while it trains: each start would read something else, and begin anew."""
    own = out.resolve()
    for place in places:
        path = Path(place).resolve()
        if own / name in path.parents if path.is_file() else path in (own / name, own, *own.parents):
            raise ValueError(
                f"CLEAN: {place} has what this run itself writes: train with cleaned labels in another OUT, or name "
                "folders of trainings that will not be done again"
            )


def _located(key, text):
    """The paths that one text of a path parameter stands for."""
    from .mounts import find_input, find_inputs

    value = find_inputs({key: [str(text)]}).get(key, [str(text)])
    places = []
    for place in map(Path, value):
        own = Path(__file__).resolve().parents[2] / place
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


def _is_same_work(known, identity, inputs):
    """Whether begun.json or a manifest (`known`) is of the same work as `identity`.

    inputs: dict parameter -> path or list of paths, for what was written when inputs were known by their paths.
    """
    if work_of(known) == work_of(identity):
        return True
    by_path = not any(key in READ_PATHS or key.startswith("input ") for key in known["inputs"])
    return by_path and _was_same_work(known, identity, inputs)


# Until inputs were known by what is in them, their paths were their names, and a stage's folder was known by the bytes
# of its manifest. Runs of that time are still found, wherever they lie now, until one of their stages is done again.


def _was_same_work(known, identity, inputs):
    if work_of(known)["parameters"] != work_of(identity)["parameters"]:
        return False
    own = Path(__file__).resolve().parents[2]
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
class StageFolder:
    """One stage's folder.

    done: an earlier run finished the same work with the same parameters and inputs; inputs: what its parameters lead to
    (stage_inputs); started: of time.monotonic, in seconds.
    """

    dir: Path
    name: str
    done: bool
    identity: dict[str, Any]
    started: float
    inputs: dict[str, Any] = field(default_factory=dict)

    def pause(self) -> NoReturn:
        """End the notebook here, without a manifest and without a failure: time is up, the next start goes on.

        Raises SystemExit(0), which papermill (and with it Kaggle) takes for a notebook that ended well.
        """
        print(
            f"{self.name}: time is up. {self.dir} has what the next start continues from; on Kaggle push this kernel "
            "again with its own output attached (CONTINUE in notebooks/publish.ipynb)."
        )
        sys.exit(0)

    def close(
        self,
        outputs: Sequence[str | Path] = (),
        scores: Mapping[str, Any] | None = None,
        counts: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write manifest.json, the sign that the stage is complete. Returns the manifest.

        outputs: files and folders (relative to this stage's, and below it); each must exist. Their contents are read
        once more, to be known by. scores, counts: dicts of numbers for the report.
        """
        if self.done:
            manifest = read_manifest(self.dir)
            if manifest is not None:
                return manifest
        names = list(map(str, outputs))
        outside = [name for name in names if not is_below(name)]
        if outside:
            raise ValueError(f"{self.name}: outputs must lie in its own folder, not at {', '.join(outside)}")
        missing = [name for name in names if not (self.dir / name).exists()]
        if missing:
            raise FileNotFoundError(f"{self.name} did not write {', '.join(missing)} in {self.dir}")
        contents = {name: content_digest(self.dir / name) for name in names}
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


def peak_memory_mb() -> float:
    """The largest resident memory of this process or one of its children so far, in MB (Linux: ru_maxrss is in KiB)."""
    import resource

    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def _missing_output(folder, manifest):
    """What is wrong with the first output of a manifest that is not as it was written, in words; otherwise ""."""
    for name, size in manifest["outputs"].items():
        path = Path(folder) / name
        if not os.path.exists(path):
            return f"{path} is missing"
        if "sha256" in manifest:
            there = path.stat().st_size if path.is_file() else sum(size for _, size in files_below(path))
            if there != size:
                return f"{path} has {there:,} bytes in place of {size:,}"
    return ""


def stage_state(folder: Path, identity: Mapping[str, Any], places: Mapping[str, Any]) -> tuple[str | None, str]:
    """What a stage's folder holds: (None or "finished", "begun", "other", a sentence about what is wrong with it)."""
    if not folder.is_dir() or not any(not PASSING_FILES.search(path.name) for path in folder.iterdir()):
        return None, ""
    try:
        begun = read_identity(folder / "begun.json")
    except ValueError as error:
        return "other", f"{error}: what the folder is of is not known, and it is done again"
    try:
        manifest, problem = read_identity(folder / "manifest.json", MANIFEST_FIELDS), ""
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


BUSY = "another process is working in"  # so begins what is said of a stage that is locked
_LOCKS: dict[Path, IO[str]] = {}  # stage folder -> open file, kept for as long as this process lives


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
            raise RuntimeError(f"{BUSY} {folder}: wait until it ends, or stop it") from None
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
        if path.is_file() and time.time() - path.stat().st_mtime > 3600 and is_dead_part(path):
            path.unlink(missing_ok=True)


def open_stage(
    out: str | Path,
    name: str,
    parameters: Mapping[str, Any],
    inputs: Sequence[str | Path] | Mapping[str, str | Path] = (),
) -> StageFolder:
    """Open the folder OUT/name of a stage: new, to be continued, or finished.

    Finished work with the same parameters and inputs is found (`.done`); a killed run with the same ones continues,
    with HOURS also in a new folder where an attached input (an earlier version of the Kaggle kernel) has some of it;
    anything else, and what cannot be read, is moved aside to name.old-1, .old-2, ... so that results never mix and
    nothing is lost. What killed processes left half written is removed.

    Parameters
    ----------
    out : path
        The run's folder, OUT; made when needed.
    name : str
        Of the stage.
    parameters : mapping
        As notebook_parameters returns it. What a stage reads is found by those of them that are paths (see
        stage_inputs) and known by its content: where it lies, and where OUT is, makes no difference.
    inputs : sequence of path, or dict of str to path
        Files or folders that the stage reads besides.

    Returns
    -------
    StageFolder

    Raises
    ------
    FileNotFoundError
        An input is not there.
    ValueError
        CLEAN has the folder that the stage writes to, see stage_inputs.
    RuntimeError
        Another process is working in the folder.
    """
    started = time.monotonic()
    folder = Path(out).resolve() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    places = stage_inputs(parameters, name)
    identity, places = stage_identity(parameters, places, inputs)
    state, reason = stage_state(folder, identity, places)
    # Finished work needs no lock: jobs that share it run side by side.
    if state != "finished":
        fresh = _lock(folder)
        state, reason = stage_state(folder, identity, places)  # another process may have been at work until now
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
    return StageFolder(folder, name, done, identity, started, places)


def stage_identity(
    parameters: Mapping[str, Any], places: Mapping[str, Any], inputs: Any = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
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
    from .mounts import unfinished_stages

    for source in unfinished_stages(folder.name):
        try:
            same = _is_same_work(read_identity(source / "begun.json"), identity, places)
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
            if not is_part(path):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)  # without its mode: inputs are read-only
        os.replace(part, folder)
        print(f"{folder.name}: continues what {source} has")
        return


class time_limit:
    """Stops what runs in its block when the hours are over: `with time_limit(10.5) as limit: ...`, then limit.reached.

    hours: from here on, 0 for no end. What runs is stopped as Ctrl-C would, wherever it is; so only work that a kill
    does not harm belongs inside. In the main thread only, where notebooks run (signal.setitimer). Where that is code
    out of which no exception comes, such as a destructor or a library's bare `except:`, it is stopped a second later.
    """

    class TimeIsUp(BaseException):
        """Not an Exception: libraries that catch those must let it through."""

    def __init__(self, hours: float) -> None:
        self.hours, self.reached = hours, False

    def _ring(self, number: int, frame: FrameType | None) -> None:
        handled = sys.exception()
        while handled is not None:
            if isinstance(handled, self.TimeIsUp):
                return  # what cleans up on its way up is not stopped again
            handled = handled.__context__
        raise self.TimeIsUp

    def __enter__(self) -> Self:
        if self.hours > 0:
            self.before = signal.signal(signal.SIGALRM, self._ring)
            signal.setitimer(signal.ITIMER_REAL, max(3600 * self.hours, 1e-3), 1.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self.hours > 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)
        self.reached = kind is self.TimeIsUp
        return self.reached
