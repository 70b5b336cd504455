"""Checked parameters, stages that are found or continued, and the loop that runs notebooks."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

import utils
from lumbar.run.parameters import assigned_literals, check_notebook_parameters, check_values, notebook_parameters

ROOT = Path(__file__).resolve().parent.parent


def test_parameters_cell_must_hold_literals():
    assert assigned_literals('A = 1  # mm\nB = [1.0, "x"]\n') == {"A": 1, "B": [1.0, "x"]}
    with pytest.raises(ValueError, match="must be a literal"):
        assigned_literals("A = 1\nB = A / 2\n")
    with pytest.raises(ValueError, match="one `NAME = literal` a line"):
        assigned_literals("A, B = 1, 2\n")


def test_mistyped_and_mistaken_parameters_are_refused():
    defaults = {"EPOCHS": 40, "RATE": 0.1, "FOLDS": [0]}
    assert check_values(defaults, {"RATE": 1})["RATE"] == 1.0
    with pytest.raises(ValueError, match="Did you mean EPOCHS"):
        check_values(defaults, {"EPOCH": 3})
    for wrong in ({"EPOCHS": "40"}, {"EPOCHS": 4.0}, {"FOLDS": 1}, {"EPOCHS": True}):
        with pytest.raises(TypeError, match="must be"):
            check_values(defaults, wrong)


def test_notebook_parameters_reads_the_running_cells():
    cell = "# Parameters: full size\nEPOCHS = 40\nNAME = 'a'"
    assert notebook_parameters(["", cell], {"EPOCHS": 40, "NAME": "a"}) == {"EPOCHS": 40, "NAME": "a"}
    injected = "# Parameters\nEPOCHS = 2\n"
    assert notebook_parameters([cell, injected], {"EPOCHS": 2, "NAME": "a"})["EPOCHS"] == 2
    with pytest.raises(ValueError, match="no parameter 'EPOCH'"):
        notebook_parameters([cell, "# Parameters\nEPOCH = 2\n"], {"EPOCHS": 40, "NAME": "a"})
    with pytest.raises(ValueError, match="run the parameters cell"):
        notebook_parameters([""], {})


def test_a_stage_is_found_continued_or_moved_aside(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("study_id\n1\n")
    stage = utils.open_stage(tmp_path, "s", {"A": 1, "WORKERS": 2}, [data])
    (stage.dir / "half.txt").write_text("half")
    assert not stage.done
    again = utils.open_stage(tmp_path, "s", {"A": 1, "WORKERS": 9}, [data])
    assert not again.done and (again.dir / "half.txt").exists()
    with pytest.raises(FileNotFoundError, match="did not write"):
        again.close(outputs=["whole.txt"])
    again.close(outputs=["half.txt"], scores={"x": 1.0})
    found = utils.open_stage(tmp_path, "s", {"A": 1, "WORKERS": 2}, [data])
    assert found.done and found.close()["scores"] == {"x": 1.0}
    other = utils.open_stage(tmp_path, "s", {"A": 2, "WORKERS": 2}, [data])
    assert not other.done and not (other.dir / "half.txt").exists()
    assert (tmp_path / "s.old-1" / "half.txt").exists()
    (data / "train.csv").write_text("study_id\n2\n")
    assert (utils.open_stage(tmp_path, "s", {"A": 2}, [data]).dir.parent / "s.old-2").exists()
    with pytest.raises(FileNotFoundError, match="run the stage that writes it"):
        utils.open_stage(tmp_path, "t", {}, [tmp_path / "nothing"])


def test_two_processes_share_finished_work_and_nothing_else(tmp_path):
    stage = utils.open_stage(tmp_path, "finished", {"A": 1})
    (stage.dir / "x").write_text("x")
    stage.close(outputs=["x"])
    utils.open_stage(tmp_path, "running", {"A": 1})
    other = "import sys\nfrom lumbar.run.stages import open_stage\n"  # not utils, whose imports take seconds
    other += "for name in ('finished', 'running'): open_stage(sys.argv[1], name, {'A': 1})"
    done = subprocess.run([sys.executable, "-c", other, str(tmp_path)], cwd=ROOT, text=True, capture_output=True)
    assert "finished: already finished" in done.stdout
    assert "another process is working in" in done.stderr and "running" in done.stderr.splitlines()[-1]


def write_notebook(path, body):
    cells = [
        nbformat.v4.new_code_cell("# Parameters: of a test\nOUT = ''\nWAIT = 0.0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(body),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.mark.slow
def test_stages_run_side_by_side_in_order_and_parameters_arrive_as_they_were_given(tmp_path, capfd):
    """a and b each wait until both have begun, which they would do in vain one after the other."""
    notebook = write_notebook(
        tmp_path / "n.ipynb",
        "import json, time\nfrom pathlib import Path\nstart, out = time.time(), Path(OUT)\n"
        "out.with_suffix('.begun').touch()\n"
        "while WAIT == 1 and len(list(out.parent.glob('*.begun'))) < 2:\n"
        "    assert time.time() < start + 120, 'alone'\n    time.sleep(0.05)\n"
        "print('said')\nout.write_text(json.dumps([start, time.time(), WAIT, type(WAIT).__name__]))",
    )
    stages = [
        {
            "name": name,
            "notebook": notebook,
            "after": after,
            "threads": 1,
            "parameters": {"OUT": str(tmp_path / f"00{name}"), "WAIT": wait},
        }
        for name, after, wait in (("1", [], 1.0), ("2", [], 1.0), ("3", ["1", "2"], 1e-5))
    ]
    seconds = utils.run_stages(stages, tmp_path / "runs", workers=2)
    found = {name: json.loads((tmp_path / f"00{name}").read_text()) for name in "123"}
    assert list(seconds)[-1] == "3" and found["3"][0] > max(found["1"][1], found["2"][1])
    assert found["3"][2:] == [1e-5, "float"]
    assert "[1] said" in capfd.readouterr().out


@pytest.mark.slow
def test_a_failing_stage_stops_the_run_with_its_reason(tmp_path):
    bad = write_notebook(tmp_path / "bad.ipynb", "raise ValueError('the spoon is missing')")
    stages = [
        {"name": "a", "notebook": bad, "after": [], "threads": 1, "parameters": {}},
        {"name": "b", "notebook": bad, "after": ["a"], "threads": 1, "parameters": {}},
    ]
    with pytest.raises(RuntimeError, match="the spoon is missing"):
        utils.run_stages(stages, tmp_path / "runs")
    assert not (tmp_path / "runs" / "b.ipynb").exists()
    with pytest.raises(ValueError, match="no parameter 'WIAT'.*WAIT"):
        utils.run_stages([{**stages[0], "parameters": {"WIAT": 1.0}}], tmp_path / "runs")


def test_pipeline_table(tmp_path):
    stages = utils.pipeline_stages(ROOT / "notebooks", tmp_path, tmp_path / "out")
    names = [stage["name"] for stage in stages]
    for position, stage in enumerate(stages):
        assert set(stage["after"]) <= set(names[:position])
        check_notebook_parameters(stage["notebook"], stage["parameters"])
    for stage in utils.pipeline_stages(ROOT / "notebooks", tmp_path, tmp_path / "out", "full", [0, 1]):
        check_notebook_parameters(stage["notebook"], stage["parameters"])
    folds = utils.pipeline_stages(ROOT / "notebooks", tmp_path, tmp_path / "out", "full", [0, 3])
    job = utils.choose_stages(folds, ["04_train_vit_level_3"])
    assert [(s["name"], s["parameters"]["FOLDS"]) for s in job] == [("04_train_vit_level_3", [3])]
    both = [s["name"] for s in utils.choose_stages(folds, ["04_train_vit_level"])]
    assert both == ["04_train_vit_level_0", "04_train_vit_level_3"]
    weights = next(s for s in folds if s["name"] == "05_inference")["parameters"]["WEIGHTS"]
    assert len(weights) == 1 + 2 * 6 and str(tmp_path / "out" / "03_train_yolo_ss_3") in weights
    with pytest.raises(ValueError, match="FOLDS must be"):
        utils.pipeline_stages(ROOT / "notebooks", tmp_path, tmp_path, "demo", [5])
    only = utils.choose_stages(stages, ["05_inference"])
    assert [s["name"] for s in only] == ["05_inference"] and only[0]["after"] == []
    with pytest.raises(ValueError, match="no stage '5_inference'"):
        utils.choose_stages(stages, ["5_inference"])
    with pytest.raises(ValueError, match="SIZE must be"):
        utils.pipeline_stages(ROOT / "notebooks", tmp_path, tmp_path, "small")


def test_json_is_replaced_whole(tmp_path):
    utils.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        circular = []
        circular.append(circular)
        utils.write_json(tmp_path / "a.json", circular)
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_time_limit_stops_what_runs_and_nothing_else():
    with utils.time_limit(1e-5) as limit:
        while True:
            try:
                sum(range(1000))
            except Exception:  # a library that catches everything it should
                raise AssertionError("caught") from None
    assert limit.reached
    with utils.time_limit(0) as limit:
        pass
    assert not limit.reached
    with pytest.raises(KeyError), utils.time_limit(1) as limit:
        raise KeyError("its own")
    assert not limit.reached
    before = signal.getsignal(signal.SIGALRM)
    with utils.time_limit(1):
        pass
    time.sleep(0.01)
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_time_limit_stops_what_first_swallowed_it():
    class Destroyed:
        def __del__(self):
            time.sleep(0.3)

    cleaned = []
    with utils.time_limit(1e-5) as limit:
        held = Destroyed()
        del held  # it rings in here, where Python only prints what is raised
        try:
            try:
                time.sleep(30)
            except:  # noqa: E722 - as some libraries have it
                pass
            time.sleep(30)
        finally:
            time.sleep(1.5)  # it rings in here again
            cleaned.append(True)
    assert limit.reached and cleaned


def test_only_the_same_unfinished_work_is_continued_from_an_input(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("study_id\n1\n")
    monkeypatch.setenv("KAGGLE_INPUT_DIR", str(tmp_path / "input"))
    kernel = tmp_path / "input" / "my-kernel"
    begun = utils.open_stage(kernel, "04_x", {"EPOCHS": 3, "HOURS": 1.0}, inputs=[data])
    (begun.dir / "deep").mkdir()
    (begun.dir / "deep" / "x.checkpoint").write_text("two epochs")
    other = utils.open_stage(tmp_path / "other", "04_x", {"EPOCHS": 4, "HOURS": 1.0}, inputs=[data])
    assert not (other.dir / "deep").exists() and "not continued: other parameters" in capsys.readouterr().out
    moved = data.rename(tmp_path / "data2")
    same = utils.open_stage(tmp_path / "same", "04_x", {"EPOCHS": 3, "HOURS": 2.0}, inputs=[moved])
    assert (same.dir / "deep" / "x.checkpoint").read_text() == "two epochs" and not same.done
    endless = utils.open_stage(tmp_path / "endless", "04_x", {"EPOCHS": 3, "HOURS": 0.0}, inputs=[moved])
    assert not (endless.dir / "deep").exists()  # nothing is taken from inputs unless asked for
    begun.close()
    again = utils.open_stage(tmp_path / "again", "04_x", {"EPOCHS": 3, "HOURS": 2.0}, inputs=[moved])
    assert not (again.dir / "deep").exists()  # finished elsewhere: read from there, not continued here


def test_folds_that_do_not_exist_are_refused_before_a_stage_begins(tmp_path):
    with pytest.raises(FileNotFoundError, match="PREPROCESSED: .*folds.csv is missing; run 01_preprocess"):
        utils.check_folds([0], tmp_path)
    (tmp_path / "folds.csv").write_text("study_id,fold\n7,0\n8,2\n9,0\n")
    utils.check_folds([2, 0], tmp_path)
    for wrong in ([1], [0, 7], []):
        with pytest.raises(ValueError, match="FOLDS must be some of 0, 2, not"):
            utils.check_folds(wrong, tmp_path)


def test_messages_say_what_to_do_next(tmp_path):
    stages = utils.pipeline_stages(ROOT / "notebooks", "data", tmp_path, "demo")
    with pytest.raises(ValueError, match="no stage '04_train_vit_level_3'. FOLDS leaves fold 3 out: add it there"):
        utils.choose_stages(stages, ["04_train_vit_level_3"])
    with pytest.raises(TypeError, match=r"papermill takes it as -y '\{FOLDS: \[0\]\}'"):
        check_values({"FOLDS": [0, 1]}, {"FOLDS": "[0]"})
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "train.csv").write_text("study_id\n")
    with pytest.raises(FileNotFoundError, match="did you mean .*unpacked?"):
        utils.read_labels(tmp_path / "train.csv")
    with pytest.raises(FileNotFoundError, match="^/no/such/place does not exist: correct the path$"):
        utils.find_input("/no/such/place")
    with pytest.raises(ValueError, match="MEMBER must be one of yolo, slices, level, study, not 'levle'"):
        utils.read_inspection(tmp_path, tmp_path, first="levle")


# ---- SETTINGS, MEMBERS and WORKERS of the table ----


def table_of(settings=None, size="demo", **more):
    stages = utils.pipeline_stages(ROOT / "notebooks", "data", "out", size, settings=settings or {}, **more)
    return {stage["name"]: stage["parameters"] for stage in stages}


def test_settings_reach_stages_by_notebook_training_kernel_and_stage_the_narrower_name_winning():
    given = {
        "04_train_vit_level_3": {"EPOCHS": 9},
        "04_train_vit": {"EPOCHS": 3, "DROPOUT": 1.0e-1},
        "04_train_vit_level": {"EPOCHS": 5},
        "train-vit-study-3": {"EPOCHS": 7},
        "05_inference": {"HOURS": 2},
    }
    found = table_of(given, folds=[0, 3])
    epochs = {name: found[name].get("EPOCHS") for name in found if name.startswith("04")}
    assert epochs == {
        "04_train_vit_level_0": 5,
        "04_train_vit_level_3": 9,
        "04_train_vit_slices_0": 3,
        "04_train_vit_slices_3": 3,
        "04_train_vit_study_0": 3,
        "04_train_vit_study_3": 7,
    }
    assert found["04_train_vit_slices_0"]["DROPOUT"] == 0.1 and found["05_inference"]["HOURS"] == 2.0
    assert found["03_train_yolo_ss_0"] == table_of(folds=[0, 3])["03_train_yolo_ss_0"]


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"04_train_vti": {}}, ValueError, "no stage, notebook or kernel '04_train_vti'. Did you mean 04_train_vit"),
        ({"04_TRAIN_VIT_LEVEL_3": {}}, ValueError, "Did you mean 04_train_vit_level"),
        ({"05_inference": {"HUORS": 2.0}}, ValueError, "SETTINGS of 05_inference: .*'HUORS'. Did you mean HOURS"),
        ({"04_train_vit": {"EPOCHS": -1}}, ValueError, "SETTINGS of 04_train_vit: .*EPOCHS must be from 1"),
        ({"04_train_vit": {"EPOCHS": "7"}}, TypeError, "SETTINGS of 04_train_vit: .*EPOCHS must be int"),
        ({"04_train_vit": 7}, TypeError, "04_train_vit must hold parameters"),
        ({"04_train_vit_level": {"FOLDS": [1]}}, ValueError, "the pipeline itself sets FOLDS; FOLDS and MEMBERS"),
        ({"04_train_vit": {"SCOPE": "study"}}, ValueError, "the pipeline itself sets SCOPE"),
        ({"01_preprocess": {"OUT": "x"}}, ValueError, "the pipeline itself sets OUT"),
    ],
)
def test_wrong_settings_are_named_with_what_is_meant(given, error, words):
    with pytest.raises(error, match=words):
        table_of(given)


def test_members_choose_what_is_trained_and_weighed():
    found = table_of(size="full", folds=[0, 1], members=["slices", "yolo"])
    trained = [name for name in found if name[:2] in ("03", "04")]
    assert len(trained) == 8 and not [name for name in trained if "level" in name or "study" in name]
    assert [Path(p).name for p in found["05_inference"]["WEIGHTS"]] == ["02_train_spinenet", *trained]
    with pytest.raises(ValueError, match="MEMBERS: there is no member 'slice'. Did you mean slices"):
        table_of(members=["slice"])


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("size", ["demo", "smoke", "hour", "full"])
def test_workers_reach_every_stage_that_has_them(size, workers):
    stages = utils.pipeline_stages(ROOT / "notebooks", "data", "out", size, workers=workers)
    trained = [stage for stage in stages if stage["name"][:2] in ("03", "04")]
    for stage in stages:
        given, known = stage["parameters"], check_notebook_parameters(stage["notebook"], {})
        assert ("WORKERS" in given) == ("WORKERS" in known)
        if stage in trained and size != "full":  # side by side on a core each: what is left of the cores loads for them
            assert given["WORKERS"] == (1 if workers == 16 else 0)
        elif "WORKERS" in known:
            assert given["WORKERS"] == workers
        if "READERS" in known:
            assert given["READERS"] == min(workers, 4)


def test_inference_alone_takes_whatever_was_trained(tmp_path):
    for name in ("02_train_spinenet", "04_train_vit_study_0", "04_train_vit_study_3", "04_train_vit_study_4"):
        (tmp_path / name).mkdir()
    stages = utils.pipeline_stages(ROOT / "notebooks", "data", tmp_path, folds=[0, 3])
    for names, more in ((["05_inference"], []), (["05_inference", "04_train_vit_level_3"], ["04_train_vit_level_3"])):
        chosen = {s["name"]: s for s in utils.choose_stages(stages, names)}
        read = [Path(place).name for place in chosen["05_inference"]["parameters"]["WEIGHTS"]]
        assert sorted(read) == sorted(["02_train_spinenet", "04_train_vit_study_0", "04_train_vit_study_3", *more])
    whole = utils.choose_stages(stages, [])[-2]["parameters"]["WEIGHTS"]
    assert whole == stages[-2]["parameters"]["WEIGHTS"] and len(whole) == 13
    with pytest.raises(ValueError, match="no stage '05_inferense'. Did you mean 05_inference"):
        utils.choose_stages(stages, ["05_inferense"])
