"""Bad rows of the competition's tables cost themselves, and tables of any types give the same numbers."""

import importlib.util
import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_study

import utils
from lumbar.data import preprocess
from lumbar.data.competition import row_ids
from lumbar.data.geometry import coordinates_to_lps, on_image, place_points
from lumbar.data.tables import described_series, read_descriptions, sample_studies
from lumbar.grade import tables as tables_module
from lumbar.look.slices import points_on_slice
from lumbar.names import LABEL_COLUMNS
from lumbar.spine.level_scores import compare_with_labels

DESCRIPTIONS = "study_id,series_id,series_description\n7,71,Sagittal T1\n7,72,Axial T2\n4003253,81,Sagittal T2/STIR\n"
POINTS = (
    "study_id,series_id,instance_number,condition,level,x,y\n"
    "7,71,8,Left Neural Foraminal Narrowing,L1/L2,322.5,110\n"
    "7,72,3,Right Subarticular Stenosis,L5/S1,10.25,20.5\n"
    "4003253,81,1,Spinal Canal Stenosis,L4/L5,-0.4,9\n"
)
FOLDS = "study_id,fold\n7,0\n4003253,1\n9,0\n"
SAMPLE = "row_id,normal_mild,moderate,severe\n" + "".join(f"{row},1,0,0\n" for i in (7, 9) for row in row_ids(i))
LABELS = f"study_id,{','.join(LABEL_COLUMNS)}\n" + "".join(
    f"{study_id},{','.join(grades)}\n"
    for study_id, grades in ((7, ["Severe", *["Normal/Mild"] * 23, ""]), (4003253, ["Moderate"] * 25))
)
TABLES = {  # file -> (clean text, reader of a folder)
    "train_series_descriptions.csv": (DESCRIPTIONS, lambda folder: read_descriptions(folder, "train")),
    "train_label_coordinates.csv": (POINTS, utils.read_coordinates),
    "folds.csv": (FOLDS, utils.read_folds),
    "sample_submission.csv": (
        SAMPLE,
        lambda folder: pd.DataFrame({"study_id": sample_studies(folder / "sample_submission.csv")}),
    ),
    "train.csv": (LABELS, lambda folder: utils.read_labels(folder / "train.csv")),
}
NO_IDS = (
    "",
    "2.5",
    "text",
    "../../x",
    "/etc/passwd",
    "-3",
    "9" * 30,
    "1e9",
    "nan",
    "4,003,253",
    "\u00b2",
    "0x10",
    "1 2",
)


def read(tmp_path, name, text):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(content)
    return TABLES[name][1](tmp_path)


def rows_with(text, column, value):
    """The table's first row once more, as its last, with another value in a column."""
    header, first = text.split("\n")[:2]
    cells = first.split(",")
    cells[header.split(",").index(column)] = f'"{value}"' if "," in value else value
    return text + ",".join(cells) + "\n"


def with_row(name, row):
    return TABLES[name][0] + row + "\n"


BAD_ROWS = [
    (name, rows_with(text, column, value))
    for name, (text, _) in TABLES.items()
    for value in NO_IDS
    for column in ("study_id", "series_id", "instance_number", "fold")
    if column in text.split("\n")[0].split(",")
]
BAD_ROWS += [(name, text + row + "\n") for name, (text, _) in TABLES.items() for row in ("", ",,", "\ufffd\0,", '"')]
BAD_ROWS += [
    (
        "train_series_descriptions.csv",
        rows_with(DESCRIPTIONS, "series_description", value).replace("\n7,71,L", "\n7,79,L"),
    )
    for value in ("", "Localizer")
]
BAD_ROWS += [
    ("train_label_coordinates.csv", rows_with(POINTS, column, value))
    for column, value in (
        ("condition", "Left Knee"),
        ("condition", ""),
        ("level", "L6/S1"),
        ("level", ""),
        ("x", ""),
        ("x", "inf"),
        ("y", "NaN"),
        ("y", "-Infinity"),
        ("x", "1_0"),
        ("y", "far"),
    )
]
BAD_ROWS += [
    ("sample_submission.csv", SAMPLE + f"{row},1,0,0\n")
    for row in (
        "12_left_knee_l1_l2",
        "12.5_spinal_canal_stenosis_l1_l2",
        "spinal_canal_stenosis_l1_l2",
        "../12_spinal_canal_stenosis_l1_l2",
    )
]
BAD_ROWS += [
    ("train_series_descriptions.csv", DESCRIPTIONS + row)
    for row in ("7,71,Axial T2\n", "7,71,Sagittal T1\n", "7,90,Sagittal T1,Axial T2\n", "7,90\n", '7,"90,Sagittal T1\n')
]
BAD_ROWS += [
    ("folds.csv", FOLDS + "7,1\n"),
    ("train_label_coordinates.csv", rows_with(POINTS, "x", "5")),
    ("train.csv", rows_with(LABELS, "spinal_canal_stenosis_l1_l2", "Moderate")),
]


@pytest.mark.parametrize(("name", "text"), BAD_ROWS)
def test_a_bad_row_costs_itself_and_is_named_by_its_line(tmp_path, capsys, name, text):
    clean = read(tmp_path, name, TABLES[name][0])
    assert capsys.readouterr().out == ""
    lines = text.split("\n")
    pd.testing.assert_frame_equal(read(tmp_path, name, text), clean)
    said = capsys.readouterr().out
    assert f"{name}: 1 of {len(lines) - 2} rows are left out" in said and f"line {len(lines) - 1}" in said
    first = "\n".join([lines[0], lines[-2], *lines[1:-2], ""])  # the same row at the top
    if not re.search("repeats|contradicts", said):
        pd.testing.assert_frame_equal(read(tmp_path, name, first), clean)
        assert re.search(r"\bline 2\b", capsys.readouterr().out)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace(",", ";").encode(),
        lambda text: text.replace(",", "\t").encode(),
        lambda text: b"\xef\xbb\xbf" + re.sub(r"(\d)\.(\d)", r"\1,\2", text.replace(",", ";")).encode(),
        lambda text: re.sub(r"(?m)^(\d+)(?=,)", r"\1.0", text).encode(),
        lambda text: re.sub(r"(?m)^(.*)$", r"\1,,", text.rstrip("\n")).encode() + b"\n",
        lambda text: text.rstrip("\n").encode(),
        lambda text: text.replace(",", " , ").encode(),
    ],
    ids=["bom", "crlf", "cr", "semicolons", "tabs", "decimal commas", "floats", "more columns", "no end", "spaces"],
)
def test_what_spreadsheets_write_is_the_same_table(tmp_path, capsys, name, change):
    text = TABLES[name][0]
    pd.testing.assert_frame_equal(read(tmp_path, name, change(text)), read(tmp_path, name, text))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "is empty"),
        (lambda text: "\n \n", "is empty"),
        (lambda text: text.replace("_id", "_number"), "has no column .*_id"),
        (lambda text: text.split("\n", 1)[1], "has no column .*_id"),
        (lambda text: text.split(",", 1)[1].replace(",", ";"), "has no column"),
        (lambda text: text.encode("utf-16"), "UTF-16"),
        (lambda text: b"PK\x03\x04\x14\0\x06\0", "Excel"),
        (lambda text: "\n<!DOCTYPE html><html>", "web page"),
        (lambda text: "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (lambda text: b"\0\1\2" * 60, "no text"),
        (lambda text: "a" * 200_000, "has no column"),
        (lambda text: re.sub(r"(?m)^\d", "x", text), "none of its .* rows can be used .line 2"),
        (lambda text: re.sub(r"(?m)^(\w+)(.*)$", r"\1,\1\2", text), "has 2 columns"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_with_advice(tmp_path, name, change, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}") as error:
        read(tmp_path, name, change(TABLES[name][0]))
    assert "CSV in UTF-8" in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 500


def test_what_is_said_stays_short(tmp_path, capsys):
    read(tmp_path, "folds.csv", FOLDS + "x" * 100_000 + ",1\n" + "2.5,0\n" * 3000 + "y" * 200_000 + "\n")
    said = capsys.readouterr().out
    assert len(said) < 1000 and said.count("\n") == 1 and "3002 of 3005 rows" in said and "and 2997 more" in said


def test_labels_cost_a_cell(tmp_path, capsys):
    clean = read(tmp_path, "train.csv", LABELS)
    found = read(tmp_path, "train.csv", LABELS.replace("Moderate", "Moderat", 1) + "9,Severe,Moderate\n")
    said = capsys.readouterr().out
    assert "line 3: spinal_canal_stenosis_l1_l2 is 'Moderat'" in said and "end of lines 4" in said
    clean.loc[1, LABEL_COLUMNS[0]] = None
    pd.testing.assert_frame_equal(found.iloc[:2], clean)
    assert found.iloc[2].dropna().tolist() == [9, "Severe", "Moderate"]
    for change, message in (
        (lambda t: re.sub("Normal/Mild|Moderate|Severe", "0", t), "no cell of it is a grade"),
        (lambda t: re.sub(r"(?m)^(\d+),\w+", r"\1,1", t), "no cell of spinal_canal_stenosis_l1_l2 is a grade"),
        (lambda t: t.split("\n")[0] + "\n", "no rows"),
        (lambda t: "study_id,grade\n7,Severe\n", "no label columns"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, "train.csv", change(LABELS))
    fewer = read(tmp_path, "train.csv", "study_id,spinal_canal_stenosis_l1_l2\n7,Severe\n")
    assert list(fewer) == ["study_id", *LABEL_COLUMNS] and fewer.notna().sum().sum() == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("_l4_l5", "_l4-l5"),
        ("_l1_l2", "_L1_L2"),
        ("_l5_s1", " L5/S1"),
        ("_l2_l3", "_l2l3"),
        ("left_neural", "Left Neural"),
        ("spinal_canal_stenosis", "spinal_canal_stenois"),
        ("_", "-"),
    ],
)
def test_a_label_column_whose_name_is_misspelt_is_refused(tmp_path, old, new):
    header, rest = LABELS.split("\n", 1)
    columns = [name.replace(old, new) for name in header.split(",")[1:]]
    changed = [(name, was) for name, was in zip(columns, LABEL_COLUMNS, strict=True) if name != was]
    with pytest.raises(ValueError, match="train.csv has columns .* instead of .*rename them") as error:
        read(tmp_path, "train.csv", "\n".join([",".join(["study_id", *columns]), rest]))
    for name, was in sorted(changed)[:5]:
        assert f"{name!r} instead of {was}" in str(error.value)


def test_absent_label_columns_are_named(tmp_path, capsys):
    wide = pd.read_csv(io.StringIO(LABELS))
    few = wide[["study_id", *LABEL_COLUMNS[5:]]].assign(spinal_canal_stenosis_t12_l1="Severe", age=40)
    found = read(tmp_path, "train.csv", few.to_csv(index=False))
    assert found[list(LABEL_COLUMNS[:5])].isna().to_numpy().all() and found[LABEL_COLUMNS[5]].notna().all()
    assert f"train.csv has no columns {', '.join(LABEL_COLUMNS[:5])}: their labels" in capsys.readouterr().out
    read(tmp_path, "train.csv", wide[["study_id", LABEL_COLUMNS[3]]].to_csv(index=False))
    assert f"{LABEL_COLUMNS[5]} and 19 more: their labels" in capsys.readouterr().out
    # A column of another name beside a whole table is none of the reader's business.
    read(tmp_path, "train.csv", wide.assign(**{"spinal canal stenosis l1/l2": 1}).to_csv(index=False))
    assert capsys.readouterr().out == ""


def test_a_study_with_bad_rows_only_is_still_a_study(tmp_path):
    read(tmp_path, "train_series_descriptions.csv", DESCRIPTIONS + "9,,Sagittal T1\n8,1,Localizer\nx,1,Axial T2\n")
    studies = described_series(tmp_path, "train")
    assert studies == {7: {71: "Sagittal T1", 72: "Axial T2"}, 8: {}, 9: {}, 4003253: {81: "Sagittal T2/STIR"}}
    assert all(type(i) is int for study_id, series in studies.items() for i in (study_id, *series))


def test_volumes_of_other_series_are_not_taken_as_finished(tmp_path, capsys, monkeypatch):
    """A mended table is read anew, for the studies that it concerns."""
    table, out, read = tmp_path / "train_series_descriptions.csv", tmp_path / "out", []
    whole = small_study.make_study()

    def read_study(folder, descriptions):
        read.append(int(folder.name))
        volumes = [volume for volume in whole.volumes if descriptions.get(volume.series_id) == volume.description]
        return replace(whole, study_id=int(folder.name), volumes=volumes)

    def volumes(rows, **options):
        read.clear()
        table.write_text("\n".join(["study_id,series_id,series_description", *rows, ""]))
        found = utils.preprocess_studies(tmp_path, "train", out, 1, **options)
        return found[found["problem"] == ""].groupby("study_id").size().to_dict(), found["problem"].iloc[-1]

    monkeypatch.setattr(preprocess, "read_study", read_study)
    good = [f"{i},{volume.series_id},{volume.description}" for i in (1, 2) for volume in whole.volumes]
    assert volumes([*good[:7], "2.5" + good[7][1:]])[0] == {1: 4, 2: 3}
    assert "line 9: study_id '2.5'" in capsys.readouterr().out
    assert volumes(good) == ({1: 4, 2: 4}, "") and read == [2]
    problem = "study 5: labelled, but not in train_series_descriptions.csv"
    assert volumes(good, labelled=pd.Series([2, 5])) == ({1: 4, 2: 4}, problem) and read == []
    assert "1 labelled studies are not in train_series_descriptions.csv and take no part: 5" in capsys.readouterr().out
    assert volumes([good[0].replace("Sagittal T1", "Axial T2"), *good[1:]])[0] == {1: 3, 2: 4} and read == [1]
    (out / "2.safetensors").write_bytes((out / "2.safetensors").read_bytes()[:999])  # a copy that broke off
    assert volumes(good)[0] == {1: 4, 2: 4} and read == [1, 2]
    with pytest.raises(ValueError, match="no rows below its header"):
        volumes([])


# ---- Label points that lie on no slice ----


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instance_number": 99}, "no such slice"),
        ({"series_id": 1}, "no such series"),
        ({"x_px": 9999.0}, "outside"),
        ({"x_px": -50.0}, "outside"),
        ({"y_px": 1e300}, "outside"),
        ({"y_px": np.nan}, "outside"),
        ({"x_px": -np.inf}, "outside"),
    ],
)
def test_a_label_point_on_no_slice_is_left_out(change, reason):
    study, points = small_study.make_study(), small_study.make_points()
    bad = pd.concat([points.head(1).assign(**change), points])
    placed = place_points(bad, study)
    assert reason in placed["problem"].iloc[0] and placed["problem"].tolist()[1:] == ["", ""]
    assert placed["slice"].tolist() == [-1, 4, 1]
    lps = coordinates_to_lps(bad, study)
    assert np.isnan(lps[0]).all()
    np.testing.assert_array_equal(lps[1:], coordinates_to_lps(points, study))
    compared = [compare_with_labels(small_study.make_boxes(), table, study) for table in (bad, points)]
    pd.testing.assert_frame_equal(*compared)
    for volume in study.volumes:
        shown = [[points_on_slice(table, volume, i) for i in range(len(volume.array))] for table in (bad, points)]
        pd.testing.assert_frame_equal(*map(pd.concat, shown))


def test_the_last_pixel_is_on_the_image():
    volume = replace(small_study.make_study().volumes[0], array=np.zeros((2, 10, 20), np.float32))
    x_px, y_px = np.array([-0.5, 20, 19.5, 20, 22, 5]), np.array([-0.5, 10, 9.5, 12, 5, np.nan])
    assert on_image(volume, x_px, y_px).tolist() == [True, True, True, False, False, False]


# ---- Tables of other types ----

IDS = np.arange(40) + 4003253
GRADED = np.random.default_rng(0).choice(3, (40, 25), p=(0.7, 0.2, 0.1))
TYPES = ("numpy_nullable", "pyarrow", "convert_dtypes", "text", "category", "object", "whole floats")


def graded_labels():
    labels = pd.DataFrame(np.array(utils.GRADES, object)[GRADED], columns=list(LABEL_COLUMNS))
    labels.insert(0, "study_id", IDS)
    labels.iloc[3, 4] = labels.iloc[7, 20] = None
    return labels


def predicted(seed):
    p = np.random.default_rng(seed).dirichlet([3, 1, 1], (40, 25)) + (seed + 1) * np.eye(3)[GRADED] / 2
    return utils.to_submission(IDS, (p / p.sum(-1, keepdims=True)).reshape(40, 5, 5, 3))


def converted(table, how, path):
    """The table as others would have read it."""
    if how in ("numpy_nullable", "pyarrow", "text"):
        table.to_csv(path, index=False)
        return pd.read_csv(path, dtype=str) if how == "text" else pd.read_csv(path, dtype_backend=how)
    if how == "category":
        return table.astype({c: "category" for c in table if table[c].dtype != float})
    if how == "whole floats":
        return table.astype({c: float for c in table if table[c].dtype.kind == "i"})
    return table.astype(object) if how == "object" else table.convert_dtypes()


def numbers(change=lambda table: table):
    """What the kit computes from labels and two members' tables, each changed first: list of arrays."""
    labels = change(graded_labels())
    tables = {"mine": predicted(0), "yours": predicted(1)}
    tables["mine"].iloc[5, 1:] = np.nan
    tables = {name: change(table) for name, table in tables.items()}
    fitted = utils.fit_ensemble(labels, tables, stacker=False, scaling=False)
    ids, values = utils.from_submission(tables["yours"])
    return [
        list(utils.competition_score(labels, tables["yours"]).values()),
        utils.make_folds(labels, 5).to_numpy(),
        [fitted["weights"][group][name] for group in utils.GROUPS for name in tables],
        utils.combine_tables(tables, fitted, np.full((5, 5, 3), 1 / 3)).iloc[:, 1:].to_numpy(float),
        utils.align_members(labels["study_id"], tables)["mine"],
        utils.to_submission(labels["study_id"], values)["severe"].to_numpy(),
        ids,
        values,
    ]


@pytest.fixture(scope="module")
def expected():
    return numbers()


@pytest.mark.parametrize("how", TYPES)
def test_tables_of_any_type_give_the_same_numbers(how, expected, tmp_path):
    if how == "pyarrow" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    for found, usual in zip(numbers(lambda t: converted(t, how, tmp_path / "t.csv")), expected, strict=True):
        np.testing.assert_allclose(found, usual, rtol=1e-7)  # read_csv of pandas 2 rounds the last digit


@pytest.mark.parametrize("how", TYPES)
def test_folds_of_any_type_are_the_same_folds(how, tmp_path):
    if how == "pyarrow" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    folds = pd.DataFrame({"study_id": IDS, "fold": np.arange(40) % 4})
    found = tables_module._fold_of(converted(folds, how, tmp_path / "t.csv"), IDS, np.ones(40, bool))
    np.testing.assert_array_equal(found, folds["fold"])


def test_ids_and_values_of_no_number_are_refused():
    labels, table = graded_labels(), predicted(0)
    for wrong in (2.5, np.nan, pd.NA, "x", -1, 10**30):
        with pytest.raises(ValueError, match="study_id .* is no whole number"):
            utils.make_folds(labels.astype({"study_id": object}).assign(study_id=[wrong, *IDS[1:]]), 5)
    with pytest.raises(ValueError, match="row .*_l1_l2: 'much' is no number"):
        utils.from_submission(table.astype({"severe": object}).assign(severe=["much", *table["severe"][1:]]))
    with pytest.raises(ValueError, match="names no study"):
        utils.from_submission(table.assign(row_id=["9" * 30 + "_spinal_canal_stenosis_l1_l2", *table["row_id"][1:]]))
