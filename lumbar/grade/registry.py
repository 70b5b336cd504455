"""The registry of members, and which weights files stand for them.

May use: storage, crop_members, detector_member, member, slices.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..storage import DamagedFile
from .crop_members import LevelCrops, WholeStudy
from .detector_member import Detectors
from .member import Member
from .slices import Slices

# name -> Member, in the order of tables and figures. A new member is one more line here.
MEMBERS: dict[str, Member] = {
    member.name: member
    for member in (
        Detectors(),
        Slices(),
        LevelCrops(),
        WholeStudy(),
    )
}


def member_of(stem: str) -> Member | None:
    """The member that a weights file of this name (without its ending) is of; None for other files."""
    part, _, fold = stem.rpartition("_")
    return next((member for member in MEMBERS.values() if part in member.parts), None) if fold else None


def member_weights(folders: Iterable[str | Path]) -> tuple[dict[str, Path], list[str]]:
    """Which file stands for each fold of each member's weights.

    - unfinished weights are left out: beside a checkpoint, where a training writes each better epoch, and those that
      the member says are not settled yet, such as a detector that 03 has not calibrated;
    - those trained for comparison, as other solutions have them, where there are any of the kit's own of that part of
      the member. Attached alone they stand;
    - all but the first of one fold, in the order of the folders; one that cannot be read comes last, and where it is
      all there is loading it says what is wrong.

    Parameters
    ----------
    folders : paths
        Looked at themselves and one folder below, as the outputs of several Kaggle kernels lie side by side.

    Returns
    -------
    tuple
        dict name (such as yolo_scs_0, in order) -> path, and sentences about what is left out, and why.
    """
    found, left_out = {}, {}
    for folder in map(Path, folders):
        for path in sorted({*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")}):
            below = path.relative_to(folder).parts
            if member_of(path.stem) and "solutions" not in below and not any(".old-" in part for part in path.parts):
                found.setdefault(path.stem.rpartition("_")[0], {}).setdefault(path.resolve(), path)
    chosen = {}
    for paths in found.values():
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


def by_member(chosen: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """member_weights' files by member, in the registry's order: dict member's name -> dict name -> path."""
    owners = {name: member_of(name) for name in chosen}
    found = {m: {name: path for name, path in chosen.items() if owners[name] is MEMBERS[m]} for m in MEMBERS}
    return {member: paths for member, paths in found.items() if paths}


def _kind_of_weights(path: Path) -> str:
    """own, comparison, unfinished or unreadable, see member_weights."""
    member = member_of(path.stem)
    try:
        about = member.read_about(path)
    except (OSError, DamagedFile):
        return "unreadable"
    if not member.is_finished(about) or path.with_suffix(".checkpoint").is_file():
        return "unfinished"
    return "comparison" if member.is_for_comparison(about) else "own"
