"""The competition's tables, one reader each: a bad row is named and left out, an unusable file is an error.

Tables come out of spreadsheets, joins and interrupted downloads. An invalid row costs only itself; a file without a
valid one is an error. All readers take commas, semicolons or tabs between the cells, CRLF, a byte order mark, ids
written as 123.0 and decimal commas, and return whole numbers as int64.

May use: storage, names.
"""

import csv
import difflib
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ..names import CONDITIONS, DESCRIPTIONS, GRADES, LABEL_COLUMNS, LEVELS
from ..storage import kind_of_file

MAX_NAMED = 5  # so many bad rows are named in one sentence, the others counted
_WHOLE = re.compile(r"([0-9]{1,18})(\.0+)?")
_DECIMAL = re.compile(r"^(-?[0-9]+),([0-9]+)$")
_EMPTY = ("", "nan", "na", "n/a", "#n/a", "<na>", "null", "none")  # what spreadsheets and libraries write for no value


def whole_number(value: Any) -> int | None:
    """An id or a count as int, None where it is none.

    One empty cell makes floats of a table's ids, so 123.0 counts as 123.

    >>> whole_number("123.0"), whole_number(7), whole_number("seven")
    (123, 7, None)
    """
    found = _WHOLE.fullmatch(str(value).strip())
    return int(found[1]) if found else None


def some_of(items: Iterable, most: int = MAX_NAMED, between: str = ", ") -> str:
    """Items as text, the first few by name and the others by number.

    >>> some_of([7, 8, 9, 10], most=2)
    '7, 8 and 2 more'
    """
    items = [str(item) for item in items]
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + rest


def read_labels(path: str | Path) -> pd.DataFrame:
    """Read grades in train.csv's wide form.

    A column that is absent (a table of fewer conditions) becomes missing labels. So does a cell with anything but a
    grade. Both are named and printed.

    Parameters
    ----------
    path : str or Path
        Of the CSV file.

    Returns
    -------
    DataFrame
        study_id (int64) and the 25 LABEL_COLUMNS: strings of GRADES, missing where there is none.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The table has no labels, a column has values but no grade, or a label column is absent and another has its name
        in other letters.
    """
    present: set[str] = set()
    odd: dict[str, list[str]] = {}
    graded = dict.fromkeys(LABEL_COLUMNS, 0)

    def parse(cells, line):
        present.update(cells)
        study_id, grades = _id(cells, "study_id"), []
        for column in LABEL_COLUMNS:
            value = cells.get(column, "")
            if value and value not in GRADES:
                odd.setdefault(column, []).append(f"line {line}: {column} is {_shown(value)}")
            graded[column] += value in GRADES
            grades.append(value if value in GRADES else None)
        return study_id, *grades

    rows = _read_rows(path, ["study_id"], parse, 1)
    known = f"the grades are {', '.join(GRADES)}"
    absent = [column for column in LABEL_COLUMNS if column not in present]
    if meant := _misspelt(sorted(present - {"study_id", *LABEL_COLUMNS}), absent):
        pairs = some_of((f"{_shown(name)} instead of {column}" for name, column in meant.items()), between="; ")
        raise ValueError(f"{path} has columns {pairs}: rename them, or take out those that are something else")
    if not rows or not present & set(LABEL_COLUMNS):
        raise ValueError(f"{path} has no {'label columns' if rows else 'rows below its header'}: {_ADVICE}")
    if not any(graded.values()):
        raise ValueError(f"{path}: no cell of it is a grade; {known}: {_ADVICE}")
    for column, cells in odd.items():
        if not graded[column] and len(cells) > 1:
            raise ValueError(f"{path}: no cell of {column} is a grade ({some_of(cells, 2, '; ')}); {known}: {_ADVICE}")
    cells = [cell for column in odd.values() for cell in column]
    if cells:
        print(f"{path}: {len(cells)} labels count as missing, {known}: {some_of(cells, between='; ')}")
    if absent:
        print(f"{path} has no columns {some_of(absent)}: their labels count as missing")
    return pd.DataFrame(rows, columns=["study_id", *LABEL_COLUMNS])


def _misspelt(names, columns):
    """Dict name -> which of the columns it most likely means, for those names that look like one."""
    found = {}
    for name in names:
        plain = re.sub(r"[-/\s]+", "_", name.lower())
        # .92 of a name's letters in their order: a slip or two, but no other level's or condition's name.
        if close := difflib.get_close_matches(plain[:100], columns, 1, 0.92):
            found[name] = close[0]
    return found


def read_coordinates(data: str | Path) -> pd.DataFrame:
    """Read the readers' label points, train_label_coordinates.csv.

    Parameters
    ----------
    data : str or Path
        The competition's folder.

    Returns
    -------
    DataFrame
        study_id, series_id, instance_number (int64), condition, level (this kit's names), x_px, y_px (columns and rows
        from the centre of the first pixel). Whether a point lies on an image is not known here, see place_points.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no such table. Single bad rows are named, printed and left out.
    """

    def parse(cells, line):
        ids = [_id(cells, name) for name in ("study_id", "series_id", "instance_number")]
        condition = _one_of(cells, "condition", CONDITIONS, cells["condition"].lower().replace(" ", "_"))
        level = _one_of(cells, "level", LEVELS, cells["level"].lower().replace("/", "_"))
        return *ids, condition, level, _number(cells, "x"), _number(cells, "y")

    path = Path(data) / "train_label_coordinates.csv"
    columns = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
    rows = _read_rows(path, columns, parse, 5)
    table = pd.DataFrame(rows, columns=[*columns[:5], "x_px", "y_px"])
    return table if rows else table.astype(dict.fromkeys(columns[:3], int) | {"x_px": float, "y_px": float})


def described_series(data: str | Path, split: str) -> dict[int, dict[int, str]]:
    """dict study_id -> dict series_id -> description, from {train,test}_series_descriptions.csv, ascending study_id.

    A study whose rows are all bad but for its own id is there, without series.
    """
    studies: dict[int, dict[int, str]] = {}

    def parse(cells, line):
        study_id = _id(cells, "study_id")
        studies.setdefault(study_id, {})
        series_id = _id(cells, "series_id")
        return study_id, series_id, _one_of(cells, "series_description", DESCRIPTIONS)

    path = Path(data) / f"{split}_series_descriptions.csv"
    for study_id, series_id, text in _read_rows(path, ["study_id", "series_id", "series_description"], parse, 2):
        studies[study_id][series_id] = text
    return dict(sorted(studies.items()))


def read_descriptions(data: str | Path, split: str) -> pd.DataFrame:
    """described_series as a table.

    Parameters
    ----------
    data : str or Path
        The competition's folder.
    split : str
        `train` or `test`.

    Returns
    -------
    DataFrame
        study_id, series_id, description; ascending study_id. A study without a usable series has no row.

    Raises
    ------
    FileNotFoundError
        There is no {split}_series_descriptions.csv.
    ValueError
        It is no such table. Single bad rows are named, printed and left out.
    """
    studies = described_series(data, split)
    rows = [(study_id, *item) for study_id, series in studies.items() for item in series.items()]
    return pd.DataFrame(rows, columns=["study_id", "series_id", "description"])


def sample_studies(path: str | Path) -> list[int]:
    """The studies of which sample_submission.csv has rows, ascending: list of int."""

    def parse(cells, line):
        study_id, _, column = cells["row_id"].partition("_")
        if whole_number(study_id) is None or column not in LABEL_COLUMNS:
            raise _BadRow(f"row_id {_shown(cells['row_id'])} names no study, condition and level")
        return whole_number(study_id), column

    return sorted({study_id for study_id, _ in _read_rows(path, ["row_id"], parse, 2)})


def read_folds(preprocessed: str | Path) -> pd.DataFrame:
    """Read folds.csv of 01_preprocess.

    Parameters
    ----------
    preprocessed : str or Path
        Its folder, or the file itself.

    Returns
    -------
    DataFrame
        study_id, fold (both int64).

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no such table.
    """
    path = Path(preprocessed)
    path = path if path.suffix == ".csv" else path / "folds.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run 01_preprocess first, or correct the path")
    rows = _read_rows(path, ["study_id", "fold"], lambda cells, line: (_id(cells, "study_id"), _id(cells, "fold")), 1)
    if not rows:
        raise ValueError(f"{path} has no studies: run 01_preprocess again")
    return pd.DataFrame(rows, columns=["study_id", "fold"])


# -- what all of them share

_ADVICE = "copy the competition's file anew, or save the table as CSV in UTF-8 with its own columns"


class _BadRow(Exception):
    """Why a row is left out."""


def _shown(value):
    """A cell in a message: quoted, and cut where it is long."""
    return repr(value if len(value) <= 40 else value[:40] + "...")


def _id(cells, name):
    number = whole_number(cells[name])
    if number is None:
        raise _BadRow(f"{name} {_shown(cells[name])} is no whole number" if cells[name] else f"{name} is empty")
    return number


def _number(cells, name):
    try:
        number = math.nan if "_" in cells[name] else float(cells[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _BadRow(f"{name} {_shown(cells[name])} is no finite number" if cells[name] else f"{name} is empty")
    return number


def _one_of(cells, name, known, value=None):
    value = cells[name] if value is None else value
    if value not in known:
        raise _BadRow(f"unknown {name} {_shown(cells[name])}" if cells[name] else f"{name} is empty")
    return value


def _lines(path, columns):
    """(header, [(line number, cells as text), ...]) of a table that has these columns; the header is line 1.

    A line is a row, whatever quotes are open: a stray one must not swallow the rest of the file.
    """
    path = Path(path)
    if not path.is_file():
        near = [str(found.parent) for found in sorted(path.parent.glob(f"*/{path.name}"))[:1]]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"{path} is missing: the competition's folder has it, or one of the phantom's{hint}")
    raw = path.read_bytes()
    lines = list(io.StringIO(raw.decode("utf-8-sig", errors="replace"), newline=None))
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} is empty: {_ADVICE}")
    for delimiter in ",;\t":
        header = _split(lines[0], delimiter)
        if set(columns) <= set(header):
            break
    else:
        utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        kind = kind_of_file(raw[:512]) or ("text in UTF-16" if utf16 else "no text" if b"\0" in raw[:1000] else "")
        missing = ", ".join(name for name in columns if name not in lines[0]) or columns[0]
        what = f"is {kind}" if kind else f"has no column {missing} in its first line, {_shown(lines[0].strip())}"
        raise ValueError(f"{path} {what}: {_ADVICE}")
    twice = next((name for name in (*columns, *LABEL_COLUMNS) if header.count(name) > 1), None)
    if twice:
        raise ValueError(f"{path} has {header.count(twice)} columns {twice}: {_ADVICE}")
    return header, [(number, _split(line, delimiter)) for number, line in enumerate(lines[1:], 2)]


def _split(line, delimiter):
    """The cells of one line as text: "" for all that stands for no value, decimal points where there were commas."""
    try:
        cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:  # a cell without end
        cells = line.split(delimiter)
    if delimiter != ",":
        cells = [_DECIMAL.sub(r"\1.\2", cell) for cell in cells]
    return ["" if cell.lower() in _EMPTY else cell for cell in cells]


def _read_rows(path, columns, parse, key):
    """The rows of a table, each as parse(cells, line number) makes it of a dict column -> text, in the file's order.

    parse raises _BadRow for one that cannot be used. Of rows whose first `key` values agree the first one stands.
    Prints one sentence if any are left out; raises ValueError where that would be all.
    """
    header, lines = _lines(path, columns)
    good, bad, short = {}, [], []
    for number, row in lines:
        if not any(row):
            bad.append(f"line {number} is empty")
            continue
        cells = dict(zip(header, row + [""] * (len(header) - len(row)), strict=False))
        try:
            if any(row[len(header) :]):
                raise _BadRow(f"{len(row)} cells for {len(header)} columns")
            values = parse(cells, number)
        except _BadRow as reason:
            bad.append(f"line {number}: {reason}")
            continue
        first, known = good.setdefault(values[:key], (number, values))
        if known != values:
            bad.append(f"line {number} contradicts line {first}, which stands")
        elif first != number:
            bad.append(f"line {number} repeats line {first}")
        elif len(row) < len(header):
            short.append(number)
    if bad and not good:
        raise ValueError(f"{path}: none of its {len(lines)} rows can be used ({some_of(bad, 3, '; ')}): {_ADVICE}")
    if bad:
        print(f"{path}: {len(bad)} of {len(lines)} rows are left out: {some_of(bad, between='; ')}")
    if short:
        print(f"{path}: cells are missing at the end of lines {some_of(short)}, and count as empty")
    return [values for _, values in good.values()]
