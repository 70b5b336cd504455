"""What publish stages for Kaggle, and the real client pushing all of it to a stub of the server on this machine."""

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import tiny
import yaml
from kaggle_stub import KEY, USER, client_environment, failure, running_stub, write_wheel

import utils
from lumbar.run import mounts, publish
from lumbar.run.mounts import find_inputs, install_missing
from lumbar.run.parameters import assigned_literals, check_notebook_parameters, notebook_parameters
from lumbar.run.pipeline import kaggle_kernels
from lumbar.run.publish import kaggle_packages, kaggle_push, kaggle_upload, stage_wheels

ROOT = Path(__file__).resolve().parents[1]
COMPETITION = "rsna-2024-lumbar-spine-degenerative-classification"
NAMES = [
    "pretrained",
    "preprocess",
    "train-spinenet",
    "train-vit-level",
    "train-vit-slices",
    "train-yolo-ss",
    "train-yolo-nfn",
    "train-yolo-scs",
    "train-vit-study",
    "inference",
    "report",
    "inspect",
]


@pytest.fixture
def stub():
    with running_stub() as server:
        yield server


@pytest.fixture
def environment(stub, tmp_path):
    return client_environment(stub, tmp_path)


def wheels_from(folder):
    """stage_wheels without a download: an empty wheel."""
    write_wheel(folder)
    return folder


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Everything staged for training on Kaggle."""
    folder = tmp_path_factory.mktemp("publish") / "build"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "stage_wheels", wheels_from)
        utils.stage_kaggle(USER, folder, ROOT)
    return folder


def metadata(build, name):
    return json.loads((build / "kernels" / name / "kernel-metadata.json").read_text())


def staged_cell(build, name):
    """The one parameters cell of a staged notebook."""
    notebook = nbformat.read(build / "kernels" / name / metadata(build, name)["code_file"], as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assert not [c for c in notebook.cells if c.source.startswith("# Parameters\n")]  # such a one would win over edits
    assert cell.source.startswith("# Parameters:")  # how notebook_parameters knows it
    return cell.source


def source_of(name):
    """The notebook that a kernel is staged from."""
    return ROOT / "notebooks" / f"{kaggle_kernels()[name]['notebook']}.ipynb"


def told(build, name):
    """dict parameter -> value that the staged notebook has in place of the default."""
    defaults = check_notebook_parameters(source_of(name), {})
    return {key: value for key, value in assigned_literals(staged_cell(build, name)).items() if value != defaults[key]}


# ---- Staging ----


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_staged_as_kaggle_takes_it(build, name):
    about, template = metadata(build, name), json.loads((ROOT / "kernel-metadata.json").read_text())
    slug = about["id"].removeprefix(f"{USER}/")
    made_of_title = re.sub(r"[^a-z0-9]+", "-", about["title"].lower())
    assert slug == f"lumbar-spine-{name}" == made_of_title and 6 <= len(slug) <= 50
    assert set(about) <= set(template) and None not in about.values()
    assert about["competition_sources"] == template["competition_sources"] == [COMPETITION]
    assert about["dataset_sources"] == [f"{USER}/lumbar-spine-code", f"{USER}/lumbar-spine-wheels"]
    # One kernel fetches weights and needs no GPU; all others are offline.
    assert about["enable_internet"] is (name == "pretrained") and about["is_private"] is True
    on_gpu = name.startswith("train-") or name == "inference"
    assert about["enable_gpu"] is on_gpu and ("machine_shape" in about) == on_gpu
    path = build / "kernels" / name / about["code_file"]
    assert path.stat().st_size < 1_000_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    values = assigned_literals(staged_cell(build, name))
    assert check_notebook_parameters(source_of(name), values) == values
    assert values["OUT"] == "/kaggle/working"
    assert values.get("DATA") == (None if name == "pretrained" else f"/kaggle/input/{COMPETITION}")
    assert metadata(build, name)["enable_internet"] == (name == "pretrained")


def test_kernels_are_the_stages_of_a_run_and_feed_one_another(build):
    assert sorted(path.name for path in (build / "kernels").iterdir()) == sorted(NAMES)
    kernels = kaggle_kernels()
    for number, (name, kernel) in enumerate(kernels.items()):
        assert set(kernel["needs"]) <= set(list(kernels)[:number])
        assert metadata(build, name)["kernel_sources"] == [f"{USER}/lumbar-spine-{need}" for need in kernel["needs"]]
        # Whatever is read from another kernel's output is among the sources, under the slug that it is pushed with.
        for value in assigned_literals(staged_cell(build, name)).values():
            if isinstance(value, str) and (slug := re.match("/kaggle/input/(lumbar-spine-[^/]+)", value)):
                assert f"{USER}/{slug[1]}" in metadata(build, name)["kernel_sources"]
    # The same stages as the local run's, each fold of each member once.
    stages = utils.pipeline_stages(ROOT / "notebooks", "data", "out", "full", folds=[0, 3])
    kernels = kaggle_kernels(folds=(3, 0))
    told = [(s["notebook"].stem, s["parameters"].get("CONDITION", s["parameters"].get("SCOPE"))) for s in stages]
    here = [(k["notebook"], k["parameters"].get("CONDITION", k["parameters"].get("SCOPE"))) for k in kernels.values()]
    assert sorted(told, key=str) == sorted(here[1:-1], key=str) and here[-1][0] == "inspect"
    # Trainings start from what the one kernel with internet fetches.
    assert here[0][0] == "pretrained" and kernels["pretrained"]["parameters"]["NAMES"] == utils.pretrained_names()
    for name in ("train-vit-slices", "train-yolo-ss-3", "train-vit-study-3"):
        assert "pretrained" in kernels[name]["needs"]
        assert kernels[name]["parameters"]["PRETRAINED"] == "/kaggle/input/lumbar-spine-pretrained/00_pretrained"
    assert "pretrained" not in kernels["train-vit-level"]["needs"]  # nobody has published its network's weights
    assert kernels["train-yolo-ss-3"]["parameters"]["FOLDS"] == [3] and "train-yolo-ss-3" in kernels["report"]["needs"]
    with pytest.raises(ValueError, match="FOLDS must be some of"):
        kaggle_kernels(folds=(5,))


def test_another_network_starts_from_its_own_weights():
    settings = {"04_train_vit_slices": {"BACKBONE": "tf_efficientnetv2_s"}, "04_train_vit_level": {"BACKBONE": "tiny"}}
    kernels = kaggle_kernels(members=("slices", "level"), settings=settings)
    assert kernels["pretrained"]["parameters"]["NAMES"] == ["tf_efficientnetv2_s"]
    assert "PRETRAINED" in kernels["train-vit-slices"]["parameters"]
    assert "PRETRAINED" not in kernels["train-vit-level"]["parameters"]
    # A published one for the level crops; a file of one's own needs nothing fetched.
    settings = {"train-vit-level": {"BACKBONE": "coatnet_rmlp_2_rw"}, "train-vit-slices": {"PRETRAINED": "mine.pth"}}
    kernels = kaggle_kernels(members=("slices", "level"), settings=settings)
    assert kernels["pretrained"]["parameters"]["NAMES"] == ["coatnet_rmlp_2_rw_224.sw_in1k"]
    assert (
        "pretrained" in kernels["train-vit-level"]["needs"] and "pretrained" not in kernels["train-vit-slices"]["needs"]
    )
    assert "pretrained" not in kaggle_kernels(members=("level",))  # nothing to fetch


@pytest.mark.parametrize("size, refused", [("full", True), ("demo", False)])
def test_weights_to_start_from_are_looked_for_where_they_are_used(tmp_path, size, refused):
    (tmp_path / "tf_efficientnetv2_s.in21k.safetensors").write_bytes(b"x")
    settings = {"04_train_vit": {"BACKBONE": "tf_efficientnetv2_s"}}
    options = dict(pretrained=str(tmp_path), members=["slices"])
    stages = utils.pipeline_stages(ROOT / "notebooks", "data", "out", size, settings=settings, **options)
    given = {stage["name"]: stage["parameters"].get("PRETRAINED") for stage in stages}
    assert given["04_train_vit_slices_0"] == (str(tmp_path) if refused else "installed")
    if refused:
        with pytest.raises(ValueError, match="nothing for convnext_small.*fetches them"):
            utils.pipeline_stages(ROOT / "notebooks", "data", "out", size, **options)


@pytest.mark.slow
def test_code_data_set_runs_alone(build, tmp_path):
    code = build / "datasets" / "lumbar-spine-code"
    assert not list(code.rglob("__pycache__")) and (code / "weights" / "spinenet_phantom.safetensors").is_file()
    there = {path.relative_to(ROOT) for path in (ROOT / "lumbar").rglob("*.*") if path.suffix != ".pyc"}
    assert {path.relative_to(code) for path in (code / "lumbar").rglob("*.*")} == there
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(code)!r}); import utils, phantom; print(utils)"],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert str(code) in done.stdout, done.stderr


def test_weights_made_elsewhere_become_a_data_set_that_inference_reads(tmp_path):
    run = tmp_path / "run"
    for stage, files in {
        "02_train_spinenet": ("spinenet.safetensors", "spinenet_before.safetensors", "levels.csv"),
        "04_train_vit_level_0": ("level_0.safetensors", "oof.csv", "training.png"),
        "04_train_vit_level_0.old-1": ("level_0.safetensors",),
        "05_inference": ("ensemble.json", "submission.csv"),
    }.items():
        (run / stage).mkdir(parents=True)
        for name in files:
            (run / stage / name).write_text(stage)
    utils.stage_kaggle(USER, tmp_path / "build", ROOT, weights=[run], wheels=False)
    data = tmp_path / "build" / "datasets" / "lumbar-spine-weights"
    files = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}
    assert files == {
        "dataset-metadata.json",
        "02_train_spinenet/spinenet.safetensors",
        "02_train_spinenet/ensemble.json",  # beside weights, where ensemble_for looks
        "04_train_vit_level_0/level_0.safetensors",
        "04_train_vit_level_0/oof.csv",
    }
    assert [path.name for path in (tmp_path / "build" / "kernels").iterdir()] == ["inference"]
    about = metadata(tmp_path / "build", "inference")
    assert about["kernel_sources"] == [] and f"{USER}/lumbar-spine-weights" in about["dataset_sources"]
    (run / "02_train_spinenet" / "spinenet.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="02_train_spinenet writes it"):
        utils.stage_kaggle(USER, tmp_path / "build", ROOT, weights=[run], wheels=False)


def run_cells(source, **edits):
    """The parameters in force where Kaggle runs a staged notebook whose parameters cell somebody edited by hand."""
    for name, text in edits.items():
        source, count = re.subn(rf"(?m)^{name} = .*?(  #.*)?$", rf"{name} = {text}\1", source)
        assert count == 1
    namespace = {}
    exec(source, namespace)
    return notebook_parameters([source], namespace)


def test_whoever_copies_a_kernel_and_edits_a_parameter_is_obeyed(tmp_path):
    given = {"EPOCHS": 7, "SHAPE": [96, 96, 96], "BACKBONE": "coatnet_nano_rw"}
    utils.stage_kaggle(USER, tmp_path / "b", ROOT, parameters={"train-vit-level": given}, wheels=False)
    source = staged_cell(tmp_path / "b", "train-vit-level")
    assert run_cells(source) | given == run_cells(source)
    edited = run_cells(source, EPOCHS="9", SHAPE="[64, 64, 64]", HOURS="2", BACKBONE="'tiny'", CACHE="True")
    assert [edited[name] for name in ("EPOCHS", "SHAPE", "HOURS", "BACKBONE", "CACHE")] == [
        9,
        [64, 64, 64],
        2.0,
        "tiny",
        True,
    ]
    # The comments say what a parameter is, also beside a value that was staged.
    default = next(line for line in parameters_source("04_train_vit").splitlines() if line.startswith("EPOCHS"))
    assert f"EPOCHS = 7  #{default.partition('#')[2]}\n" in source
    names = [node.targets[0].id for node in ast.parse(source).body]
    assert len(names) == len(set(names)) == len(ast.parse(parameters_source("04_train_vit")).body)
    # What is typed in there is checked as what papermill is given.
    with pytest.raises(ValueError, match="04_train_vit.ipynb: EPOCHS must be from 1"):
        run_cells(source, EPOCHS="-1")
    with pytest.raises(TypeError, match="04_train_vit.ipynb: FOLDS must be list"):
        run_cells(source, FOLDS="3")


def parameters_source(stem):
    cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
    return next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))


def test_settings_are_staged_and_mistakes_are_named(tmp_path):
    utils.stage_kaggle(USER, tmp_path / "b", ROOT, parameters={"train-vit-level": {"EPOCHS": 7}}, wheels=False)
    assert told(tmp_path / "b", "train-vit-level")["EPOCHS"] == 7
    for user in ("", "your-kaggle-user", "me@example.org", "a/b"):
        with pytest.raises(ValueError, match="no Kaggle user name.*address of your profile"):
            utils.stage_kaggle(user, tmp_path / "b", ROOT, wheels=False)
    with pytest.raises(
        ValueError, match="pushed.json does not say how train-vit-level was pushed.*It knows of no kernel"
    ):
        utils.stage_kaggle(USER, tmp_path / "b", ROOT, wheels=False, continued=["train-vit-level"])
    with pytest.raises(ValueError, match="no stage, notebook or kernel 'train-vit'. Did you mean 04_train_vit"):
        utils.stage_kaggle(USER, tmp_path / "b", ROOT, parameters={"train-vit": {}}, wheels=False)
    with pytest.raises(ValueError, match="Did you mean EPOCHS"):
        utils.stage_kaggle(USER, tmp_path / "b", ROOT, parameters={"train-vit-level": {"EPOCH": 7}}, wheels=False)
    (tmp_path / "mine" / "datasets").mkdir(parents=True)
    with pytest.raises(ValueError, match="not made by publish, which would delete it"):
        utils.stage_kaggle(USER, tmp_path / "mine", ROOT, wheels=False)
    assert (tmp_path / "mine" / "datasets").is_dir()
    shutil.copytree(ROOT / "notebooks", tmp_path / "kit" / "notebooks")
    text = (ROOT / "kernel-metadata.json").read_text().replace("/lumbar-spine-inf", f"/{'long-' * 8}inf")
    (tmp_path / "kit" / "kernel-metadata.json").write_text(text)
    with pytest.raises(ValueError, match="6 to 50 characters"):
        utils.stage_kaggle(USER, tmp_path / "b", tmp_path / "kit", wheels=False)


def test_wheels_are_of_kaggles_python_and_of_what_its_image_lacks(tmp_path, monkeypatch):
    packages = kaggle_packages()
    lacking = ["timm-3d", "spacecutter", "ultralytics-opencv-headless", "accelerate"]
    assert [p.partition("==")[0] for p in packages] == lacking
    calls = []

    def pip(command, **named):
        calls.append(command)
        write_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(mounts.subprocess, "run", pip)
    stage_wheels(tmp_path / "wheels")
    (command,) = calls
    assert "--no-deps" in command and command[-4:] == packages
    assert command[command.index("--python-version") + 1] == "3.12"
    monkeypatch.setattr(
        mounts.subprocess, "run", lambda c, **n: subprocess.CompletedProcess(c, 1, "No matching distribution")
    )
    with pytest.raises(RuntimeError, match="could not be downloaded: No matching"):
        stage_wheels(tmp_path / "none")


# ---- Pushing ----


@pytest.mark.slow
def test_everything_is_pushed_in_order_with_what_it_must_carry(stub, environment, build):
    stub.states["lumbar-spine-preprocess"] = ["QUEUED", "RUNNING"]
    said = utils.kaggle_publish(build, ["code", "wheels", *NAMES], environment, pause_s=0.0)
    assert set(said) == {"lumbar-spine-code", "lumbar-spine-wheels", *NAMES}
    saved = [json.loads(body) for method, body in stub.requests if method == "SaveKernel"]
    assert sorted(request["slug"] for request in saved) == sorted(f"{USER}/lumbar-spine-{name}" for name in NAMES)
    for request in saved:
        name = request["slug"].removeprefix(f"{USER}/lumbar-spine-")
        about = metadata(build, name)
        assert len(json.dumps(request)) < 1_000_000
        assert request["enableInternet"] is request["slug"].endswith("-pretrained") and request["isPrivate"] is True
        assert request["enableGpu"] is about["enable_gpu"]
        assert request.get("machineShape") == ("NvidiaTeslaT4" if about["enable_gpu"] else None)
        assert request["language"] == "python" and request["kernelType"] == "notebook"
        assert request["newTitle"] == about["title"]
        assert request["competitionDataSources"] == [COMPETITION]
        assert request["datasetDataSources"] == about["dataset_sources"]
        assert request.get("kernelDataSources", []) == about["kernel_sources"]
        sent = nbformat.reads(request["text"], as_version=4)
        kept = nbformat.read(build / "kernels" / name / about["code_file"], as_version=4)
        assert [cell.source for cell in sent.cells] == [cell.source for cell in kept.cells]
    # Each after all whose outputs it reads, which had finished by then.
    order = [request["slug"] for request in saved]
    for request in saved:
        for source in request.get("kernelDataSources", []):
            assert order.index(source) < order.index(request["slug"])
    asked = [m for m, _ in stub.requests]
    pushed = [place for place, method in enumerate(asked) if method == "SaveKernel"]
    number = [request["slug"] for request in saved].index(f"{USER}/lumbar-spine-preprocess")
    assert pushed[number + 1] - pushed[number] > 3  # looks at preprocess come before the next
    # Nothing of this account or machine is in a body.
    for method, body in stub.requests:
        assert KEY.encode() not in body and str(ROOT).encode() not in body, method


@pytest.mark.slow
def test_data_sets_travel_whole_and_a_second_time_as_a_version(stub, environment, build):
    folder = build / "datasets" / "lumbar-spine-code"
    assert "is being created" in kaggle_upload(folder, environment)
    (request,) = (json.loads(body) for method, body in stub.requests if method == "CreateDataset")
    assert request["ownerSlug"] == USER and request["slug"] == "lumbar-spine-code" and request["isPrivate"] is True
    assert request["title"] == "Lumbar Spine Code" and request["licenseName"] == "other"
    sent = stub.datasets["lumbar-spine-code"]
    assert set(sent) == {"utils.py", "notebooks.zip", "phantom.zip", "lumbar.zip", "weights.zip"}
    assert sent["utils.py"] == (ROOT / "utils.py").read_bytes()
    with zipfile.ZipFile(io.BytesIO(sent["lumbar.zip"])) as archive:  # Kaggle unpacks it into a folder of its name
        assert set(archive.namelist()) == {
            str(p.relative_to(folder / "lumbar")) for p in (folder / "lumbar").rglob("*.*")
        }
        assert archive.read("run/publish.py") == (folder / "lumbar" / "run" / "publish.py").read_bytes()
    kaggle_upload(folder, environment)
    assert [m for m, _ in stub.requests if m.startswith("CreateDataset")] == ["CreateDataset", "CreateDatasetVersion"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "refused, name, reason",
    [
        ({"SaveKernel": (200, {"error": "Maximum batch GPU session count of 2 reached."})}, "preprocess", "Maximum"),
        ({"SaveKernel": (403, {"message": "Forbidden"})}, "preprocess", "What to do: the user name"),
        ({"CreateDataset": (200, {"status": "error", "error": "Bad title"})}, "code", "Bad title"),
        ({"CreateDataset": (401, {"message": "Unauthorized"})}, "code", "What to do: make a token"),
        ({"StartBlobUpload": (400, {"message": "Quota exceeded"})}, "wheels", "Bad Request"),
        ({"SaveKernel": failure(409, "Conflict")}, "preprocess", "What to do: Kaggle has something of this title"),
        ({"CreateDataset": (409, "<html></html>")}, "code", "What to do: Kaggle has something of this title"),
    ],
)
def test_what_is_refused_is_a_failure_that_says_why(stub, environment, build, refused, name, reason):
    stub.datasets |= {"lumbar-spine-code": {}, "lumbar-spine-wheels": {}} if name == "preprocess" else {}
    stub.refuse = refused
    with pytest.raises(RuntimeError, match=f"(?s)failed.*{reason}"):
        utils.kaggle_publish(build, [name], environment, pause_s=0.0)


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(publish, "_PAUSES_S", (0.0, 0.0))


@pytest.mark.slow
def test_what_passes_is_tried_again(stub, environment, build, no_pauses):
    """A data set that is there gets a version, also when Kaggle stumbles while it is asked."""
    stub.datasets |= {"lumbar-spine-code": {}, "lumbar-spine-wheels": {}}
    stub.stumbles = {
        "GetDatasetStatus": [failure(500, "Internal Server Error"), (502, "<html>Bad Gateway</html>")],
        "SaveKernel": [(503, "<html>Service Unavailable</html>")],
    }
    kaggle_upload(build / "datasets" / "lumbar-spine-code", environment)
    assert "CreateDatasetVersion" in [m for m, _ in stub.requests] and stub.datasets["lumbar-spine-code"]
    assert "CreateDataset" not in [m for m, _ in stub.requests]
    assert "successfully pushed" in kaggle_push(build / "kernels" / "preprocess", environment=environment)


@pytest.mark.slow
def test_what_does_not_pass_is_no_slug_in_use(stub, environment, build, no_pauses):
    stub.datasets["lumbar-spine-code"] = {}
    stub.refuse["GetDatasetStatus"] = failure(500, "An internal server error occurred")
    with pytest.raises(RuntimeError, match="(?s)status failed.*Kaggle did not answer properly, also not when asked 2"):
        kaggle_upload(build / "datasets" / "lumbar-spine-code", environment)
    assert [m for m, _ in stub.requests] == ["GetDatasetStatus"] * 3


@pytest.mark.slow
def test_a_data_set_made_by_a_call_that_seemed_to_fail_gets_a_version(stub, environment, build, no_pauses):
    stub.after["CreateDataset"] = [(500, "<html>Internal Server Error</html>")]
    kaggle_upload(build / "datasets" / "lumbar-spine-code", environment)
    assert [m for m, _ in stub.requests if m.startswith("CreateDataset")] == ["CreateDataset", "CreateDatasetVersion"]


@pytest.mark.parametrize(
    "said, tries",
    [
        ("500 Server Error: Internal Server Error for url: http://x", 3),
        ("500 - An internal server error occurred. Please ensure that", 3),
        ("Something\n\nThis is a problem on Kaggle's side, not with your command. Please try again later.", 3),
        ("502 Server Error: Bad Gateway for url", 3),
        ("503 Server Error: Service Unavailable for url", 3),
        ("429 Client Error: Too Many Requests for url", 3),
        ("You have been rate limited. Wait a little while before retrying.", 3),
        ("403 Client Error: Forbidden for url", 1),
        ("404 Client Error: Not Found for url", 1),
        ("409 Client Error: Conflict for url", 1),
        ("Upload successful: x.zip (500B) 500/500", 1),
    ],
)
def test_only_what_passes_is_tried_again(monkeypatch, no_pauses, said, tries):
    calls = []

    def client(command, **named):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, said)

    monkeypatch.setattr(mounts.subprocess, "run", client)
    with pytest.raises(RuntimeError, match="failed"):
        publish._client_or_raise("a push", ["kernels", "push"], None, "pushed")
    assert len(calls) == tries


@pytest.mark.slow
def test_missing_sources_failed_kernels_and_unknown_names_stop_the_run(stub, environment, build):
    with pytest.raises(RuntimeError, match="(?s)not valid dataset sources.*push what it names first"):
        utils.kaggle_publish(build, ["preprocess"], environment, pause_s=0.0)
    stub.datasets |= {"lumbar-spine-code": {}, "lumbar-spine-wheels": {}}
    stub.states["lumbar-spine-preprocess"] = ["RUNNING", "ERROR"]
    with pytest.raises(RuntimeError, match="preprocess: error. What to do: read its log at https"):
        utils.kaggle_publish(build, ["preprocess", "train-spinenet"], environment, pause_s=0.0)
    assert f"{USER}/lumbar-spine-train-spinenet" not in stub.kernels
    with pytest.raises(ValueError, match="weights: not in .*; there are code, wheels, "):
        utils.kaggle_publish(build, ["weights"], environment)


def test_without_a_token_it_says_where_to_get_one(environment, build):
    nobody = {k: v for k, v in environment.items() if k not in ("KAGGLE_USERNAME", "KAGGLE_KEY")}
    with pytest.raises(RuntimeError, match="What to do: make a token at https://www.kaggle.com/settings"):
        kaggle_push(build / "kernels" / "preprocess", environment=nobody)


@pytest.mark.slow
def test_the_notebook_stages_and_sends_what_it_is_told(stub, environment, tmp_path):
    stub.datasets["lumbar-spine-wheels"] = {}
    given = {"USER": USER, "BUILD": str(tmp_path / "build"), "WHEELS": False, "PUSH": ["code", "preprocess"]}
    (tmp_path / "given.json").write_text(json.dumps(given))
    text = (ROOT / "notebooks" / "publish.ipynb").read_text()
    assert text.count("utils.kaggle_publish(ROOT / BUILD, PUSH)") == 1
    (tmp_path / "publish.ipynb").write_text(text.replace("ROOT / BUILD, PUSH)", "ROOT / BUILD, PUSH, pause_s=0)"))
    command = [sys.executable, "-m", "papermill", "--log-output", tmp_path / "publish.ipynb", tmp_path / "done.ipynb"]
    command += ["-f", tmp_path / "given.json"]
    own = {**os.environ, **environment, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=own, text=True, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert list(stub.kernels) == [f"{USER}/lumbar-spine-preprocess"] and "lumbar-spine-code" in stub.datasets
    assert "preprocess: complete" in done.stdout + done.stderr


# ---- Trainings that run out of time, and what is left ----

TRAININGS = [name for name in NAMES if name.startswith("train-") and name != "train-spinenet"]
STAGES = {name: kernel["stage"] for name, kernel in kaggle_kernels().items()}


def folder_of(build, tmp_path):
    """A copy of the staged folder, for tests that write into it."""
    return Path(shutil.copytree(build, tmp_path / "build"))


def output_of(stub, name, *files):
    """Let Kaggle have run a kernel whose output has these files in its stage's folder."""
    stub.kernels.setdefault(f"{USER}/lumbar-spine-{name}", {})
    stub.files[f"lumbar-spine-{name}"] = ["__notebook__.ipynb", *(f"{STAGES[name]}/{file}" for file in files)]


def everything_has_run(stub):
    stub.datasets |= {"lumbar-spine-code": {}, "lumbar-spine-wheels": {}}
    for name in NAMES:
        output_of(stub, name, "a.csv", "b.csv", "begun.json", "c.csv", "manifest.json")


@pytest.fixture
def fast_client(monkeypatch, stub):
    """The client's calls answered by the stub without a process each: the words are the real client's."""

    def client(arguments, environment=None):
        kind, action, *rest = map(str, arguments)
        if (kind, action) == ("kernels", "push"):
            about = json.loads((Path(rest[1]) / "kernel-metadata.json").read_text())
            text = (Path(rest[1]) / about["code_file"]).read_text()
            sources = {"datasetDataSources": about["dataset_sources"], "kernelDataSources": about["kernel_sources"]}
            _, answer = stub.answer("SaveKernel", {"slug": about["id"], "text": text, **sources})
            stub.requests.append(("SaveKernel", about["id"].encode()))
            if answer.get("error"):
                return 0, f"Kernel push error: {answer['error']}"
            return 0, f"Kernel version 1 successfully pushed. Please check progress at {answer['url']}"
        slug = rest[0].rpartition("/")[2]
        if action == "status":
            status, answer = stub.answer("GetKernelSessionStatus", {"kernelSlug": slug})
            said = f'{rest[0]} has status "KernelWorkerStatus.{answer.get("status")}"'
            return (0, said) if status == 200 else (1, answer["message"])
        token = rest[rest.index("--page-token") + 1] if "--page-token" in rest else ""
        status, answer = stub.answer("ListKernelFiles", {"kernelSlug": slug, "pageToken": token})
        if status != 200:
            return 1, answer["message"]
        more = [f"Next Page Token = {answer['nextPageToken']}"] if "nextPageToken" in answer else []
        rows = [f"{file['name']},1,2026-01-01" for file in answer["files"]]
        return 0, "\n".join([*more, "name,size,creationDate", *rows])

    monkeypatch.setattr(publish, "_client", client)


def pushed(stub):
    """What was pushed, in order."""
    return [body.decode().rpartition("lumbar-spine-")[2] for method, body in stub.requests if method == "SaveKernel"]


def parameters_of(command):
    """The parameters that a printed command gives to publish.ipynb, as papermill and its check take them."""
    words = shlex.split(command)
    assert words[:4] == ["papermill", "--log-output", "notebooks/publish.ipynb", "runs/publish.ipynb"]
    given = yaml.safe_load(words[words.index("-y") + 1])
    return {
        k: v for k, v in check_notebook_parameters(ROOT / "notebooks" / "publish.ipynb", given).items() if k in given
    }


def test_inference_goes_on_without_a_training_that_ran_out_of_time(stub, fast_client, build, tmp_path, capsys):
    build = folder_of(build, tmp_path)
    everything_has_run(stub)
    output_of(stub, "train-vit-level", "begun.json", "level_0.safetensors", "level_0.checkpoint", "a.csv")
    utils.kaggle_publish(build, ["train-vit-level", "train-vit-study", "inference", "report"], pause_s=0)
    assert pushed(stub) == ["train-vit-level", "train-vit-study", "inference", "report"]
    said = capsys.readouterr().out
    assert "train-vit-level: its HOURS were over before the training was; what comes after it goes on without" in said
    assert "train-vit-study: complete" in said and "inference: complete" in said
    command = re.search("To continue train-vit-level: (.*)", said)[1]
    assert parameters_of(command) == {
        "USER": USER,
        "BUILD": str(build),
        "CONTINUE": ["train-vit-level"],
        "WHEELS": False,
        "PUSH": ["all"],
    }


def test_continue_remembers_the_settings_of_then_and_pushes_only_what_must_be(
    stub, fast_client, build, tmp_path, capsys
):
    build = folder_of(build, tmp_path)
    given = {"train-vit-level-3": {"EPOCHS": 7}, "04_train_vit": {"DROPOUT": 0.1}}
    utils.stage_kaggle(USER, build, ROOT, (0, 3), parameters=given, wheels=False, members=["level", "slices"])
    everything_has_run(stub)
    for name in ("train-vit-level-3", "train-vit-slices-3"):
        stub.kernels[f"{USER}/lumbar-spine-{name}"] = {}
    utils.kaggle_publish(build, ["train-vit-level-3"], pause_s=0)
    before = assigned_literals(staged_cell(build, "train-vit-level-3"))
    assert before["EPOCHS"] == 7 and before["DROPOUT"] == 0.1
    # Other things are laid out meanwhile; then it is continued, and nothing of how it was pushed is said again.
    utils.stage_kaggle(USER, build, ROOT, parameters={"train-vit-level": {"EPOCHS": 1}}, wheels=False)
    utils.stage_kaggle(USER, build, ROOT, continued=["train-vit-level-3"])
    assert assigned_literals(staged_cell(build, "train-vit-level-3")) == before
    assert sorted(p.name for p in (build / "kernels").iterdir() if "train-vit" in p.name) == [
        "train-vit-level",
        "train-vit-level-3",
        "train-vit-slices",
        "train-vit-slices-3",
    ]
    assert f"{USER}/lumbar-spine-train-vit-level-3" in metadata(build, "train-vit-level-3")["kernel_sources"]
    assert not list((build / "datasets").glob("*wheels"))
    stub.files["lumbar-spine-train-vit-level-3"] = ["04_train_vit_level_3/begun.json"]
    del stub.requests[:]
    with pytest.MonkeyPatch.context() as patch:  # its next version finishes
        patch.setattr(publish, "_has_ended", lambda name, *rest: rest[3].add(name))
        utils.kaggle_publish(build, ["all"], pause_s=0)
    assert pushed(stub) == ["train-vit-level-3", "inference", "report", "inspect"]
    # What decides the result cannot be changed on the way, what does not can.
    with pytest.raises(ValueError, match="SETTINGS changes EPOCHS from 7 to 9 of train-vit-level-3, which would begin"):
        changed = {"train-vit-level-3": {"EPOCHS": 9}}
        utils.stage_kaggle(USER, build, ROOT, parameters=changed, continued=["train-vit-level-3"])
    with pytest.raises(ValueError, match="can be changed of train-vit-level-3, not of 04_train_vit"):
        changed = {"04_train_vit": {"HOURS": 9.0}}
        utils.stage_kaggle(USER, build, ROOT, parameters=changed, continued=["train-vit-level-3"])
    longer = {"train-vit-level-3": {"HOURS": 11}}
    utils.stage_kaggle(USER, build, ROOT, parameters=longer, continued=["train-vit-level-3"])
    assert assigned_literals(staged_cell(build, "train-vit-level-3")) == before | {"HOURS": 11.0}


@pytest.mark.parametrize(
    "files, state, words",
    [
        (["begun.json", "manifest.json"], "COMPLETE", "it has finished: there is nothing left to continue"),
        (["begun.json"], "RUNNING", "its last version is running: it can be continued when that has ended"),
        ([], "ERROR", r"its last version \(error\) left nothing in 04_train_vit_level_0 to go on with"),
        (None, "COMPLETE", "Kaggle has no run of it, so there is nothing to continue"),
    ],
)
def test_what_cannot_be_continued_is_said(stub, fast_client, build, tmp_path, capsys, files, state, words):
    build = folder_of(build, tmp_path)
    everything_has_run(stub)
    utils.kaggle_publish(build, ["train-vit-level"], pause_s=0)
    utils.stage_kaggle(USER, build, ROOT, continued=["train-vit-level"])
    output_of(stub, "train-vit-level", *(files or []))
    if files is None:
        del stub.kernels[f"{USER}/lumbar-spine-train-vit-level"]
    stub.states["lumbar-spine-train-vit-level"] = [state]
    del stub.requests[:]
    with pytest.raises(RuntimeError, match="nothing can be continued, see above. .* are run by: papermill") as caught:
        utils.kaggle_publish(build, ["all"], pause_s=0)
    assert re.search(f"train-vit-level: {words}", capsys.readouterr().out) and not pushed(stub)
    given = parameters_of(str(caught.value).partition("run by: ")[2])
    assert given["PUSH"] == ["inference", "report", "inspect"] and "CONTINUE" not in given
    with pytest.raises(ValueError, match="does not say how train-vit-lev was pushed.*Did you mean train-vit-level"):
        utils.stage_kaggle(USER, build, ROOT, continued=["train-vit-lev"])


@pytest.mark.slow
def test_the_clients_listing_of_an_output_is_read_page_by_page(stub, environment):
    output_of(stub, "train-vit-level", "a b.csv", "begun.json", "c.csv", "d.csv", "e.csv", "manifest.json")
    found = publish.kaggle_files(f"{USER}/lumbar-spine-train-vit-level", environment)
    assert found == stub.files["lumbar-spine-train-vit-level"] and len(found) == 7
    assert not publish._is_paused(found, "04_train_vit_level_0")
    assert publish._is_paused(found[:-1], "04_train_vit_level_0")
    assert publish.kaggle_files(f"{USER}/lumbar-spine-nothing", environment) == []
    assert publish._state_of(f"{USER}/lumbar-spine-nothing", environment) == ""


def test_inference_is_not_pushed_where_no_training_has_finished(stub, fast_client, build, tmp_path):
    build = folder_of(build, tmp_path)
    everything_has_run(stub)
    for name in TRAININGS:
        output_of(stub, name, "begun.json")
    with pytest.raises(RuntimeError, match="inference was not pushed: no training has finished. To continue") as caught:
        utils.kaggle_publish(build, ["train-vit-level", "inference"], pause_s=0)
    assert pushed(stub) == ["train-vit-level"]
    assert sorted(parameters_of(str(caught.value).partition(": papermill")[2].join(["papermill", ""]))["CONTINUE"]) == (
        sorted(TRAININGS)
    )


def test_what_a_kernel_reads_is_waited_for_and_what_is_not_there_is_named(stub, fast_client, build, tmp_path, capsys):
    build = folder_of(build, tmp_path)
    everything_has_run(stub)
    stub.states["lumbar-spine-train-vit-study"] = ["QUEUED", "RUNNING", "RUNNING"]
    utils.kaggle_publish(build, ["inference"], pause_s=0)
    said = capsys.readouterr().out
    assert "inference waits for train-vit-study, which is queued on Kaggle" in said
    assert pushed(stub) == ["inference"] and not stub.states["lumbar-spine-train-vit-study"]
    del stub.kernels[f"{USER}/lumbar-spine-train-yolo-ss"]
    with pytest.raises(RuntimeError, match="reads the output of train-yolo-ss, which Kaggle does not have") as caught:
        utils.kaggle_publish(build, ["inference", "report"], pause_s=0)
    given = parameters_of(str(caught.value).partition("done by: ")[2])
    assert given == {"USER": USER, "BUILD": str(build), "WHEELS": False, "PUSH": ["inference", "report"]}


def test_where_it_stops_it_prints_the_command_for_what_is_left(stub, fast_client, build, tmp_path, monkeypatch):
    build = folder_of(build, tmp_path)
    given = {"train-vit-level": {"BACKBONE": 'it\'s "quoted"'}}
    monkeypatch.setattr(publish, "stage_wheels", wheels_from)
    utils.stage_kaggle(USER, build, ROOT, (0, 1), parameters=given)
    everything_has_run(stub)
    stub.states["lumbar-spine-train-vit-level"] = ["ERROR"]
    names = ["train-vit-level", "train-vit-study", "inference"]
    with pytest.raises(RuntimeError, match="train-vit-level: error. What to do") as caught:
        utils.kaggle_publish(build, names, pause_s=0)
    told_to = parameters_of(str(caught.value).partition("done by: ")[2])
    # What runs is not pushed again: the next start waits for it.
    assert told_to["PUSH"] == ["train-vit-level", "inference"] and pushed(stub) == names[:2]
    assert told_to["FOLDS"] == [0, 1] and told_to["SETTINGS"] == given and told_to["WHEELS"] is False


def test_a_smoke_run_is_the_chain_on_phantoms_without_a_gpu(stub, fast_client, tmp_path):
    build = tmp_path / "build"
    utils.stage_kaggle(USER, build, ROOT, wheels=False, smoke=True)
    stub.datasets |= {"lumbar-spine-code": {}, "lumbar-spine-wheels": {}}
    names = [path.name for path in (build / "kernels").iterdir()]
    assert sorted(names) == sorted(f"smoke-{name}" for name in NAMES if name not in ("pretrained", "inspect"))
    for name in names:
        about, values = metadata(build, name), assigned_literals(staged_cell(build, name))
        assert about["enable_gpu"] is False and "machine_shape" not in about and about["enable_internet"] is False
        assert about["competition_sources"] == [] and len(about["id"].rpartition("/")[2]) <= 50
        # Everything is read from the chain itself: no real kernel's output, and no competition data.
        assert all(ref.startswith(f"{USER}/lumbar-spine-smoke-") for ref in about["kernel_sources"])
        for value in values.values():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and (slug := re.match("/kaggle/input/([^/]+)", text)):
                    assert f"{USER}/{slug[1]}" in about["kernel_sources"]
    first = assigned_literals(staged_cell(build, "smoke-preprocess"))
    assert (first["SIZE"], first["STAGES"], first["DATA"]) == ("smoke", ["01_preprocess"], "")
    kernels = [name for name in names if name != "smoke-preprocess"]
    utils.kaggle_publish(build, ["smoke-preprocess", *kernels], pause_s=0)
    order = pushed(stub)
    for name in names:
        needs = [ref.rpartition("lumbar-spine-")[2] for ref in metadata(build, name)["kernel_sources"]]
        assert all(order.index(need) < order.index(name) for need in needs)
    assert "No kernel uses a GPU" in utils.cost_line(utils.staged_costs(build))


@pytest.mark.slow
def test_the_smoke_run_starts_from_nothing_and_its_next_kernels_find_its_output(tmp_path, monkeypatch):
    """The chain's first kernel as Kaggle runs it, the kit nowhere but in the data set."""
    utils.stage_kaggle(USER, tmp_path / "build", ROOT, wheels=False, smoke=True)
    root, working = tmp_path / "input", tmp_path / "working"
    shutil.copytree(
        tmp_path / "build" / "datasets" / "lumbar-spine-code", root / "datasets" / USER / "lumbar-spine-code"
    )
    working.mkdir()
    source = tmp_path / "build" / "kernels" / "smoke-preprocess" / "lumbar-spine-smoke-preprocess.ipynb"
    text = source.read_text()
    # Fewer studies, as somebody may who copies it.
    for line, other in (("TRAIN_STUDIES = 10", "TRAIN_STUDIES = 6"), ("TEST_STUDIES = 2", "TEST_STUDIES = 1")):
        assert text.count(line) == 1
        text = text.replace(line, other)
    text = text.replace("/kaggle/working", str(working))
    (tmp_path / "kernel.ipynb").write_text(text)
    environment = {**os.environ, "KAGGLE_INPUT_DIR": str(root), "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "papermill", "--log-output", tmp_path / "kernel.ipynb", tmp_path / "done.ipynb"]
    done = subprocess.run(list(map(str, command)), cwd=working, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    shutil.copytree(working, root / "notebooks" / USER / "lumbar-spine-smoke-preprocess")
    monkeypatch.setenv("KAGGLE_INPUT_DIR", str(root))
    for name in ("smoke-train-spinenet", "smoke-train-vit-level"):
        found = find_inputs(assigned_literals(staged_cell(tmp_path / "build", name)))
        assert (Path(found["DATA"]) / "train.csv").is_file()
        assert (Path(found["PREPROCESSED"]) / "manifest.json").is_file()
        assert len(pd.read_csv(Path(found["DATA"]) / "train.csv")) == 6


def test_staged_kernels_say_what_they_cost(build):
    costs = utils.staged_costs(build)
    assert set(costs) == set(NAMES)
    assert all((costs[name].gpu_hours > 0) == metadata(build, name)["enable_gpu"] for name in NAMES)
    assert "GPU hours of Kaggle's 30 a week" in utils.cost_line(costs)


def test_members_leave_the_others_out(tmp_path):
    utils.stage_kaggle(USER, tmp_path / "b", ROOT, (0, 2), wheels=False, members=["slices"])
    names = {path.name for path in (tmp_path / "b" / "kernels").iterdir()}
    assert {name for name in names if name.startswith("train-vit")} == {"train-vit-slices", "train-vit-slices-2"}
    assert not [name for name in names if "yolo" in name]
    needs = metadata(tmp_path / "b", "inference")["kernel_sources"]
    trained = ["train-spinenet", "train-vit-slices", "train-vit-slices-2"]
    assert needs == [f"{USER}/lumbar-spine-{name}" for name in trained]
    assert told(tmp_path / "b", "inspect")["MEMBER"] == "slices"
    assert told(tmp_path / "b", "pretrained")["NAMES"] == ["convnext_small.fb_in22k_ft_in1k"]


# ---- Finding it all again on Kaggle ----

LAYOUTS = {
    "old": ("", "", ""),
    "new": ("competitions/", f"datasets/{USER}/", f"notebooks/{USER}/"),
}


@pytest.fixture(params=LAYOUTS)
def mounted(request, build, tmp_path, monkeypatch):
    """A tree of inputs as Kaggle mounts them, with stages that are little more than their manifests."""
    competitions, datasets, notebooks = LAYOUTS[request.param]
    root = tmp_path / "input"
    (root / f"{competitions}{COMPETITION}" / "test_images").mkdir(parents=True)
    shutil.copytree(build / "datasets" / "lumbar-spine-code", root / f"{datasets}lumbar-spine-code")
    write_wheel(root / f"{datasets}lumbar-spine-wheels")
    for kernel, stage in {
        "preprocess": "01_preprocess",
        "train-spinenet": "02_train_spinenet",
        "train-vit-level": "04_train_vit_level_0",
        "inference": "05_inference",
    }.items():
        folder = root / f"{notebooks}lumbar-spine-{kernel}" / stage
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    monkeypatch.setenv("KAGGLE_INPUT_DIR", str(root))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the report's links go
    return root


def test_every_staged_parameter_finds_its_input(build, mounted, tmp_path):
    for name in NAMES:
        given = assigned_literals(staged_cell(build, name))
        found = {**given, **find_inputs(given)}
        if name != "pretrained":
            assert Path(found["DATA"]).name == COMPETITION and Path(found["DATA"]).is_dir()
        assert found["OUT"] == "/kaggle/working"
        for key, stage in (("PREPROCESSED", "01_preprocess"), ("LEVELS_DIR", "02_train_spinenet")):
            assert key not in given or (Path(found[key]) / "manifest.json").is_file() and Path(found[key]).name == stage
    assert find_inputs(assigned_literals(staged_cell(build, "inference")))["WEIGHTS"] == [str(mounted)]
    run = Path(find_inputs(assigned_literals(staged_cell(build, "report")))["RUN"])
    stages = ["01_preprocess", "02_train_spinenet", "04_train_vit_level_0", "05_inference"]
    assert sorted(path.name for path in run.iterdir()) == stages and all(
        (run / s / "manifest.json").is_file() for s in stages
    )
    shown = find_inputs(assigned_literals(staged_cell(build, "inspect")))
    assert [Path(place).name for place in shown["PREDICTIONS"]] == stages
    assert (Path(shown["INFERENCE"]) / "manifest.json").is_file()
    # The notebooks' own defaults name other kernels: their stages are found by name.
    assert find_inputs({"PREPROCESSED": "/kaggle/input/another-name/01_preprocess"})["PREPROCESSED"] == str(
        next(mounted.rglob("01_preprocess"))
    )


def test_what_is_not_attached_is_said(mounted, capsys):
    assert find_inputs({"WEIGHTS": "/kaggle/input/somewhere", "OUT": "/kaggle/working", "SEED": 1}) == {
        "WEIGHTS": "/kaggle/input/somewhere"
    }
    assert "WEIGHTS: /kaggle/input/somewhere is not there; attached are" in capsys.readouterr().out


def test_inputs_elsewhere_are_left_alone(tmp_path):
    assert find_inputs({"DATA": "runs/demo/data", "WEIGHTS": [str(tmp_path)], "EPOCHS": 3}) == {}


def test_wheels_and_code_are_found_in_every_layout(mounted, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    assert install_missing({"no_such_thing": "no-such-thing"}) == ["no-such-thing"]
    assert (tmp_path / "site" / "no_such_thing.py").is_file()
    notebook = json.loads((ROOT / "notebooks" / "05_inference.ipynb").read_text())
    bootstrap = "".join(notebook["cells"][2]["source"]).partition("import utils")[0]
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", f"{bootstrap}\nprint(ROOT)"], cwd=tmp_path / "elsewhere", text=True, capture_output=True
    )
    assert done.stdout.strip() == str(next(mounted.rglob("lumbar-spine-code"))), done.stderr


@pytest.mark.slow
def test_staged_inference_runs_from_mounted_inputs_only(build, tmp_path):
    """papermill in an empty folder, the kit nowhere but in the data set: as Kaggle scores, with random weights."""
    root, working = tmp_path / "input", tmp_path / "working"
    data = root / "competitions" / COMPETITION
    tiny.write_study(data / "test_images" / "7", slices=(7, 9), pixels=(96, 80))
    rows = [(7, series_id, what) for series_id, what in tiny.SERIES.items()]
    columns = ["study_id", "series_id", "series_description"]
    pd.DataFrame(rows, columns=columns).to_csv(data / "test_series_descriptions.csv", index=False)
    code = root / "datasets" / USER / "lumbar-spine-code"
    shutil.copytree(build / "datasets" / "lumbar-spine-code", code)
    stage = root / "notebooks" / USER / "lumbar-spine-train-vit-level" / "04_train_vit_level_0"
    tiny.write_members(stage, imgsz=64, random_spinenet=True)
    working.mkdir()
    source = next((build / "kernels" / "inference").glob("*.ipynb"))
    environment = {**os.environ, "KAGGLE_INPUT_DIR": str(root), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    environment |= {"KAGGLE_IS_COMPETITION_RERUN": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"/kaggle/working"', repr(str(working)))  # this machine has no such folder
    nbformat.write(notebook, tmp_path / "kernel.ipynb")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "--log-output",
            str(tmp_path / "kernel.ipynb"),
            str(tmp_path / "done.ipynb"),
        ],
        cwd=working,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    submission = pd.read_csv(working / "submission.csv")
    assert len(submission) == 25 and submission["row_id"].str.startswith("7_").all()
    values = submission[list(utils.SEVERITIES)].to_numpy()
    assert np.isfinite(values).all() and np.abs(values.sum(1) - 1).max() < 1e-9
    log = pd.read_csv(working / "05_inference" / "inference_log.csv")
    assert set(f"{log['members'][0]} {log['partial'][0]}".split()) - {"nan"} == {"yolo", "slices", "level", "study"}
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}, "the inputs were written to"
