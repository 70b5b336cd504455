"""The real `kaggle` client pushes our notebook to a stub of Kaggle's server on this machine."""

import json
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import utils

ROOT = Path(__file__).resolve().parents[1]
COMPETITION = "rsna-2024-lumbar-spine-degenerative-classification"
GOOD_ANSWER = {"url": "https://www.kaggle.com/code/somebody/lumbar-spine-inference", "versionNumber": 1}


class KaggleStub(ThreadingHTTPServer):
    """Answers every POST with `answer` and keeps what was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), KaggleStubHandler)
        self.requests = []
        self.answer = GOOD_ANSWER


class KaggleStubHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.path, body))
        answer = json.dumps(self.server.answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def stub():
    server = KaggleStub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def environment(stub, tmp_path):
    """Nothing of the caller's account or proxies; http goes to the stub, https nowhere."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "KAGGLE_CONFIG_DIR": str(tmp_path),
        "KAGGLE_USERNAME": "somebody",
        "KAGGLE_KEY": "dummy",
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "HTTP_PROXY": f"http://127.0.0.1:{stub.server_port}",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "",
    }


def test_push_sends_the_inference_notebook(stub, environment):
    said = utils.kaggle_push(ROOT, owner="somebody", environment=environment)
    assert "successfully pushed" in said
    saves = [body for path, body in stub.requests if path.endswith("SaveKernel")]
    assert len(saves) == 1
    assert len(saves[0]) < 1_000_000
    request = json.loads(saves[0])
    sent = json.loads(request["text"])
    ours = json.loads((ROOT / "notebooks" / "05_inference.ipynb").read_text(encoding="utf-8"))
    assert ["".join(cell["source"]) for cell in sent["cells"]] == ["".join(cell["source"]) for cell in ours["cells"]]
    assert sent["metadata"]["kernelspec"]["name"] == "python3"
    assert request["slug"] == "somebody/lumbar-spine-inference"
    assert request["language"] == "python" and request["kernelType"] == "notebook"
    assert request["enableInternet"] is False
    assert request["enableGpu"] is True and request["machineShape"] == "NvidiaTeslaT4"
    assert request["isPrivate"] is True
    assert request["competitionDataSources"] == [COMPETITION]
    assert request["datasetDataSources"] == [f"somebody/lumbar-spine-{kind}" for kind in ("code", "weights", "wheels")]


@pytest.mark.parametrize(
    "answer, reason",
    [
        ({"error": "Maximum batch GPU session count of 2 reached."}, "Maximum batch GPU session count"),
        ({**GOOD_ANSWER, "invalidDatasetSources": ["somebody/lumbar-spine-weights"]}, "not valid dataset sources"),
    ],
)
def test_refused_push_is_noticed(stub, environment, answer, reason):
    stub.answer = answer
    with pytest.raises(RuntimeError, match=f"exit status 0.*{reason}"):
        utils.kaggle_push(ROOT, owner="somebody", environment=environment)


def test_placeholder_is_not_pushed(stub, environment):
    with pytest.raises(ValueError, match="user name"):
        utils.kaggle_push(ROOT, environment=environment)
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
    assert utils.install_missing({"json": "json"}) == []
    with pytest.raises(ModuleNotFoundError, match="no-such-thing not installed: on Kaggle attach"):
        utils.install_missing({"no_such_thing": "no-such-thing"}, tmp_path)
    wheels = tmp_path / "lumbar-spine-wheels" / "wheels"
    wheels.mkdir(parents=True)
    info = "Metadata-Version: 2.1\nName: no-such-thing\nVersion: 1.0\n"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheels / "no_such_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("no_such_thing.py", "answer = 42\n")
        wheel.writestr("no_such_thing-1.0.dist-info/METADATA", info)
        wheel.writestr("no_such_thing-1.0.dist-info/WHEEL", tag)
        wheel.writestr("no_such_thing-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    assert utils.install_missing({"no_such_thing": "no-such-thing"}, tmp_path) == ["no-such-thing"]
    assert (tmp_path / "site" / "no_such_thing.py").is_file()
