"""A run's folder, or any folder of DICOM files, to look at: as an Inspection, as pages, as files for 3D Slicer.

May use: inspection, markups, slices, serve, data, storage, names.
"""

import html
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ..data.geometry import boxes_from_table
from ..names import CONDITIONS, progress
from ..serve.folder import find_studies, lay_out
from ..serve.predict_folder import locate_folder, placement_of
from ..storage import read_json, write_text
from .inspection import Inspection, read_inspection
from .markups import write_markups
from .slices import CONDITION_NAMES, level_name

_PAGE = """<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>
<meta name=color-scheme content='light dark'><title>Lumbar spine studies</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}
td,th{text-align:left;padding:.4rem .8rem;border-bottom:1px solid #8886;vertical-align:top}
</style></head><body><main><h1>Lumbar spine studies</h1><p>Research software, not a medical device.
studies.csv says which folder each study is.{note}</p><table><thead><tr>
<th scope=col>study<th scope=col>series used<th scope=col>levels<th scope=col>most severe<th scope=col>problems
</tr></thead><tbody>{rows}</tbody></table></main>
</body></html>
"""


def open_folder(
    folder: str | Path, out: str | Path, member: str = "level", workers: int = 2, verbose: bool = True
) -> Inspection:
    """What there is to look at in a folder.

    Parameters
    ----------
    folder : path
        A run's folder, the output of `predict` or of `inspect`, or any folder or zip of DICOM files: then its studies
        are laid out, read and located in `out` first, with the weights that come with the kit.
    out : path
        A folder of its own for that.
    member : str
        Whose predictions rank the errors, see read_inspection.
    workers : int
        Threads.
    verbose : bool
        Print what is not there.

    Raises
    ------
    FileNotFoundError, ValueError
        As find_studies, lay_out and read_inspection do.
    """
    folder = Path(folder)
    if not (folder / "01_preprocess").is_dir():
        lay_out(find_studies(folder, out), out)
        locate_folder(out, placement_of(None), workers)
        folder = Path(out)
    levels = folder / "02_train_spinenet"
    return read_inspection(
        _data_of(folder),
        folder / "01_preprocess",
        levels if levels.is_dir() else folder,
        [folder],
        folder / "05_inference",
        member,
        verbose,
    )


def _data_of(folder: Path) -> Path:
    """The competition folder that a run's folder was made from."""
    manifest = folder / "01_preprocess" / "manifest.json"
    if not (folder / "data").is_dir() and manifest.is_file():
        stated = read_json(manifest).get("parameters", {}).get("DATA", "")
        if stated and Path(stated).is_dir():
            return Path(stated)
    return folder / "data"


def write_pages(out: str | Path, log: pd.DataFrame) -> list[Path]:
    """Write a page for each study of a folder that locate_folder (and grade_folder) went through: out/study_<id>.html,
    out/index.html with all of them, and out/slicer/<id>/ with the levels for 3D Slicer.

    A study without a readable image has no page. Pages name no folder: that may be a patient's name.

    Parameters
    ----------
    out : path
        That folder.
    log : DataFrame
        Of folder_log.

    Returns
    -------
    list of Path
        The pages, the index first.
    """
    out = Path(out)
    inspection = open_folder(out, out, verbose=False)
    levels = inspection.levels if inspection.levels is not None else pd.DataFrame(columns=["study_id"])
    pages = {}
    for study_id in progress([i for i in log["study_id"] if (levels["study_id"] == i).any()], "writing pages"):
        page, _ = inspection.study_html(study_id, page=True)
        pages[study_id] = write_text(out / f"study_{study_id}.html", page)
        write_markups(boxes_from_table(levels, study_id), out / "slicer" / str(study_id))
    text = index_html(log, pages, _most_severe(out / "probabilities.csv"))
    return [write_text(out / "index.html", text), *pages.values()]


def index_html(log: pd.DataFrame, pages: Mapping[int, Path], worst: Mapping[int, str]) -> str:
    """The page that lists all studies. log: of folder_log; pages: study_id -> its page; worst: -> its worst finding."""
    note = "" if worst else " Nothing was graded: that takes trained weights."
    rows = "".join(_row(row, pages, worst) for row in log.to_dict("records"))
    return _PAGE.replace("{note}", note).replace("{rows}", rows)


def _most_severe(path: Path) -> dict[int, str]:
    """dict study_id -> the finding that is most likely severe, in words; empty where nothing was graded."""
    if not path.is_file():
        return {}
    table = pd.read_csv(path)
    table = table[~table["prior"].astype(bool)].sort_values("severe", ascending=False).drop_duplicates("study_id")
    names = dict(zip(CONDITIONS, CONDITION_NAMES, strict=True))
    return {
        row.study_id: f"{level_name(row.level)} {names[row.condition]}, severe {row.severe:.0%}"
        for row in table.itertuples()
    }


def _row(row: dict, pages: Mapping[int, Path], worst: Mapping[int, str]) -> str:
    page = pages.get(row["study_id"])
    name = f"<a href='{page.name}'>{row['study_id']}</a>" if page else str(row["study_id"])
    levels = "guessed" if "levels are guessed" in str(row["problems"]) else "found" if page else "none"
    if row["second_share"]:
        doubt = "numbering in doubt" if "uncertain" in str(row.get("levels", "")) else "a second numbering"
        levels += f", {doubt} ({row['second_share']:.0%} for another)"
    texts = (row["series"], levels, worst.get(row["study_id"], ""), row["problems"])
    return f"<tr><td>{name}" + "".join(f"<td>{html.escape(str(text))}" for text in texts) + "</tr>"
