"""A run is known by its content: copied, moved, merged or mounted elsewhere it is found; a changed byte is noticed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import utils
from lumbar.run import fingerprint, stages
from lumbar.run.stages import stage_inputs

ROOT = Path(__file__).resolve().parents[1]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


ALL = {"01_preprocess", "02_levels", "04_level_0", "04_level_1", "05_inference", "06_report"}


def parameters_of(root):
    """dict stage -> parameters of a small run below root."""
    out = f"{root}/out"
    read = {"DATA": f"{root}/data", "PREPROCESSED": f"{out}/01_preprocess", "LEVELS_DIR": f"{out}/02_levels"}
    return {
        "01_preprocess": {"OUT": out, "DATA": read["DATA"], "BITS": 8},
        "02_levels": {"OUT": out, **read, "LEVELS_DIR": "", "WEIGHTS": f"{root}/start.safetensors"},
        "04_level_0": {"OUT": out, **read, "FOLDS": [0]},
        "04_level_1": {"OUT": out, **read, "FOLDS": [1]},
        "05_inference": {"OUT": out, "DATA": read["DATA"], "WEIGHTS": [f"{out}/{n}" for n in sorted(ALL)[1:4]]},
        "06_report": {"OUT": out, "DATA": read["DATA"], "RUN": out},
    }


def work(root, name, volume="volume"):
    """Do a stage of the run."""
    stage = utils.open_stage(root / "out", name, parameters_of(root)[name])
    assert not stage.done
    write(stage.dir / "table.csv", f"{name}\n")
    write(stage.dir / "weights.safetensors", f"weights of {name}")
    write(stage.dir / "volumes" / "7.safetensors", volume)
    stage.close(outputs=["table.csv", "weights.safetensors", "volumes"], scores={"x": 1.0})


def done(root):
    """The stages that are found as finished. The last comes first: what is moved aside is missing to those after it."""
    given = parameters_of(root)
    return {name for name in sorted(ALL, reverse=True) if utils.open_stage(f"{root}/out", name, given[name]).done}


@pytest.fixture
def run(tmp_path):
    root = tmp_path / "first"
    write(root / "data" / "train.csv", "study_id\n7\n")
    write(root / "data" / "train_images" / "7" / "70" / "1.dcm", "")
    write(root / "start.safetensors", "weights to start from")
    for name in sorted(ALL):
        work(root, name)
    return root


def test_a_run_is_found_wherever_it_lies(run, tmp_path, monkeypatch):
    assert done(run) == ALL
    copied = shutil.copytree(run, tmp_path / "another user" / "copy", copy_function=shutil.copyfile)  # new times
    assert done(copied) == ALL
    link = tmp_path / "link"
    link.symlink_to(run, target_is_directory=True)
    assert done(link) == ALL
    monkeypatch.chdir(tmp_path)
    assert done(Path("first")) == ALL
    assert done(run.rename(tmp_path / "moved")) == ALL
    assert not list(tmp_path.glob("**/*.old-*"))


def test_stages_made_on_several_machines_merge(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    for place, theirs in ((run, "04_level_1"), (other, "04_level_0")):
        for name in (theirs, "05_inference", "06_report"):
            shutil.rmtree(place / "out" / name)
    merged = tmp_path / "merged"
    shutil.copytree(run, merged)
    shutil.copytree(other / "out" / "04_level_1", merged / "out" / "04_level_1")
    assert done(merged) == ALL - {"05_inference", "06_report"}
    folders = stage_inputs({"WEIGHTS": [str(merged / "out")]})["WEIGHTS"]
    assert [folder.name for folder in folders][-2:] == ["04_level_0", "04_level_1"]


@pytest.mark.parametrize(
    "changed, affected",
    [
        ("data/train.csv", ALL),
        ("start.safetensors", {"02_levels"}),
        ("out/01_preprocess/table.csv", {"02_levels", "04_level_0", "04_level_1", "06_report"}),
        ("out/02_levels/weights.safetensors", {"04_level_0", "04_level_1", "05_inference", "06_report"}),
        ("out/04_level_1/weights.safetensors", {"05_inference", "06_report"}),
    ],
)
def test_a_changed_byte_is_noticed_whatever_its_time(run, changed, affected):
    path = run / changed
    before = path.stat()
    path.write_bytes(b"!" + path.read_bytes()[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert done(run) == ALL - affected


def test_a_stage_done_again_with_the_same_result_leaves_later_ones_finished(run, monkeypatch):
    shutil.rmtree(run / "out" / "01_preprocess")
    monkeypatch.setattr(stages, "peak_memory_mb", lambda: 12345.0)
    monkeypatch.setattr(fingerprint, "versions", lambda: {"torch": "another"})
    monkeypatch.setattr(time, "strftime", lambda form: "2001-01-01T00:00:00")
    work(run, "01_preprocess")
    assert done(run) == ALL
    # Other grey values in a file of the same size: the manifest says so.
    shutil.rmtree(run / "out" / "01_preprocess")
    work(run, "01_preprocess", "VOLUME")
    assert done(run) == {"01_preprocess", "05_inference"}


def test_outputs_that_did_not_travel_whole_are_noticed(run, capsys):
    volumes = run / "out" / "01_preprocess" / "volumes"
    write(volumes / "labels.cache", "of a library, in passing")
    write(volumes / ".DS_Store", "")
    assert done(run) == ALL
    (volumes / "7.safetensors").unlink()
    assert "01_preprocess" not in done(run)
    assert f"{volumes} has 0 bytes in place of 6: it is done again" in capsys.readouterr().out


def test_what_leads_elsewhere_counts_by_what_is_there(run, tmp_path):
    other = write(tmp_path / "other" / "train.csv", "study_id\n8\n").parent
    given = {"DATA": str(other), "BITS": 8}
    assert not utils.open_stage(run / "out", "01_preprocess", given).done
    with pytest.raises(FileNotFoundError, match="PREPROCESSED: .*no-such does not exist.*earlier stage writes it"):
        utils.open_stage(run / "out", "x", {"PREPROCESSED": str(tmp_path / "no-such")})
    assert utils.open_stage(run / "out", "y", {"WEIGHTS": ""}).inputs == {}
    kit = stage_inputs({"WEIGHTS": "weights/spinenet_phantom.safetensors"})  # from wherever it is started
    assert kit["WEIGHTS"].samefile(ROOT / "weights" / "spinenet_phantom.safetensors")


def make_old(root):
    """Give a run the manifests that were written when inputs were known by their paths."""
    out = root / "out"
    for folder in sorted(out.glob("0*")):
        manifest = json.loads((folder / "manifest.json").read_text())
        paths = stage_inputs(manifest["parameters"] | {"OUT": str(out)}, folder.name)
        if folder.name == "06_report":
            paths.pop("DATA")
        flat = [path for value in paths.values() for path in (value if isinstance(value, list) else [value])]
        identity = {
            "parameters": manifest["parameters"],
            "inputs": {str(path): stages._old_fingerprint(path) for path in flat},
        }
        manifest.pop("sha256")
        utils.write_json(folder / "begun.json", identity)
        sizes = dict.fromkeys(manifest["outputs"], 1)  # of folders it was that of the entry
        utils.write_json(folder / "manifest.json", manifest | identity | {"outputs": sizes})


def test_runs_of_the_time_when_paths_counted_are_found(run, tmp_path):
    make_old(run)
    assert done(run) == ALL
    copied = shutil.copytree(run, tmp_path / "copy")
    assert done(copied) == ALL
    manifest = copied / "out" / "02_levels" / "manifest.json"
    write(manifest, manifest.read_text() + " ")
    assert done(copied) == {"01_preprocess", "02_levels"}
    write(run / "data" / "train.csv", "study_id\n9\n")
    assert done(run) == {"06_report"}  # which knew the data by the stages that read them


def test_a_moved_unfinished_stage_goes_on(run, tmp_path):
    given = {"DATA": str(run / "data"), "EPOCHS": 3}
    write(utils.open_stage(run / "out", "04_x", given).dir / "x.checkpoint", "two epochs")
    moved = run.rename(tmp_path / "moved")
    again = utils.open_stage(moved / "out", "04_x", given | {"DATA": str(moved / "data")})
    assert not again.done and (again.dir / "x.checkpoint").read_text() == "two epochs"


# ---- Damaged and foreign files ----

DAMAGES = {
    "empty": b"",
    "cut": b'{"parameters": {"A": 1}, "inp',
    "not UTF-8": b"\xff\xfe\x00\x80",
    "a list": b"[1]",
    "null": b"null",
    "a text": b'"x"',
    "an object of another kind": b'{"id": 3}',
    "wrong types": b'{"parameters": [], "inputs": 3, "outputs": "x"}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["begun.json", "manifest.json"])
def test_damaged_json_means_do_it_again_and_is_named(tmp_path, capsys, name, damage):
    stage = utils.open_stage(tmp_path, "s", {"A": 1})
    write(stage.dir / "x.csv", "kept")
    stage.close(outputs=["x.csv"])
    (stage.dir / name).write_bytes(DAMAGES[damage])
    capsys.readouterr()
    again = utils.open_stage(tmp_path, "s", {"A": 1})
    assert not again.done and str(stage.dir / name) in capsys.readouterr().out
    assert (tmp_path / ("s.old-1" if name == "begun.json" else "s") / "x.csv").read_text() == "kept"
    write(again.dir / "x.csv", "kept")
    again.close(outputs=["x.csv"])
    assert utils.open_stage(tmp_path, "s", {"A": 1}).done


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": {"../../../../etc/passwd": 1}},
        {"outputs": {"/etc/passwd": 1}},
        {"outputs": {"../s/x.csv": 4}},
        {"outputs": {"x.csv": "4"}},
        {"outputs": {"x" * 5000: 4}},
        {"outputs": {"a\0b": 4}},
        {"outputs": []},
        {"seconds": "12"},
        {"scores": None},
        {"sha256": 3},
        {"inputs": {"DATA": 3}},
        {"parameters": {"A": 2}},
    ],
    ids=str,
)
def test_a_manifest_that_is_not_of_this_stage_does_not_count(tmp_path, capsys, change):
    stage = utils.open_stage(tmp_path, "s", {"A": 1})
    write(stage.dir / "x.csv", "kept")
    manifest = stage.close(outputs=["x.csv"])
    assert utils.open_stage(tmp_path, "s", {"A": 1}).done
    utils.write_json(stage.dir / "manifest.json", manifest | change)
    capsys.readouterr()
    again = utils.open_stage(tmp_path, "s", {"A": 1})
    said = capsys.readouterr().out
    assert not again.done and ("manifest.json" in said or "is missing" in said)
    assert (stage.dir / "x.csv").read_text() == "kept" and not (tmp_path / "s.old-1").exists()


def test_a_folder_of_unknown_work_is_moved_aside(tmp_path, capsys):
    write(tmp_path / "s" / "results.csv", "whose?")
    stage = utils.open_stage(tmp_path, "s", {"A": 1})
    assert not (stage.dir / "results.csv").exists() and "has no begun.json" in capsys.readouterr().out
    assert (tmp_path / "s.old-1" / "results.csv").read_text() == "whose?"
    with pytest.raises(ValueError, match="outputs must lie in its own folder, not at ../x"):
        stage.close(outputs=["../x"])


def test_the_run_and_the_report_pass_over_damaged_manifests(tmp_path, capsys):
    for name in ("01_a", "02_b"):
        utils.open_stage(tmp_path, name, {"A": 1}).close()
    write(tmp_path / "02_b" / "manifest.json", "{")
    write(tmp_path / "03_c" / "manifest.json", "{}")
    assert list(utils.write_run_manifest(tmp_path, {}, {}, 1.0)["stages"]) == ["01_a"]
    assert list(utils.read_manifests(tmp_path)) == ["01_a"]
    said = capsys.readouterr().out
    assert str(tmp_path / "02_b" / "manifest.json") in said and str(tmp_path / "03_c" / "manifest.json") in said
    write(tmp_path / "03_c" / "x_history.csv", "")
    write(tmp_path / "01_a" / "x_history.csv", "epoch,loss\n1,2\n")
    assert list(utils.read_histories(tmp_path)) == ["01_a"] and "x_history.csv cannot be" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "study_id\n7\n", "study_id,fold\n7,zero\n", "study_id,fold\n7\n", "\x00\x00", "{}"]
)
def test_damaged_folds_are_named(tmp_path, text):
    write(tmp_path / "folds.csv", text)
    with pytest.raises(ValueError, match="PREPROCESSED: .*folds.csv is damaged .*; run 01_preprocess again"):
        utils.check_folds([0], tmp_path)


# ---- What killed processes leave ----


def test_half_written_files_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    begin = "import sys; from lumbar.run.stages import open_stage; open_stage(sys.argv[1], 's', {'A': 1})"
    subprocess.run([sys.executable, "-c", begin, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    folder = tmp_path / "s"
    gone = [
        write(folder / "deep" / f"a.json.{dead.pid}.part", "{"),
        write(folder / f"b.{dead.pid}.part", ""),
        write(folder / f"c.json.{os.getpid()}.part", ""),  # of an earlier process with the same number
        write(folder / "d.checkpoint.part", ""),
        write(folder / "scores_0.part.npy", ""),
        write(folder / "crops.part" / "7.npy", ""),
        write(tmp_path / "s.part" / "begun.json", ""),
        write(tmp_path / f"old.csv.{dead.pid}.part", ""),
    ]
    os.utime(gone[-1], (0, 0))
    kept = [
        write(folder / f"e.json.{os.getppid()}.part", ""),  # its process lives
        write(folder / "party.csv", ""),
        write(tmp_path / f"f.json.{dead.pid}.part", ""),  # perhaps of a process on another machine
        write(tmp_path / "other" / "g.part", ""),
    ]
    utils.open_stage(tmp_path, "s", {"A": 1})
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
    mine = write(folder / "h.csv.part", "")
    utils.open_stage(tmp_path, "s", {"A": 1})  # a cell that is run again
    assert mine.exists()


def test_an_object_is_read_or_its_file_is_named(tmp_path):
    assert utils.read_json(write(tmp_path / "a.json", '{"x": 1}')) == {"x": 1}
    with pytest.raises(FileNotFoundError, match="dataset.json does not exist: run 01_preprocess again$"):
        utils.read_json(tmp_path / "dataset.json", "run 01_preprocess again")
    for damage in DAMAGES.values():
        (tmp_path / "dataset.json").write_bytes(damage)
        if b"id" not in damage and b"wrong" not in damage and b"outputs" not in damage:
            with pytest.raises(ValueError, match=r"dataset.json (is|holds) .*: run 01_preprocess again$"):
                utils.read_json(tmp_path / "dataset.json", "run 01_preprocess again")


def test_times_do_not_follow_the_wall_clock(tmp_path, monkeypatch):
    stage = utils.open_stage(tmp_path, "s", {"A": 1})
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= stage.close()["seconds"] < 60


@pytest.mark.parametrize(
    "before, now, same",
    [
        ({"LEARNING_RATE": 0.001}, {"LEARNING_RATE": 0.0, "SCHEDULE": "short"}, True),
        ({"LEARNING_RATE": 0.002}, {"LEARNING_RATE": 0.002, "SCHEDULE": "short"}, True),
        ({"LEARNING_RATE": 0.002}, {"LEARNING_RATE": 0.0, "SCHEDULE": "short"}, False),
        ({"LEARNING_RATE": 0.001}, {"LEARNING_RATE": 0.0, "SCHEDULE": "B"}, False),
        ({"EPOCHS": 2}, {"EPOCHS": 2, "DROP_PATH": 0.0, "POOLING": "mean"}, True),
        ({"EPOCHS": 2}, {"EPOCHS": 2, "DROP_PATH": 0.1, "POOLING": "mean"}, False),
        ({"EPOCHS": 2}, {"EPOCHS": 2, "DROP_PATH": 0.0, "POOLING": "max"}, False),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_work_from_before_a_parameter_goes_on_where_it_changes_nothing(tmp_path, before, now, same, finished):
    stage = utils.open_stage(tmp_path, "s", before)
    write(stage.dir / "kept.txt", "of hours")
    if finished:
        stage.close(outputs=["kept.txt"])
    again = utils.open_stage(tmp_path, "s", now)
    assert again.done == (finished and same) and (again.dir / "kept.txt").is_file() == same


def test_a_stage_does_not_clean_labels_with_its_own_predictions(tmp_path):
    for run, name in (("a", "04_level_0"), ("a", "04_study_0"), ("b", "04_level_0")):
        write(tmp_path / run / name / "level_0.safetensors", "weights")
    own, sister, other = tmp_path / "a/04_level_0", tmp_path / "a/04_study_0", tmp_path / "b"

    def clean(*places):
        return stage_inputs({"OUT": str(tmp_path / "a"), "CLEAN": list(map(str, places))}, "04_level_0")

    assert clean(other) == {"CLEAN": [other / "04_level_0"]} and clean(sister) == {"CLEAN": [sister]}
    for place in (own, tmp_path / "a", tmp_path):
        with pytest.raises(ValueError, match=f"CLEAN: {place} has what this run itself writes: .* another OUT"):
            clean(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="CLEAN: no .*safetensors in or below"):
        clean(tmp_path / "empty")
