"""Kaggle: where inputs are mounted, pushing kernels."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KAGGLE_OWNER_PLACEHOLDER = "your-kaggle-user"


def find_input(name, roots=("/kaggle/input",)):
    """Folder (or file) of an input, wherever this machine keeps it.

    name: what the input is called: a path that exists or is meant below a root, the slug of a data set, competition
        or notebook output ("lumbar-spine-weights"), "owner/slug", or "model/framework/variation" for a Kaggle model
        (its newest version is taken).
    roots: folders to look in, in this order: Kaggle's mount point and, for local runs, your data folders. Known
        layouts below a root: <slug>, competitions/<slug>, datasets/<owner>/<slug>, notebooks/<owner>/<slug>,
        [models/<owner>/]<model>/<framework>/<variation>/<version>.
    Returns a Path. Raises FileNotFoundError with the places looked at and what is there instead, ValueError where
    several owners' inputs have the same slug.
    """
    name, roots = str(name), [Path(root) for root in ([roots] if isinstance(roots, (str, Path)) else roots)]
    if name and os.path.exists(name):
        return Path(name)
    for root in roots:  # /kaggle/input/<slug> where this machine mounts it as /kaggle/input/competitions/<slug>
        name = name.removeprefix(f"{root}/")
    name = name.strip("/")
    owner, _, slug = name.rpartition("/")
    looked = []
    for root in roots:
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
    there = [
        str(path.relative_to(root))
        for root in roots
        if root.is_dir()
        for depth in ("*", "competitions/*", "datasets/*/*", "notebooks/*/*")
        for path in sorted(root.glob(depth))
    ]
    raise FileNotFoundError(
        f"input {name!r} was not found. Looked at: {', '.join(looked)}. "
        f"There is: {', '.join(there[:30]) or 'nothing'}. "
        "On Kaggle add it under 'Add input' (or in kernel-metadata.json), elsewhere give its path."
    )


def kaggle_push(folder, owner=None, environment=None):
    """Send the notebook that folder/kernel-metadata.json names to Kaggle with the `kaggle` client.

    folder: folder of kernel-metadata.json; code_file is relative to it.
    owner: your Kaggle user name; it replaces the placeholder `your-kaggle-user` in a temporary copy of the metadata.
    environment: environment of the client (default: this process's), with KAGGLE_USERNAME and KAGGLE_KEY or
        a ~/.kaggle/kaggle.json.
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
        run = subprocess.run(
            [sys.executable, "-m", "kaggle", "kernels", "push", "-p", staged],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    if (
        run.returncode
        or re.search(r"\berror\b|are not valid|does not resolve", run.stdout, re.IGNORECASE)
        or "successfully pushed" not in run.stdout
    ):
        raise RuntimeError(f"kaggle kernels push failed (exit status {run.returncode}): {run.stdout.strip()}")
    return run.stdout.strip()


# What the kit imports and Kaggle's image lacks: module -> package.
NEEDED = {"timm_3d": "timm-3d", "ultralytics": "ultralytics-opencv-headless", "pydicom": "pydicom"}


def install_missing(needed=NEEDED, root="/kaggle/input"):
    """Install the packages that are not there from wheels in an attached data set, without network.

    needed: module -> package; root: where data sets are mounted. Does nothing where all modules are found. The
    image's own torch, numpy and pandas stay: dependencies are not touched. Returns the packages installed.
    Raises ModuleNotFoundError, saying what to do, where a package is missing and no wheel of it is attached.
    """
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return []
    folders = sorted({path.parent for depth in ("*", "*/*", "*/*/*") for path in Path(root).glob(f"{depth}/*.whl")})
    links = [argument for folder in folders for argument in ("--find-links", str(folder))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *links, *missing]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) if folders else None
    if done is None or done.returncode:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} not installed: on Kaggle attach a data set of their wheels, elsewhere run "
            f"`pip install -r requirements.txt`. {done.stdout.strip() if done else ''}".strip()
        )
    importlib.invalidate_caches()
    return missing
