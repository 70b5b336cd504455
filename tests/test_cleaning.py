"""Labels that out-of-fold predictions contradict: found where they were spoiled, left alone where they are hard."""

import numpy as np
import pandas as pd
import pytest

import utils
from lumbar.grade.cleaning import DOUBT, MOST, doubtful_labels
from lumbar.grade.tables import read_bare_tables
from lumbar.run.stages import stage_inputs


def studies(n, seed=0, skill=4.0, spoiled=0.02):
    """(true grades, labels of which a share is wrong, weighted probabilities of two members): of this skill."""
    rng = np.random.default_rng(seed)
    true = rng.choice(3, (n, 5, 5), p=(0.75, 0.17, 0.08))
    labels, wrong = true.copy(), rng.random(true.shape) < spoiled
    labels[wrong] = (true + rng.integers(1, 3, true.shape))[wrong] % 3
    members = {}
    for member in ("level", "yolo"):
        evidence = skill * np.eye(3)[true] + rng.normal(0, 1.2, (*true.shape, 3))
        weighted = np.exp(evidence) * (0.75, 0.17, 0.08) * np.array((1, 2, 4))
        members[member] = weighted / weighted.sum(-1, keepdims=True)
    return true, labels, members


def test_spoiled_labels_are_found_and_seldom_others():
    true, labels, members = studies(400)
    wrong = labels != true
    doubtful, seen = doubtful_labels(labels, members)
    assert doubtful[wrong].mean() > 0.4 and wrong[doubtful].mean() > 0.9
    assert (seen[doubtful] == true[doubtful]).mean() > 0.9


def test_of_no_grade_more_than_a_few_go_however_bad_the_members():
    true, labels, members = studies(300, skill=-6.0, spoiled=0.0)  # they are sure, and wrong
    doubtful, _ = doubtful_labels(labels, members)
    for group in ((0,), (1, 2), (3, 4)):
        for grade in range(3):
            of_grade = labels[:, group] == grade
            assert doubtful[:, group][of_grade].sum() <= MOST * of_grade.sum()


def test_members_that_know_nothing_contradict_nothing():
    true, labels, members = studies(200, skill=0.0, spoiled=0.0)
    flat = {member: np.broadcast_to((1 / 7, 2 / 7, 4 / 7), p.shape) for member, p in members.items()}
    assert not doubtful_labels(labels, flat)[0].any()


def test_a_label_is_only_judged_where_somebody_looked():
    true, labels, members = studies(100)
    for p in members.values():
        p[:50] = np.nan
    members["level"][50:, 2] = np.nan
    labels[99] = -1
    doubtful, seen = doubtful_labels(labels, members)
    assert not doubtful[:50].any() and (seen[:50] == -1).all() and not doubtful[99].any()
    assert (seen[50:] >= 0).all() and DOUBT < 0.5


@pytest.fixture
def finished(monkeypatch):
    """(true grades, labels, study ids) whose out-of-fold tables lie in the folder `finished`."""
    true, labels, members = studies(400)
    ids = np.arange(1000, 1400)
    tables = {member: utils.to_submission(ids, p).assign(fold=0) for member, p in members.items()}
    monkeypatch.setattr(
        "lumbar.grade.cleaning.read_out_of_fold", lambda folders: tables if "finished" in folders else {}
    )
    return true, labels, ids


def test_doubtful_labels_are_missing_or_replaced_and_the_rest_as_it_was(finished, capsys):
    true, labels, ids = finished
    before = labels.copy()
    left_out = utils.cleaned_grades(labels, ids, ["finished"])
    replaced = utils.cleaned_grades(labels, ids, ["finished"], replace=True)
    assert (labels == before).all(), "held-out studies are scored on all labels"
    gone = left_out != labels
    assert 0 < gone.sum() < 0.02 * labels.size and (left_out[gone] == -1).all()
    assert ((replaced != labels) == gone).all() and (replaced[gone] == true[gone]).mean() > 0.9
    assert f"CLEAN: {gone.sum()} of {labels.size} labels" in capsys.readouterr().out


def test_without_folders_nothing_is_doubtful_and_without_predictions_it_is_an_error(finished):
    _, labels, ids = finished
    assert utils.cleaned_grades(labels, ids, []) is labels
    with pytest.raises(ValueError, match="CLEAN: no out-of-fold predictions"):
        utils.cleaned_grades(labels, ids, ["elsewhere"])
    with pytest.raises(ValueError, match="CLEAN"):
        utils.cleaned_grades(labels, ids + 10_000, ["finished"])


def test_only_labels_that_are_trained_on_are_cleaned_and_counted(finished, capsys):
    _, labels, ids = finished
    folds = np.arange(len(ids)) % 5
    all_of_them = utils.cleaned_grades(labels, ids, ["finished"]) != labels
    capsys.readouterr()
    one = utils.cleaned_grades(labels, ids, ["finished"], folds=folds, trained=[2]) != labels
    assert (one == all_of_them & (folds != 2)[:, None, None]).all() and one.any()
    assert f"CLEAN: {one.sum()} of {(folds != 2).sum() * 25} labels" in capsys.readouterr().out
    two = utils.cleaned_grades(labels, ids, ["finished"], folds=folds, trained=[2, 3]) != labels
    said = ", ".join(f"{all_of_them[folds != fold].sum()} of fold {fold}'s" for fold in (2, 3))
    assert (two == all_of_them).all() and said in capsys.readouterr().out


def test_predictions_of_held_out_studies_alone_clean_nothing_and_are_an_error(finished):
    _, labels, ids = finished
    with pytest.raises(ValueError, match="CLEAN: finished predict only studies that fold 0 holds out.*other folds"):
        utils.cleaned_grades(labels, ids, ["finished"], folds=np.zeros(len(ids), int), trained=[0])


def test_spoiled_ids_do_not_shift(finished):
    _, labels, ids = finished
    order = np.random.default_rng(1).permutation(len(ids))
    shuffled = utils.cleaned_grades(labels[order], ids[order], ["finished"])
    assert (shuffled == utils.cleaned_grades(labels, ids, ["finished"])[order]).all()


def test_tables_of_other_networks_will_do(tmp_path, capsys):
    """A Kaggle data set with nothing but tables: a file of any name, a folder with an oof.csv, or one with such."""
    _, labels, members = studies(400)
    ids = np.arange(1000, 1400)
    tables = [utils.to_submission(ids, p) for p in members.values()]
    (tmp_path / "one").mkdir(), (tmp_path / "below" / "other").mkdir(parents=True)
    tables[0].to_csv(tmp_path / "one" / "oof.csv", index=False)
    tables[1].to_csv(tmp_path / "below" / "other" / "oof.csv", index=False)
    tables[1].to_csv(tmp_path / "other.csv", index=False)
    expected = np.where(doubtful_labels(labels, members)[0], -1, labels)
    for places in (["one", "below"], ["one/oof.csv", "other.csv"]):
        found = stage_inputs({"CLEAN": [str(tmp_path / place) for place in places]})["CLEAN"]
        assert (utils.cleaned_grades(labels, ids, found) == expected).all()
        assert "labels that one, other predicted out of fold" in capsys.readouterr().out
    # Beside weights of the kit a table is its own: of their folds alone, and read with them.
    (tmp_path / "one" / "model.safetensors").touch()
    assert list(read_bare_tables([tmp_path / "one"])) == ["one"]
    (tmp_path / "one" / "level_0.safetensors").touch()
    assert not read_bare_tables([tmp_path / "one"])
    own = [str(tmp_path / "one"), str(tmp_path / "one" / "oof.csv")]
    assert stage_inputs({"CLEAN": own})["CLEAN"] == [tmp_path / "one"]
    (tmp_path / "broken.csv").write_text("row_id,moderate\n1_a,0.5\n")
    with pytest.raises(ValueError, match="broken.csv lacks the column normal_mild, severe: give a table"):
        utils.cleaned_grades(labels, ids, [tmp_path / "broken.csv"])


def test_a_table_of_the_run_itself_is_refused(tmp_path):
    """Its file, too, not only its folder: it is written anew while the training reads it."""
    own = tmp_path / "04_level_0" / "oof.csv"
    own.parent.mkdir()
    own.write_text("row_id\n")
    with pytest.raises(ValueError, match="has what this run itself writes"):
        stage_inputs({"OUT": str(tmp_path), "CLEAN": [str(own)]}, "04_level_0")
    elsewhere = tmp_path / "oof.csv"
    elsewhere.write_text("row_id\n")
    for out in (tmp_path, tmp_path / "runs" / "clean"):
        assert stage_inputs({"OUT": str(out), "CLEAN": [str(elsewhere)]}, "04_level_0")["CLEAN"] == [elsewhere]


def test_of_tables_of_one_name_none_is_lost(tmp_path):
    _, _, members = studies(3)
    table = utils.to_submission(range(3), members["level"])
    for folder in "ab":
        (tmp_path / folder / "level").mkdir(parents=True)
        table.to_csv(tmp_path / folder / "level" / "oof.csv", index=False)
    found = read_bare_tables([tmp_path / "a" / "level", tmp_path / "b" / "level"], {"level": table})
    assert list(found) == ["level_2", "level_3"]
    pd.concat([table.assign(member="x"), table.assign(member="level")]).to_csv(tmp_path / "all.csv", index=False)
    assert list(read_bare_tables([tmp_path / "all.csv"], ["level"])) == ["x", "level_2"]
    pd.concat([table, table]).to_csv(tmp_path / "twice.csv", index=False)
    with pytest.raises(ValueError, match="twice.csv: row_id .* appears twice"):
        read_bare_tables([tmp_path / "twice.csv"])


def test_predictions_that_inference_gathered_do_not_count_again(tmp_path):
    """A run's folder names its trainings: 05_inference has a table of all of them, and no weights."""
    for stage, files in (("04_level_0", ["level_0.safetensors", "oof.csv"]), ("05_inference", ["oof.csv"])):
        (tmp_path / stage).mkdir()
        for name in (*files, "manifest.json"):
            (tmp_path / stage / name).touch()
    assert stage_inputs({"CLEAN": [str(tmp_path)]})["CLEAN"] == [tmp_path / "04_level_0"]
    assert not read_bare_tables([tmp_path / "05_inference"])
    with pytest.raises(FileNotFoundError, match="CLEAN: no .*safetensors in or below .*05_inference, nor another"):
        stage_inputs({"CLEAN": [str(tmp_path / "05_inference")]})
