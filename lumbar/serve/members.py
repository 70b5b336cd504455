"""What folders of weights hold: loaded members, and their out-of-fold predictions.

May use: grade, spine, problems, names.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..grade.member import Weights
from ..grade.registry import MEMBERS, by_member, member_weights
from ..grade.tables import OOF, has_own_weights, is_bare, read_out_of_fold
from ..names import CONDITIONS, LEVELS, SEVERITIES, SUBMISSION_COLUMNS, device_for
from ..problems import Kind, Problem
from ..spine.official import check_official
from ..spine.placement import Placement
from ..spine.spinenet import SpineNet, load_spinenet


@dataclass
class Members:
    """Everything that inference needs, loaded from folders of weights."""

    placement: Placement  # of the levels
    weights: dict[str, list[Weights]]  # member's name -> its weights, of those members that have any
    prior: np.ndarray  # (5, 5, 3), the training set's weighted class prior
    device: str = "cpu"  # where the networks are
    notes: tuple[Problem, ...] = ()  # what is not as it was in the training, of every study

    def abouts(self) -> dict[str, list]:
        """dict member's name -> what its weights files say of themselves."""
        return {member: [own.about for own in weights] for member, weights in self.weights.items()}


def find_weights(folders: Iterable[str | Path], pattern: str) -> list[Path]:
    """Files of that name in the folders or one folder below, by name; of two with one name the first found."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted({*Path(folder).glob(pattern), *Path(folder).glob("*/" + pattern)}):
            if not any(".old-" in part for part in path.parts):
                found.setdefault(path.name, path)
    return [found[name] for name in sorted(found)]


def load_members(folders: Sequence[str | Path], members: Collection[str] = (), device: str | int = "auto") -> Members:
    """Load every member's weights found in the folders, or one folder below.

    Which file stands for a fold, and which are left out: see member_weights. Prints both.

    Parameters
    ----------
    folders : sequence of path
    members : collection of str
        Names, empty for all in the registry.
    device : str or int
        As device_for takes it.

    Returns
    -------
    Members
        Its prior is the mean of those that the weights carry, NaN where none does.

    Raises
    ------
    FileNotFoundError
        No SpineNet, or no member: a submission made of nothing but a prior would look like a result.
    ValueError
        There is no such member, a file is damaged (DamagedFile), the SpineNet carries no prior, or this machine does
        not have the device.
    """
    device = device_for(device)
    if unknown := [name for name in members or () if name not in MEMBERS]:
        raise ValueError(f"MEMBERS: there is no member {', '.join(unknown)}; there are {', '.join(MEMBERS)}")
    places = ", ".join(map(str, folders))
    spinenet = find_weights(folders, "spinenet.safetensors")
    if not spinenet:
        raise FileNotFoundError(f"no spinenet.safetensors in {places}: attach 02_train_spinenet's output")
    chosen, sentences = member_weights(folders)
    wanted = {m: paths for m, paths in by_member(chosen).items() if not members or m in members}
    files = {name: path for paths in wanted.values() for name, path in paths.items()}
    print(*sentences, *_where(files | {"spinenet": spinenet[0]}), sep="\n")
    if not wanted:
        raise FileNotFoundError(f"no finished member's weights in {places}: attach the outputs of 03 and 04")
    weights = {m: [MEMBERS[m].load(path, device) for path in paths.values()] for m, paths in wanted.items()}
    stated = [own.about.get("prior") for known in weights.values() for own in known]
    priors = [np.asarray(prior, np.float64) for prior in stated if prior is not None]
    model = load_spinenet(spinenet[0], device)
    placement, notes = _placement(model, spinenet[0])
    return Members(
        placement,
        weights,
        np.mean(priors, 0) if priors else np.full((len(CONDITIONS), len(LEVELS), len(SEVERITIES)), np.nan),
        device,
        notes,
    )


def _placement(model: SpineNet, path: Path) -> tuple[Placement, tuple[Problem, ...]]:
    """How levels are placed with a SpineNet's weights, and what every study's log has to say of that.

    Boxes come from the detector that made those of the training; where that is the official package and it cannot be
    loaded or does not run here, from the kit's own.
    """
    notes: tuple[Problem, ...] = ()
    try:
        if model.about.get("detector") == "official":
            try:
                placement = Placement.of(model, "official")
                check_official(placement.detector)
                return placement, notes
            except Exception as error:  # whatever a package of other versions' Python and torch raises
                if model.about.get("prior") is None:
                    raise
                text = f"levels: by the kit's own detector, not the official one ({type(error).__name__}: {error})"
                notes = (Problem(Kind.LEVELS, text),)
                print(text)
        return Placement.of(model), notes
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _where(chosen: Mapping[str, Path]) -> list[str]:
    """Lines that say which weights are from which folder."""
    folders: dict[Path, list[str]] = {}
    for name, path in chosen.items():
        folders.setdefault(path.parent, []).append(name)
    return [f"{', '.join(names)} from {folder}" for folder, names in folders.items()]


def weight_folders(places: Sequence[str | Path]) -> list[Path]:
    """Folders with trained weights in or below the given ones, in the order found.

    Image folders and finished stages' caches are not searched: /kaggle/input may hold 150,000 files.

    Parameters
    ----------
    places : sequence of path
        Searched down to six folders below.

    Returns
    -------
    list of Path

    Raises
    ------
    FileNotFoundError
        There is none; the message names the places.
    """
    found = _folders_with(places, _has_weights)
    if not found:
        raise FileNotFoundError(
            f"no *.safetensors in or below {', '.join(map(str, places))}: attach the outputs of 02, 03 and 04"
        )
    return found


def prediction_places(places: Sequence[str | Path]) -> list[Path]:
    """What has out-of-fold predictions: folders with weights or another network's oof.csv, and tables themselves.

    Parameters
    ----------
    places : sequence of path
        Folders, searched as weight_folders does, and tables. A stage's folder without weights, such as 05_inference's,
        has the predictions of others and does not count; a stage's own oof.csv stands for its folder.

    Returns
    -------
    list of Path
        Each once.

    Raises
    ------
    FileNotFoundError
        A folder has neither, see weight_folders.
    """
    found: dict[Path, Path] = {}
    for place in map(Path, places):
        if place.is_file():
            here = [place.parent if place.name == OOF and has_own_weights(place.parent) else place]
        else:
            here = _folders_with([place], lambda files: _has_weights(files) or is_bare(files))
        if not here:
            raise FileNotFoundError(
                f"no *.safetensors in or below {place}, nor another network's {OOF} (a table of another name is named "
                "itself, not its folder)"
            )
        for path in here:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _has_weights(files):
    return any(name.endswith(".safetensors") for name in files)


def _folders_with(places, wanted):
    """Folders in or below `places`, in the order found, for whose files' names wanted(names) is true."""
    skipped = {"train_images", "test_images", "volumes", "crops", "yolo", "images", "labels", "studies"}
    found = []
    for place in places:
        for folder, below, files in os.walk(place):
            depth = len(Path(folder).relative_to(place).parts)
            below[:] = (
                sorted(b for b in below if b not in skipped and ".old-" not in b and not b.startswith("."))
                if depth < 6
                else []
            )
            if wanted(files):
                found.append(Path(folder))
    return found


def out_of_fold_table(folders: Sequence[str | Path]) -> pd.DataFrame:
    """All members' out-of-fold predictions that lie with the weights, as one table.

    Parameters
    ----------
    folders : sequence of path
        As weight_folders finds them.

    Returns
    -------
    DataFrame
        row_id, the three severities, fold, member. Without any predictions it is empty.
    """
    columns = [*SUBMISSION_COLUMNS, "fold", "member"]
    tables = [table.assign(member=member) for member, table in read_out_of_fold(folders, verbose=False).items()]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns) if tables else pd.DataFrame(columns=columns)
