"""Where inputs are mounted on Kaggle, and what is installed there.

May use: nothing of the kit.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KAGGLE_INPUT = "/kaggle/input"
KAGGLE_WORKING = "/kaggle/working"


# ---- Inputs: what a kernel finds where ----


def input_root() -> Path:
    """The folder in which inputs are mounted: /kaggle/input, or what KAGGLE_INPUT_DIR names, to try things out."""
    return Path(os.environ.get("KAGGLE_INPUT_DIR", KAGGLE_INPUT))


def find_input(name: str | Path, roots: str | Path | Iterable[str | Path] | None = None) -> Path:
    """Folder (or file) of an input, wherever this machine keeps it.

    Parameters
    ----------
    name : str or Path
        What the input is called: a path that exists or is meant below a root, the slug of a data set, competition or
        notebook output ("lumbar-spine-weights"), "owner/slug", or "model/framework/variation" for a Kaggle model (its
        newest version is taken).
    roots : path or iterable of path, optional
        Folders to look in, in this order; default input_root(). Known layouts below a root: <slug>,
        competitions/<slug>, datasets/<owner>/<slug>, notebooks/<owner>/<slug>,
        [models/<owner>/]<model>/<framework>/<variation>/<version>.

    Returns
    -------
    Path

    Raises
    ------
    FileNotFoundError
        There is no such input; the message has the places looked at and what is there instead.
    ValueError
        Several owners' inputs have the same slug.
    """
    roots = [input_root()] if roots is None else [roots] if isinstance(roots, (str, Path)) else roots
    name, places = str(name), [Path(root) for root in roots]
    if name and os.path.exists(name):
        return Path(name)
    if os.path.isabs(name) and not any(Path(name).is_relative_to(root) for root in (*places, Path(KAGGLE_INPUT))):
        raise FileNotFoundError(f"{name} does not exist: correct the path")
    for root in (*places, KAGGLE_INPUT):  # /kaggle/input/<slug> may be mounted as /kaggle/input/competitions/<slug>
        name = name.removeprefix(f"{root}/")
    name = name.strip("/")
    owner, _, slug = name.rpartition("/")
    looked = []
    for root in places:
        patterns = [name, f"competitions/{name}"]
        if name.count("/") == 2:
            patterns = [f"{name}/*", f"models/*/{name}/*"]
        elif name.count("/") == 1:
            patterns += [f"datasets/{owner}/{slug}", f"notebooks/{owner}/{slug}", slug]
        else:
            patterns += [f"datasets/*/{name}", f"notebooks/*/{name}"]
        for pattern in patterns:
            looked.append(str(root / pattern))
            found = sorted(root.glob(pattern)) if name and root.is_dir() else []
            if name.count("/") == 2:
                found = sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))[-1:]
            if len(found) > 1:
                raise ValueError(f"several inputs are called {name}: {', '.join(map(str, found))}; say owner/{name}")
            if found:
                return found[0]
    raise FileNotFoundError(
        f"input {name!r} was not found. Looked at: {', '.join(looked)}. "
        f"There is: {', '.join(_attached(places)) or 'nothing'}. "
        "On Kaggle add it under 'Add input' (or in kernel-metadata.json), elsewhere give its path."
    )


def _attached(roots):
    """The inputs below the roots, at most 30, as text."""
    return [
        str(path.relative_to(root))
        for root in roots
        if root.is_dir()
        for depth in ("*", "competitions/*", "datasets/*/*", "notebooks/*/*")
        for path in sorted(root.glob(depth))
    ][:30]


# Folders of many files, below which nothing is looked for: the mounts are network drives.
_CROWDED = {"train_images", "test_images", "volumes", "crops", "yolo", "studies", "images", "labels"}


def _folders(root, depth=5):
    """The folders below root, nearest first, without those of images, caches and results moved aside."""
    level = [Path(root)] if Path(root).is_dir() else []
    for _ in range(depth):
        level = [
            folder
            for parent in level
            for folder in sorted(parent.iterdir())
            if folder.is_dir() and folder.name not in _CROWDED and ".old-" not in folder.name
        ]
        yield from level


def attached_stages(root: str | Path | None = None) -> dict[str, Path]:
    """dict stage name -> folder, of all finished stages below the root (default input_root()).

    Outputs of several kernels each bring some; of two with the same name the first found counts, and it is said.
    """
    found: dict[str, Path] = {}
    for folder in _folders(root or input_root()):
        if re.match(r"\d\d_\w+$", folder.name) and (folder / "manifest.json").is_file():
            if folder.name in found:
                print(f"{folder.name} is attached twice: {found[folder.name]} is taken, {folder} is not")
            found.setdefault(folder.name, folder)
    return dict(sorted(found.items()))


def unfinished_stages(name: str, root: str | Path | None = None) -> list[Path]:
    """The folders of a stage below the root (default input_root()) that were begun and not finished."""
    found = [folder for folder in _folders(root or input_root()) if folder.name == name]
    return [f for f in found if (f / "begun.json").is_file() and not (f / "manifest.json").is_file()]


def gather_stages(stages: Mapping[str, Path]) -> Path:
    """One folder with links to the folders of stages, as a run has them side by side. Returns it.

    stages: dict name -> folder, as attached_stages returns it. The folder lies with the temporary files.
    """
    known = hashlib.sha256(json.dumps({k: str(v) for k, v in stages.items()}).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"lumbar_run_{known}"
    folder.mkdir(exist_ok=True)
    for name, stage in stages.items():
        if not (folder / name).exists():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(Path(stage).resolve(), target_is_directory=True)
    return folder


def find_inputs(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Where this machine has what a notebook's parameters call /kaggle/input/...: dict name -> value.

    parameters: dict, as notebook_parameters returns it. Only texts, and lists of texts, that begin with /kaggle/input
    are looked at:
      /kaggle/input/<slug>[/...]: the input of that slug in whichever layout (see find_input), else, where the last
        part names a stage (01_preprocess), that stage from whichever input has it;
      RUN = "/kaggle/input": one folder with all stages of all inputs (see gather_stages);
      PREDICTIONS = ["/kaggle/input"]: the folders of all stages.
    What is not found keeps its value, for the notebook to complain of, and what there is is printed.
    """

    def locate(name, text):
        root, path = input_root(), Path(text)
        if path == Path(KAGGLE_INPUT):
            if name == "RUN" and (stages := attached_stages()):
                return [str(gather_stages(stages))]
            return list(map(str, attached_stages().values())) if name == "PREDICTIONS" else [str(root)]
        slug, *rest = path.relative_to(KAGGLE_INPUT).parts
        candidates = [path, root / path.relative_to(KAGGLE_INPUT)]
        try:
            candidates.append(find_input(slug).joinpath(*rest))
        except (FileNotFoundError, ValueError):
            pass
        if place := next((place for place in candidates if place.exists()), attached_stages().get(path.name)):
            return [str(place)]
        print(f"{name}: {text} is not there; attached are {', '.join(_attached([root])) or 'no inputs'}")
        return [text]

    found = {}
    for name, value in parameters.items():
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and Path(text).is_relative_to(KAGGLE_INPUT) for text in texts):
            located = [
                place
                for text in texts
                for place in (locate(name, text) if Path(text).is_relative_to(KAGGLE_INPUT) else [text])
            ]
            found[name] = located if isinstance(value, list) else located[0]
    return found


# What the kit imports and not every machine has: module -> package. All but KAGGLE_HAS is missing in Kaggle's image.
NEEDED = {
    "timm_3d": "timm-3d",
    "spacecutter": "spacecutter",
    "ultralytics": "ultralytics-opencv-headless",
    "accelerate": "accelerate",
    "pydicom": "pydicom",
}
KAGGLE_HAS = ("pydicom",)


def install_missing(needed: Mapping[str, str] = NEEDED, root: str | Path | None = None) -> list[str]:
    """Install the packages that are not there from wheels in an attached data set, without network.

    needed: module -> package; root: where data sets are mounted, default input_root(). Does nothing where all modules
    are found. The image's own torch, numpy and pandas stay: dependencies are not touched. Returns the packages
    installed. Raises ModuleNotFoundError, saying what to do, where a package is missing and no wheel of it is attached.
    """
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return []
    folders = [folder for folder in _folders(root or input_root()) if any(folder.glob("*.whl"))]
    links = [argument for folder in folders for argument in ("--find-links", str(folder))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *links, *missing]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) if folders else None
    if done is None or done.returncode:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} not installed: on Kaggle attach the data set of wheels that notebooks/publish.ipynb "
            f"makes, elsewhere run `pip install -r requirements.txt`. {done.stdout.strip() if done else ''}".strip()
        )
    importlib.invalidate_caches()
    return missing
