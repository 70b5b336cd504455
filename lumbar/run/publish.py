"""Staging and pushing kernels and data sets to Kaggle.

May use: cells, costs, fingerprint, pipeline, parameters, serve.members, storage, grade, mounts.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..grade.registry import MEMBERS
from ..storage import read_json, write_json
from .cells import with_values
from .costs import Cost, on_kaggle, stage_cost
from .fingerprint import PARAMETERS_WITHOUT_EFFECT
from .mounts import KAGGLE_HAS, KAGGLE_INPUT, KAGGLE_WORKING, NEEDED
from .parameters import assigned_literals, check_notebook_parameters, nearest, shipped_defaults
from .pipeline import kaggle_kernels, settings_of, smoke_kernels

KAGGLE_OWNER_PLACEHOLDER = "your-kaggle-user"


def staged_notebook(notebook: str | Path, parameters: Mapping[str, Any]) -> str:
    """A notebook's JSON text with these parameters in its one parameters cell, without outputs or traces of a run.

    The values stand where the defaults stood, with the comments beside them: whoever copies the kernel on Kaggle edits
    them there. Raises ValueError or TypeError for a parameter that the notebook does not have, see
    check_notebook_parameters.
    """
    import nbformat

    checked, defaults = check_notebook_parameters(notebook, parameters), check_notebook_parameters(notebook, {})
    changed = {name: checked[name] for name in parameters if checked[name] != defaults[name]}
    staged = nbformat.read(notebook, as_version=4)
    (cell,) = (cell for cell in staged.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = with_values(cell.source, changed)
    for number, cell in enumerate(staged.cells):
        cell["id"] = f"cell-{number}"  # the same notebook shall give the same text
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    staged.nbformat_minor = max(staged.nbformat_minor, 5)
    return nbformat.writes(staged)


def _check_user(user):
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{1,49}", str(user)) or user == KAGGLE_OWNER_PLACEHOLDER:
        raise ValueError(
            f"USER: {user!r} is no Kaggle user name: give (-p USER name) the one in the address of your profile, "
            "https://www.kaggle.com/<user name> (letters, digits and hyphens)"
        )


def _check_title(title, slug):
    """Kaggle makes the slug from the title; if it is not the one that other kernels name, they do not find it."""
    made = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    if made != slug or not 6 <= len(slug) <= 50 or not 6 <= len(title) <= 50:
        raise ValueError(f"title {title!r} and slug {slug!r} must say the same, in 6 to 50 characters")


def _title(slug):
    return slug.replace("-", " ").title()


def stage_kaggle(
    user: str,
    build: str | Path,
    repository: str | Path = ".",
    folds: Sequence[int] = (0,),
    weights: Sequence[str | Path] = (),
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    wheels: bool = True,
    continued: Sequence[str] = (),
    members: Sequence[str] = (),
    smoke: bool = False,
) -> list[Path]:
    """Lay out everything that Kaggle needs in folders: kernels/<name> and datasets/<slug>.

    Parameters
    ----------
    user : str
        Your Kaggle user name.
    build : path
        Folder whose kernels and datasets are made new.
    repository : path
        The kit's folder; its kernel-metadata.json, the inference kernel's, is what the others are derived from: their
        competition, data sets, machine and privacy.
    folds, members
        To train on Kaggle, see kaggle_kernels.
    weights : sequence of path
        Folders of a run made elsewhere (its OUT, or stages in it): its weights become a data set, and the only kernel
        is inference, which reads that.
    parameters : dict of str to dict, optional
        Kernel, stage or notebook to notebook parameters, over the kernels' own.
    wheels : bool
        Whether to download the packages that Kaggle's image lacks (see stage_wheels).
    continued : sequence of str
        Names of trainings that ran out of time: their last version's output is attached to the next version, which
        goes on with its last epoch. Everything is then laid out as it was when they were pushed, which `build`
        remembers in pushed.json (see kaggle_publish), and no wheels are fetched.
    smoke : bool
        Lay out smoke_kernels instead.

    Returns
    -------
    list of Path
        The folders: data sets, then kernels.

    Raises
    ------
    ValueError
        A user name that cannot be one, a kernel, member, fold or parameter that does not exist, a title that does not
        make its slug, a kernel-metadata.json that lacks a data set, a build folder with something else in it, or
        something to be continued of which it is not known how it was pushed, or which other parameters would begin
        anew.
    TypeError
        A parameter of another type.
    FileNotFoundError
        Weights are asked for and there are none.
    RuntimeError
        The wheels cannot be downloaded.
    """
    _check_user(user)
    repository, build, parameters = Path(repository), Path(build), dict(parameters or {})
    if continued:
        wheels = False
        folds, members, parameters = _as_pushed(build, user, continued, parameters)
    template = json.loads((repository / "kernel-metadata.json").read_text(encoding="utf-8"))
    base = template["id"].rpartition("/")[2].removesuffix("-inference")
    kernels = smoke_kernels(base, members) if smoke else kaggle_kernels(base, folds, members, parameters)
    if weights:
        kernels = {"inference": {**kernels["inference"], "needs": []}}
    if unknown := [name for name in continued if name not in kernels]:
        raise ValueError(
            f"there is no kernel {', '.join(unknown)}.{nearest(unknown[0], kernels)} There are {', '.join(kernels)}"
        )
    settings = settings_of({name: kernel["names"] for name, kernel in kernels.items()}, parameters)
    kinds = {source.rpartition("-")[2]: source.rpartition("/")[2] for source in template["dataset_sources"]}
    if missing := {"code", "weights", "wheels"} - set(kinds):
        raise ValueError(
            f"kernel-metadata.json: dataset_sources lacks one that ends with -{', -'.join(sorted(missing))}"
        )
    old = [build / folder for folder in ("kernels", "datasets") if (build / folder).exists()]
    if old and not (build / "staged.json").is_file():
        raise ValueError(f"{old[0]} was not made by publish, which would delete it: choose another BUILD")
    if not weights:
        template["dataset_sources"] = [s for s in template["dataset_sources"] if not s.endswith(kinds["weights"])]
    data = f"{KAGGLE_INPUT}/{template['competition_sources'][0]}"
    if smoke:
        template["competition_sources"] = []
    texts = {  # all of them, before anything is deleted
        name: _kernel_text(repository, kernel, settings[name], data) for name, kernel in kernels.items()
    }
    metadata = {
        name: _kernel_metadata(template, user, base, name, kernel, name in continued)
        for name, kernel in kernels.items()
    }
    for folder in old:
        shutil.rmtree(folder)
    build.mkdir(parents=True, exist_ok=True)
    plan: dict[str, Any] = {
        "user": user,
        "folds": list(folds),
        "members": list(members),
        "weights": list(map(str, weights)),
    }
    plan |= {"settings": parameters, "continued": list(continued), "smoke": smoke}
    plan["stages"] = {name: kernel["stage"] for name, kernel in kernels.items()}
    plan["trainings"] = [name for name, kernel in kernels.items() if kernel["training"]]
    write_json(build / "staged.json", plan)
    return [
        *_stage_datasets(build / "datasets", user, kinds, repository, weights, wheels),
        *(_stage_kernel(build / "kernels" / name, text, metadata[name]) for name, text in texts.items()),
    ]


def _kernel_text(repository, kernel, settings, data):
    """The notebook of a kernel with its values in the parameters cell, as text."""
    path = repository / "notebooks" / f"{kernel['notebook']}.ipynb"
    own = {"OUT": KAGGLE_WORKING} | ({} if kernel["internet"] else {"DATA": data})
    given = {**own, **kernel["parameters"]}
    if "HOURS" not in check_notebook_parameters(path, {}):  # a training that is over soon need not be able to stop
        given.pop("HOURS", None)
    return staged_notebook(path, given | settings)


def _kernel_metadata(template, user, base, name, kernel, continued):
    """kernel-metadata.json of a kernel; continued: it reads the output of its own last version."""
    slug = f"{base}-{name}"
    _check_title(_title(slug), slug)
    metadata = {
        **template,
        "id": f"{user}/{slug}",
        "title": _title(slug),
        "code_file": f"{slug}.ipynb",
        "enable_gpu": kernel["gpu"],
        "enable_internet": kernel["internet"],
        "dataset_sources": [f"{user}/{source.rpartition('/')[2]}" for source in template["dataset_sources"]],
        "kernel_sources": [f"{user}/{base}-{need}" for need in [*kernel["needs"], *([name] if continued else [])]],
    }
    if not kernel["gpu"]:
        metadata.pop("machine_shape", None)
    return metadata


def _stage_datasets(place, user, kinds, repository, weights, wheels):
    """The folders of the data sets that are wanted, each with its dataset-metadata.json."""
    staged = [stage_code(place / kinds["code"], repository)]
    if wheels:
        staged.append(stage_wheels(place / kinds["wheels"]))
    if weights:
        staged.append(stage_weights(place / kinds["weights"], weights))
    for folder in staged:
        _check_title(_title(folder.name), folder.name)
        about = {"title": _title(folder.name), "id": f"{user}/{folder.name}", "licenses": [{"name": "other"}]}
        write_json(folder / "dataset-metadata.json", about)
    return staged


def _stage_kernel(folder, text, metadata):
    folder.mkdir(parents=True)
    (folder / metadata["code_file"]).write_text(text, encoding="utf-8")
    write_json(folder / "kernel-metadata.json", metadata)
    return folder


def _as_pushed(build, user, continued, parameters):
    """(folds, members, parameters) with which the trainings to be continued were pushed, `parameters` laid over them.

    Raises ValueError where that is not known, differs between them, or would be changed in what decides the result.
    """
    pushed = read_json(build / "pushed.json") if (build / "pushed.json").is_file() else {}
    unknown = [name for name in continued if pushed.get(name, {}).get("user") != user]
    if unknown:
        there = ", ".join(name for name, about in pushed.items() if about.get("user") == user)
        raise ValueError(
            f"CONTINUE: {build / 'pushed.json'} does not say how {', '.join(unknown)} was pushed, so that nothing can "
            f"be continued.{nearest(unknown[0], pushed)} It knows {there or 'of no kernel'}. Give the BUILD of then"
        )
    first = pushed[continued[0]]
    for name in continued:
        if any(pushed[name][key] != first[key] for key in ("folds", "members")):
            raise ValueError(
                f"CONTINUE: {continued[0]} and {name} were pushed with other FOLDS or MEMBERS: one at a time"
            )
    settings = {**first["settings"], **{name: pushed[name]["values"] for name in continued}}
    for name, given in parameters.items():
        if name not in continued:
            raise ValueError(
                f"CONTINUE takes SETTINGS as they were pushed; what does not decide the result, such as HOURS, can be "
                f"changed of {', '.join(continued)}, not of {name}"
            )
        before = pushed[name]["values"]
        changed = [
            f"{key} from {before.get(key)!r} to {value!r}"
            for key, value in given.items()
            if key not in PARAMETERS_WITHOUT_EFFECT and before.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"CONTINUE: SETTINGS changes {', '.join(changed)} of {name}, which would begin anew. Leave that out, "
                "or push it without CONTINUE"
            )
        settings[name] = {**settings[name], **given}
    return first["folds"], first["members"], settings


def staged_costs(build: str | Path) -> dict[str, Cost]:
    """What the staged kernels cost, by their own parameters.

    Parameters
    ----------
    build : path
        Folder that stage_kaggle made.

    Returns
    -------
    dict of str to Cost
        Kernel to its cost on Kaggle.
    """
    own = Path(__file__).resolve().parents[2] / "notebooks"
    found = {}
    for folder in sorted(path.parent for path in Path(build).glob("kernels/*/kernel-metadata.json")):
        values = _values(folder)
        known = shipped_defaults(tuple(values))
        cost = stage_cost(own / known[0], values) if known else Cost()
        found[folder.name] = on_kaggle(cost, _metadata(folder)["enable_gpu"])
    return found


def stage_code(folder: str | Path, repository: str | Path = ".") -> Path:
    """Copy the notebooks, what they import, and the shipped weights into the folder of a data set. Returns the folder.

    The notebooks are what 00_pipeline runs, and what says which values a parameter may have.
    """
    folder, repository = Path(folder), Path(repository)
    folder.mkdir(parents=True)
    for pattern in ("utils.py", "notebooks/*.ipynb", "phantom/*.py", "lumbar/**/*.*", "weights/*.safetensors"):
        for path in sorted(path for path in repository.glob(pattern) if path.is_file() and path.suffix != ".pyc"):
            target = folder / path.relative_to(repository)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return folder


def stage_weights(folder: str | Path, places: Sequence[str | Path]) -> Path:
    """Copy what 05_inference reads of a run, stage by stage, into the folder of a data set. Returns the folder.

    places: folders with a run's stages (its OUT), or such stages.
    """
    from ..serve.members import weight_folders

    folder = Path(folder)
    parts = [part for member in MEMBERS.values() for part in member.parts]
    wanted = (
        "spinenet.safetensors",
        *(f"{part}_*.{kind}" for part in parts for kind in ("safetensors", "settled.json")),
        "oof.csv",
    )
    for source in weight_folders(places):
        for path in sorted({path for pattern in wanted for path in source.glob(pattern)}):
            target = folder / source.name / path.name
            if target.exists():
                raise ValueError(f"two folders called {source.name} have a {path.name}: one of them is {source}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    ensembles = [path for place in places for path in sorted(Path(place).glob("05_inference/ensemble.json"))]
    beside = sorted(folder.glob("*/spinenet.safetensors"))  # ensemble.json counts where weights lie
    if not beside:
        raise FileNotFoundError(
            f"no spinenet.safetensors in {', '.join(map(str, places))}: 02_train_spinenet writes it"
        )
    if ensembles:
        shutil.copyfile(ensembles[0], beside[0].with_name("ensemble.json"))
    return folder


def kaggle_packages() -> list[str]:
    """The packages that Kaggle's image lacks, in the versions that are installed here: those that are tested."""
    from importlib.metadata import version

    return [f"{package}=={version(package)}" for module, package in NEEDED.items() if module not in KAGGLE_HAS]


def stage_wheels(folder: str | Path, packages: Sequence[str] | None = None, python: str = "3.12") -> Path:
    """Download wheels for Kaggle's Python into the folder of a data set. Returns the folder.

    packages: default kaggle_packages(). Without their dependencies, which the image has: its torch, numpy and pandas
    fit its GPU driver and each other. Raises RuntimeError with pip's words.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--abi", f"cp{python.replace('.', '')}"]
    command += ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", "--dest", str(folder)]
    command += packages or kaggle_packages()
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode or not any(folder.glob("*.whl")):
        raise RuntimeError(f"the wheels for Kaggle could not be downloaded: {done.stdout.strip()}")
    return folder


# ---- Pushing ----

# The client reports most failures in words only and ends with status 0.
_REFUSED = re.compile(r"\berror\b|are not valid|does not resolve|unsuccessful|Skipping", re.IGNORECASE)
_NO_TOKEN = re.compile(r"authenticat|unauthorized|\b401\b|could not find kaggle.json", re.IGNORECASE)
_FORBIDDEN = re.compile(r"forbidden|\b403\b|permission|don't have access", re.IGNORECASE)
_NOT_FOUND = re.compile(r"\b404\b|not found", re.IGNORECASE)
_CONFLICT = re.compile(r"\b409\b|conflict|already in use|already exists|already taken", re.IGNORECASE)
# What passes: the service is down or busy (the client's own words, requests', and the server's), or the network is.
_PASSES = re.compile(
    r"\b(429|50[0234]) (-|\w+ Error)|problem on Kaggle's side|internal server error|bad gateway|gateway time-?out"
    r"|service unavailable|too many requests|rate limit|max retries exceeded|connection (aborted|reset)|timed out",
    re.IGNORECASE,
)
_PAUSES_S = (2.0, 6.0, 15.0)  # before it is tried again


def _client(arguments, environment=None):
    """Run Kaggle's client: (exit status, what it said on both outputs). What passes is tried again after pauses."""
    if importlib.util.find_spec("kaggle") is None:
        raise ModuleNotFoundError("Kaggle's client is not installed: `pip install kaggle six`")
    for pause_s in (*_PAUSES_S, None):
        done = subprocess.run(
            [sys.executable, "-m", "kaggle", *map(str, arguments)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        # Bars rewrite their line; only what is left standing is of interest.
        said = "\n".join(line.split("\r")[-1] for line in done.stdout.strip().splitlines())
        failed = done.returncode or _REFUSED.search(said)
        if pause_s is None or not failed or not _PASSES.search(said):
            return done.returncode, said
        time.sleep(pause_s)


def _client_or_raise(what, arguments, environment, expected):
    """Run Kaggle's client; RuntimeError, with what to do about it, unless it says what is expected and no trouble."""
    status, said = _client(arguments, environment)
    if not status and re.search(expected, said) and not _REFUSED.search(said):
        return said
    raise _refusal(what, status, said)


def _refusal(what, status, said):
    """The RuntimeError for what the client said, with what to do about it."""
    advice = ""
    if _PASSES.search(said):
        advice = (
            f" What to do: Kaggle did not answer properly, also not when asked {len(_PAUSES_S)} more times. Nothing is "
            "wrong here; look at https://status.kaggle.com and start again later, with PUSH naming what is left."
        )
    elif _NO_TOKEN.search(said):
        advice = (
            " What to do: make a token at https://www.kaggle.com/settings/api and save it as ~/.kaggle/access_token "
            "(or set KAGGLE_API_TOKEN), or run `kaggle auth login`."
        )
    elif _CONFLICT.search(said):
        advice = (
            " What to do: Kaggle has something of this title already, perhaps under another slug or still being made "
            "or saved. Wait a few minutes and push again; if that does not help, delete or rename the other one at "
            "https://www.kaggle.com/work."
        )
    elif _FORBIDDEN.search(said):
        advice = (
            " What to do: the user name that everything was staged for must be the token's, and the competition's "
            "rules must be accepted on its page."
        )
    elif "not valid" in said:
        advice = " What to do: push what it names first, and wait until Kaggle has finished with it."
    return RuntimeError(f"{what} failed (exit status {status}): {said}{advice}")


def kaggle_push(folder: str | Path, owner: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Send the notebook that folder/kernel-metadata.json names to Kaggle, which runs it.

    folder: folder of kernel-metadata.json; code_file is relative to it.
    owner: your Kaggle user name; it replaces the placeholder `your-kaggle-user` in a temporary copy of the metadata.
    environment: environment of the client (default: this process's), with a token as the client takes it.
    Returns what the client printed. Raises RuntimeError when the push was refused or an input was not accepted: the
    client says so on its output only and ends with status 0. Raises ValueError when the placeholder is still there.
    """
    folder = Path(folder)
    text = (folder / "kernel-metadata.json").read_text(encoding="utf-8")
    if owner:
        text = text.replace(f'"{KAGGLE_OWNER_PLACEHOLDER}/', f'"{owner}/')
    if f'"{KAGGLE_OWNER_PLACEHOLDER}/' in text:
        raise ValueError(
            f"{folder / 'kernel-metadata.json'}: put your Kaggle user name in place of "
            f"{KAGGLE_OWNER_PLACEHOLDER}, or give owner="
        )
    code_file = json.loads(text)["code_file"]
    with tempfile.TemporaryDirectory() as staged:
        target = Path(staged) / code_file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / code_file, target)
        (Path(staged) / "kernel-metadata.json").write_text(text, encoding="utf-8")
        return _client_or_raise(
            "kaggle kernels push", ["kernels", "push", "-p", staged], environment, "successfully pushed"
        )


def kaggle_upload(folder: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """Send the folder of a data set to Kaggle: a new private data set, or a new version of the one that is there.

    folder: with dataset-metadata.json; folders in it travel as archives, which Kaggle unpacks.
    Returns what the client printed. Raises RuntimeError when it, or one of its files, was refused.
    """
    folder = Path(folder)
    ref = json.loads((folder / "dataset-metadata.json").read_text(encoding="utf-8"))["id"]
    arguments = ["-p", folder, "--dir-mode", "zip"]
    state, status, said = _ask("datasets", ref, environment)
    # Of a data set that is not there Kaggle says "forbidden" as well as "not found". Any other failure says nothing,
    # and to create a data set that is there would be refused as a slug in use.
    if status and not (_NOT_FOUND.search(said) or _FORBIDDEN.search(said)):
        raise _refusal("kaggle datasets status", status, said)
    if not state:
        try:
            return _client_or_raise(
                "kaggle datasets create", ["datasets", "create", *arguments], environment, "is being created"
            )
        except RuntimeError as error:
            # One try may have been lost on the way back after all was done; the next then finds the slug in use.
            if not (_CONFLICT.search(str(error)) and kaggle_status("datasets", ref, environment)):
                raise
    arguments = ["datasets", "version", "-m", time.strftime("%Y-%m-%d %H:%M"), *arguments]
    return _client_or_raise("kaggle datasets version", arguments, environment, "is being created")


def kaggle_status(kind: str, ref: str, environment: Mapping[str, str] | None = None) -> str:
    """What Kaggle says of a data set ("ready") or kernel ("complete", "error", "running", ...); "" where it knows none.

    kind: "datasets" or "kernels"; ref: owner/slug.
    """
    return _ask(kind, ref, environment)[0]


def _ask(kind, ref, environment):
    """(state as kaggle_status gives it, the client's exit status, what it said)."""
    status, said = _client([kind, "status", ref], environment)
    found = re.search(r'has status "(?:\w+\.)?(\w+)"', said) if kind == "kernels" else re.search(r"^(\w+)$", said, re.M)
    return (found[1].lower() if found and not status else ""), status, said


def kaggle_files(ref: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """Names of the files in the output of a kernel's last version; empty where Kaggle does not say. ref: owner/slug."""
    names: list[str] = []
    token = ""
    while True:
        more = ["--page-token", token] if token else []
        status, said = _client(["kernels", "files", ref, "-v", "--page-size", "200", *more], environment)
        if status or _REFUSED.search(said):
            return names
        lines = said.splitlines()
        header = next((number for number, line in enumerate(lines) if line.startswith("name,")), len(lines))
        names += [line.split(",")[0].strip('"') for line in lines[header + 1 :] if line]
        found = re.search(r"Next Page Token = (\S+)", said)
        if not found or found[1] == token:
            return names
        token = found[1]


def _is_paused(files, stage):
    """Whether a training's output says that it ran out of time: begun.json without a manifest."""
    below = {Path(name).name for name in files if stage in Path(name).parts}
    return "begun.json" in below and "manifest.json" not in below


def kaggle_publish(
    build: str | Path,
    names: Iterable[str],
    environment: Mapping[str, str] | None = None,
    at_once: int = 2,
    pause_s: float = 60.0,
) -> dict[str, str]:
    """Upload staged data sets, then run staged kernels on Kaggle, each after those whose outputs it reads.

    What a kernel reads and is not named must have run on Kaggle; it is waited for where it still runs. A training that
    ran out of HOURS is no failure: what comes after it goes on with what else was trained, and how to continue it is
    printed. BUILD/pushed.json keeps how each kernel was pushed.

    Parameters
    ----------
    build : path
        Folder that stage_kaggle made.
    names : iterable of str
        Data sets (their slugs, or the part after the last hyphen) and kernels (preprocess, train-spinenet, ...). `all`:
        everything staged; where something is to be continued, that and the kernels that read its output.
    environment : mapping of str to str, optional
        Of Kaggle's client, with a token as the client takes it; default: this process's.
    at_once : int
        Kernels that run side by side (Kaggle gives two GPU sessions).
    pause_s : float
        Seconds between two looks.

    Returns
    -------
    dict of str to str
        Name to what the client said of it, with the address.

    Raises
    ------
    ValueError
        A name that was not staged.
    RuntimeError
        Something was refused, a kernel failed or nothing can be continued; with the command that does what is left.
    ModuleNotFoundError
        Kaggle's client is not installed.
    """
    build = Path(build)
    chosen, datasets, kernels = _chosen(build, names)
    said: dict[str, str] = {}
    left = list(chosen)
    try:
        for name in (name for name in chosen if name in datasets):
            said[name] = kaggle_upload(datasets[name], environment)
            print(f"{name}: {said[name].splitlines()[-1]}", flush=True)
        for name in list(said):
            ref = json.loads((datasets[name] / "dataset-metadata.json").read_text(encoding="utf-8"))["id"]
            _wait({name: ref}, "datasets", environment, pause_s)
            left.remove(name)
        _push_kernels(build, kernels, chosen, left, said, environment, at_once, pause_s)
    except RuntimeError as error:
        if not left:
            raise
        raise RuntimeError(f"{error}\nWhat is left is done by: {_command(build, left)}") from None
    except KeyboardInterrupt:
        print(f"Stopped; what was pushed goes on at Kaggle. What is left is done by: {_command(build, left)}")
        raise
    return said


def _chosen(build, names):
    """(names of data sets and kernels to send, dict of staged data sets, dict of staged kernels: name -> folder)."""
    datasets = {path.parent.name: path.parent for path in sorted(build.glob("datasets/*/dataset-metadata.json"))}
    kernels = {path.parent.name: path.parent for path in build.glob("kernels/*/kernel-metadata.json")}
    plan = _plan(build)
    in_order = [name for name in plan["stages"] if name in kernels] + [n for n in kernels if n not in plan["stages"]]
    if "all" in (names := list(names)):
        wanted = set(plan["continued"]) or {*datasets, *in_order}
        for name in in_order if plan["continued"] else ():
            if wanted & set(_needs(kernels, name)):
                wanted.add(name)
        names = [*names, *(name for name in (*datasets, *in_order) if name in wanted)]
        names = list(dict.fromkeys(name for name in names if name != "all"))
    short = {slug.rpartition("-")[2]: slug for slug in datasets}
    chosen = [short.get(name, name) for name in names]
    if unknown := [name for name in chosen if name not in datasets and name not in kernels]:
        there = [*short, *in_order]
        listed = ", ".join(there) or "nothing: stage_kaggle fills it"
        hint = nearest(unknown[0], there)
        raise ValueError(f"PUSH: {', '.join(unknown)}: not in {build}; there are {listed}.{hint}")
    return chosen, datasets, kernels


def _plan(build):
    """What stage_kaggle wrote of its arguments in staged.json."""
    empty = {"user": "", "folds": [], "members": [], "weights": [], "settings": {}, "continued": [], "smoke": False}
    known = read_json(build / "staged.json") if (build / "staged.json").is_file() else {}
    return {**empty, "stages": {}, "trainings": [], **known}


def _metadata(folder):
    return json.loads((folder / "kernel-metadata.json").read_text(encoding="utf-8"))


def _needs(kernels, name):
    """The kernels that one reads, by the names that they are staged under; by owner/slug those that are not staged."""
    names = {_metadata(folder)["id"]: other for other, folder in kernels.items()}
    about = _metadata(kernels[name])
    return [names.get(ref, ref) for ref in about["kernel_sources"] if ref != about["id"]]


def _command(build, push, continued=None):
    """The command that publishes these names, everything else as it was staged."""
    import yaml

    plan = _plan(build)
    given: dict[str, Any] = {"USER": plan["user"]}
    continued = plan["continued"] if continued is None else continued
    place, root = build.resolve(), Path(__file__).resolve().parents[2]
    if place != root / "build":
        given["BUILD"] = str(place.relative_to(root) if place.is_relative_to(root) else place)
    if continued:
        given["CONTINUE"] = continued  # what it was pushed with is remembered
    else:
        given |= {"FOLDS": plan["folds"]} if plan["folds"] != [0] else {}
        for key in ("MEMBERS", "WEIGHTS", "SETTINGS", "SMOKE"):
            given |= {key: plan[key.lower()]} if plan[key.lower()] else {}
    known = [name.rpartition("-")[2] if (build / "datasets" / name).is_dir() else name for name in push]
    given |= {} if "wheels" in known else {"WHEELS": False}
    given["PUSH"] = known
    text = yaml.safe_dump(given, default_flow_style=True, width=10**6, sort_keys=False).strip()
    return f"papermill --log-output notebooks/publish.ipynb runs/publish.ipynb -y {shlex.quote(text)}"


def _push_kernels(build, kernels, chosen, left, said, environment, at_once, pause_s):
    """The second half of kaggle_publish. left: names that are still to be done, which this shortens as it goes."""
    plan = _plan(build)
    ids = {name: _metadata(folder)["id"] for name, folder in kernels.items()}
    waiting = [name for name in chosen if name in kernels]
    for name in [name for name in waiting if name in plan["continued"]]:
        reason = _why_not_continued(ids[name], plan["stages"].get(name, ""), environment)
        if reason:
            print(f"{name}: {reason}", flush=True)
            waiting.remove(name)
            left.remove(name)
    if plan["continued"] and not set(plan["continued"]) & set(waiting) and set(plan["continued"]) & set(chosen):
        left.clear()
        others = [name for name in waiting if name not in plan["continued"]]
        command = _command(build, others or ["inference"], [])
        raise RuntimeError(f"CONTINUE: nothing can be continued, see above. The kernels after it are run by: {command}")
    running: dict[str, str] = {}  # what is waited for: name -> owner/slug
    own: set[str] = set()  # of these, what was pushed here
    paused: list[str] = []
    finished: set[str] = set()
    while waiting or own:
        for name in list(waiting):
            if len(running) >= at_once:
                break
            needs = _needs(kernels, name)
            if set(needs) & {*waiting, *running}:
                continue
            for need in needs:
                if need not in finished and need not in paused:
                    _look(need, name, ids.get(need, need), plan, environment, running, finished, paused)
            if set(needs) & set(running):
                continue
            trainings = set(needs) & set(plan["trainings"])
            if trainings and trainings <= set(paused):
                left.clear()
                raise RuntimeError(
                    f"{name} was not pushed: no training has finished. {_how_to_continue(build, paused)}"
                )
            said[name] = kaggle_push(kernels[name], environment=environment)
            print(f"{name}: {said[name].splitlines()[-1]}", flush=True)
            _remember(build, name, plan, kernels[name])
            waiting.remove(name)
            left.remove(name)
            running[name] = ids[name]
            own.add(name)
        try:
            done = _wait(running, "kernels", environment, pause_s)
        except Failed as error:
            if error.name in own:
                left.insert(0, error.name)
            raise
        own.discard(done)
        _has_ended(done, running.pop(done), plan, environment, finished, paused)
    if paused:
        print(_how_to_continue(build, paused), flush=True)


def _look(need, name, ref, plan, environment, running, finished, paused):
    """See to a kernel that another needs and that is not pushed here. Raises RuntimeError where it has no output."""
    state = _state_of(ref, environment)
    if not state:
        raise RuntimeError(f"{name} reads the output of {need}, which Kaggle does not have: push that first")
    if state == "complete":
        _has_ended(need, ref, plan, environment, finished, paused)
    elif any(word in state for word in ("error", "cancel", "fail")):
        where = f"https://www.kaggle.com/code/{ref}"
        raise RuntimeError(f"{name} reads the output of {need}, whose last run ended with {state}: see {where}")
    else:
        print(f"{name} waits for {need}, which is {state} on Kaggle", flush=True)
        running[need] = ref


def _state_of(ref, environment):
    """State of a kernel's last run, "" where Kaggle has none. Raises RuntimeError where it does not say."""
    state, status, said = _ask("kernels", ref, environment)
    if status and not (_NOT_FOUND.search(said) or _FORBIDDEN.search(said)):
        raise _refusal("kaggle kernels status", status, said)
    return state


def _has_ended(name, ref, plan, environment, finished, paused):
    """Note whether a kernel that is complete finished its work or ran out of HOURS."""
    stage = plan["stages"].get(name, "")
    if name in plan["trainings"] and _is_paused(kaggle_files(ref, environment), stage):
        print(
            f"{name}: its HOURS were over before the training was; what comes after it goes on without it", flush=True
        )
        paused.append(name)
    else:
        print(f"{name}: complete", flush=True)
        finished.add(name)


def _how_to_continue(build, paused):
    return f"To continue {', '.join(paused)}: {_command(build, ['all'], paused)}"


def _why_not_continued(ref, stage, environment):
    """Why a training's last version cannot be continued, in words; empty where it can."""
    state = _state_of(ref, environment)
    if not state:
        return "Kaggle has no run of it, so there is nothing to continue: push it without CONTINUE"
    if state in ("queued", "running", "new_script"):
        return f"its last version is {state}: it can be continued when that has ended"
    files = kaggle_files(ref, environment)
    if _is_paused(files, stage):
        return ""
    if any(stage in Path(name).parts and Path(name).name == "manifest.json" for name in files):
        return "it has finished: there is nothing left to continue"
    return f"its last version ({state}) left nothing in {stage} to go on with: push it without CONTINUE"


def _values(folder):
    """The values of a staged notebook's parameters cell."""
    import nbformat

    notebook = nbformat.read(folder / _metadata(folder)["code_file"], as_version=4)
    return assigned_literals(next(c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", [])))


def _remember(build, name, plan, folder):
    """Keep in pushed.json how a kernel was pushed, for CONTINUE."""
    path = build / "pushed.json"
    known = read_json(path) if path.is_file() else {}
    about = {key: plan[key] for key in ("user", "folds", "members", "settings")}
    known[name] = {**about, "values": _values(folder), "pushed": time.strftime("%Y-%m-%dT%H:%M:%S")}
    write_json(path, known)


class Failed(RuntimeError):
    """A data set or kernel (`name`) failed on Kaggle."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


_PATIENCE = 30  # looks in a row at which Kaggle says nothing, before that is taken for an answer


def _wait(refs, kind, environment, pause_s):
    """Wait until the first of several data sets or kernels is ready; returns its name. refs: dict name -> owner/slug.

    The first look comes after a pause: right after an upload the state is still that of the version before.
    """
    silent = dict.fromkeys(refs, 0)
    while True:
        time.sleep(pause_s)
        for name, ref in refs.items():
            state = kaggle_status(kind, ref, environment)
            silent[name] = 0 if state else silent[name] + 1
            if state in ("complete", "ready"):
                return name
            if "error" in state or "cancel" in state or "fail" in state or silent[name] == _PATIENCE:
                where = f"https://www.kaggle.com/{'code' if kind == 'kernels' else 'datasets'}/{ref}"
                raise Failed(
                    name,
                    f"{name}: {state or 'no answer from Kaggle'}. What to do: read its log at {where}; when it is "
                    "mended, publish it again with what comes after it.",
                )
