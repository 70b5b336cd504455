"""The members of the ensemble: their names and shares.

May use: data, storage, names.
"""

import re
from pathlib import Path

from ..storage import DamagedFile, open_tensors

MEMBERS = ("yolo", "level", "study")


def member_weights(folders):
    """Which file stands for each fold of each member's weights: (dict name -> path, list of sentences).

    folders: looked at themselves and one folder below, as the outputs of several Kaggle kernels lie side by side; the
    names are the files', such as yolo_scs_0 and level_3, in order. The sentences say what is left out, and why:
    - unfinished weights: a classifier beside its checkpoint, where 04 writes each better epoch, and a detector that 03
      has not calibrated yet;
    - those trained for comparison, as other solutions have them (detectors of the scheme "original", classifiers with
      global pooling), where there are any of the kit's own of that detector or classifier. Attached alone they stand.
    - all but the first of one fold, in the order of the folders; one that cannot be read comes last, and where it is
      all there is loading it says what is wrong.
    """
    found, left_out = {}, {}
    for folder in map(Path, folders):
        for path in sorted({*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")}):
            name = re.fullmatch(r"(yolo_[a-z]+|level|study)_.+", path.stem)
            below = path.relative_to(folder).parts
            if name and "solutions" not in below and not any(".old-" in part for part in path.parts):
                found.setdefault(name[1], {}).setdefault(path.resolve(), path)
    chosen = {}
    for part, paths in found.items():
        kinds = {path: _kind_of_weights(path) for path in paths.values()}
        wanted = "comparison" if "comparison" in kinds.values() and "own" not in kinds.values() else "own"
        for path in sorted(kinds, key=lambda path: kinds[path] == "unreadable"):
            if kinds[path] not in (wanted, "unreadable"):
                left_out.setdefault((kinds[path], path.parent), []).append(path.stem)
            elif chosen.setdefault(path.stem, path) != path:
                left_out.setdefault((f"already found in {chosen[path.stem].parent}", path.parent), []).append(path.stem)
    why = {"comparison": "trained for comparison, the kit's own stand", "unfinished": "training has not finished"}
    sentences = [
        f"{', '.join(names)} in {folder} left out: {why.get(kind, kind)}" for (kind, folder), names in left_out.items()
    ]
    return dict(sorted(chosen.items())), sentences


def _kind_of_weights(path):
    """own, comparison, unfinished or unreadable, see member_weights."""
    key = "metadata" if path.stem.startswith("yolo") else "classifier"
    try:
        with open_tensors(path, key, "") as (about, _):
            pass
    except (OSError, DamagedFile):
        return "unreadable"
    comparison = about.get("scheme") == "original" or about.get("pooling") == "global"
    uncalibrated = path.stem.startswith("yolo") and not comparison and about.get("calibration") is None
    if uncalibrated or path.with_suffix(".checkpoint").is_file():
        return "unfinished"
    return "comparison" if comparison else "own"
