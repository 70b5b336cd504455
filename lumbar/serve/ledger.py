"""What a run knows of each of its studies: results of earlier starts, each in a file, and those that come.

May use: results, in_flight, problems.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from ..in_flight import images_digest
from ..problems import Kind, Problem
from .results import Result, load_result, save_result

# What went wrong in one of these ways may go well another time, so a result with it is not kept in a file.
_BY_CHANCE = {Kind.MEMORY, Kind.TIME, Kind.DEVICE}


def by_chance(problems: Iterable[Problem]) -> bool:
    """Whether one of the problems may be gone another time, with the same images and weights."""
    return any(problem.kind in _BY_CHANCE for problem in problems)


class Ledger:
    """The results of a run's studies.

    Results of an earlier start stand if they are whole, of the same weights and of the same files.

    Parameters
    ----------
    folder : Path
        Where each finished study has its file, `<study_id>.json`.
    images : Path
        Where each study has its folder.
    study_ids : iterable of int
    key : str
        Of what results depend on besides the study's files, see results_key.
    members : collection of str
        Names of the members that a result has predictions of, see load_result.

    Attributes
    ----------
    results : dict
        study_id -> Result, None as long as there is none.
    """

    def __init__(
        self, folder: Path, images: Path, study_ids: Iterable[int], key: str, members: Collection[str]
    ) -> None:
        self.folder, self.images, self.key = folder, images, key
        self._digests: dict[int, str] = {}
        self.results: dict[int, Result | None] = {
            study_id: load_result(self.path(study_id), study_id, self.key_of, members) for study_id in study_ids
        }

    def path(self, study_id: int) -> Path:
        """The study's file."""
        return self.folder / f"{study_id}.json"

    def key_of(self, study_id: int) -> str:
        """What the study's result depends on. The first call looks at its files; changes after that do not count."""
        if study_id not in self._digests:
            self._digests[study_id] = images_digest(self.images / str(study_id))
        return f"{self.key} {self._digests[study_id]}"

    def files_of(self, study_id: int) -> str:
        """images_digest of the study, "" where its files have not been looked at: that may be what hangs."""
        return self._digests.get(study_id, "")

    def is_finished(self, study_id: int) -> bool:
        """Whether there is a result from which nothing was dropped for want of time."""
        result = self.results.get(study_id)
        return result is not None and not result["dropped"]

    def missing(self) -> list[int]:
        """Studies without a result."""
        return [study_id for study_id, result in self.results.items() if result is None]

    def short(self) -> list[int]:
        """Studies with a result from which something was dropped for want of time."""
        return [study_id for study_id, result in self.results.items() if result and result["dropped"]]

    def entries(self) -> dict[int, Result]:
        """All results, in the order of the studies. Raises ValueError while some are missing."""
        if missing := self.missing():
            raise ValueError(f"studies without a result: {missing}")
        return {study_id: result for study_id, result in self.results.items() if result is not None}

    def keep(self, study_id: int, result: Result, sound: bool) -> None:
        """Enter a result. One that is not sound (it may be better another time) goes into no file, and does not take
        the place of an earlier one."""
        if sound or self.results[study_id] is None:
            self.results[study_id] = save_result(self.path(study_id) if sound else None, result)

    def pass_over(self, study_id: int, why: str) -> None:
        """Enter that a study is not looked at; an earlier result of fewer views or members stands, if there is any."""
        self.results[study_id] = self._without_a_look(self.results[study_id], study_id, why)

    def give_up(self, study_id: int, why: str) -> None:
        """Enter that a study was tried in vain; an earlier result stands as it is."""
        self.keep(study_id, self._without_a_look(None, study_id, why), False)

    def leave(self, study_id: int, why: str, dropped: list[str]) -> None:
        """Enter that there was no time for a study. Not in a file: a restart in a new session has time for it."""
        problems = [Problem(Kind.TIME, why).to_dict()]
        self.results[study_id] = {"predictions": {}, "levels": [], "problems": problems, "dropped": dropped}

    def _without_a_look(self, earlier: Result | None, study_id: int, why: str) -> Result:
        result = earlier or {"predictions": {}, "levels": [], "problems": []}
        why = why if earlier else f"{why}; every row is the prior"
        problems = [*result["problems"], Problem(Kind.PASSED_OVER, why).to_dict()]
        return result | {"problems": problems, "dropped": [], "files": self.files_of(study_id)}
