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
    - all but the first of one fold, in the order of the folders; one that the member cannot use comes last, and where
      it is all there is loading it says what is wrong.

    Parameters
    ----------
    folders : paths
        Looked at themselves and one folder below, as the outputs of several Kaggle kernels lie side by side.

    Returns
    -------
    tuple
        dict name (such as yolo_scs_0, in order) -> path, and sentences about what is left out, and why.
    """
    found: dict[Path, tuple[Path, Member]] = {}
    chosen: dict[str, Path] = {}
    left_out: dict[tuple[str, Path], list[str]] = {}
    for folder in map(Path, folders):
        for path in sorted({*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")}):
            member = member_of(path.stem)
            if member and not any(".old-" in part for part in path.parts):
                found.setdefault(path.resolve(), (path, member))
    kinds = {path: _kind_of_weights(path, member) for path, member in found.values()}
    for path in sorted(kinds, key=lambda path: kinds[path] == "unusable"):
        if kinds[path] == "unfinished":
            left_out.setdefault(("training has not finished", path.parent), []).append(path.stem)
        elif chosen.setdefault(path.stem, path) != path:
            left_out.setdefault((f"already found in {chosen[path.stem].parent}", path.parent), []).append(path.stem)
    sentences = [f"{', '.join(names)} in {folder} left out: {why}" for (why, folder), names in left_out.items()]
    return dict(sorted(chosen.items())), sentences


def by_member(chosen: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """member_weights' files by member, in the registry's order: dict member's name -> dict name -> path."""
    owners = {name: member_of(name) for name in chosen}
    found = {m: {name: path for name, path in chosen.items() if owners[name] is MEMBERS[m]} for m in MEMBERS}
    return {member: paths for member, paths in found.items() if paths}


def _kind_of_weights(path: Path, member: Member) -> str:
    """finished, unfinished or unusable, see member_weights."""
    try:
        about = member.read_about(path)
    except (OSError, DamagedFile):
        return "unusable"
    finished = member.is_finished(about) and not path.with_suffix(".checkpoint").is_file()
    return "finished" if finished else "unfinished"
