"""A rehearsal of Kaggle's runs: its Python and packages, its folders, no network, the kernels as they are pushed.

    python tests/rehearsal/rehearse.py FOLDER [--chain] [--smoke] [--layout old] [--python PYTHON] [--json FILE]

In FOLDER (new or empty, 8 GB) it makes a virtual environment of Python 3.12 with the versions of Kaggle's image (IMAGE,
and nothing else that the image lacks), stages everything with publish's functions, lays the inputs out as Kaggle mounts
them, read-only, and runs the staged inference kernel by papermill in an empty working folder with only a test set in
place, as when a submission is scored: phantom studies, tiny random weights. submission.csv must have every row, be
probabilities, and agree with the same weights' predictions in this environment. Where the system allows it (root, or
user namespaces) the inputs are at /kaggle/input and the network is that of a machine with no other; elsewhere
KAGGLE_INPUT_DIR stands in for the mount, and sockets refuse. --chain: all staged kernels before it, too, on twelve
phantom studies, each fed with the outputs of the others (some ten minutes). --smoke: the chain of small kernels that
SMOKE of publish stages, as it is pushed, on the phantoms that its first kernel makes.

The environment stays in FOLDER/venv and is used again; delete FOLDER when done. A script, which pytest does not
collect.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

import utils  # noqa: E402
from lumbar.grade.pretrained import INSTALLED, pretrained_file  # noqa: E402
from lumbar.run.mounts import KAGGLE_HAS, NEEDED  # noqa: E402
from lumbar.run.pipeline import PRETRAINED_STAGE, kaggle_kernels, stage_table  # noqa: E402
from lumbar.serve.members import weight_folders  # noqa: E402

# Of Kaggle's image of August 2026; without a version: it has the package, in whichever is newest.
IMAGE = (
    "torch==2.10.0",
    "torchvision==0.25.0",
    "numpy==2.0.2",
    "pandas==2.2.2",
    "opencv-python-headless==4.13.*",
    "timm==1.0.26",
    "nbconvert==6.4.5",
    "ipywidgets==8.1.5",
    "pydicom",
    "papermill",
    "ipykernel",
    "scipy",
    "matplotlib",
    "safetensors",
    "pillow",
    "tqdm",
    "pyyaml",
    "requests",
    "psutil",
    "polars",
)
LACKING = ("timm_3d", "ultralytics", "spacecutter", "skorch", "open3d", "SimpleITK", "lumbar", "utils")
COMPETITION = "rsna-2024-lumbar-spine-degenerative-classification"
USER = "rehearsal"


def python_312():
    """A Python 3.12, from wherever this machine has one."""
    candidates = ["python3.12", *sorted(map(str, Path.home().glob(".pyenv/versions/3.12*/bin/python")))]
    for candidate in candidates:
        found = shutil.which(candidate)
        test = [found, "-c", "import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))"]
        if found and not subprocess.run(test, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            return found
    if uv := shutil.which("uv"):
        return subprocess.run([uv, "python", "find", "3.12"], text=True, stdout=subprocess.PIPE).stdout.strip() or None
    return None


def make_environment(folder):
    """The virtual environment; returns its python. A version that cannot be had is replaced by the newest."""
    python = folder / "venv" / "bin" / "python"
    if (folder / "venv" / "complete").is_file():
        return python
    base = python_312()
    if base is None:
        print("no Python 3.12 here: the rehearsal runs in this one's version")
    subprocess.run([base or sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    if subprocess.run([*pip, *IMAGE]).returncode:
        print("some of the image's versions cannot be had: the closest are taken")
        for package in IMAGE:
            if subprocess.run([*pip, package]).returncode:
                subprocess.run([*pip, package.partition("==")[0]], check=True)
    (folder / "venv" / "complete").touch()
    return python


def attach_dataset(inputs, layout, folder):
    """Mount a staged data set: its folders unpacked, its description gone, as Kaggle shows it."""
    place = inputs / ("" if layout == "old" else f"datasets/{USER}") / folder.name
    shutil.copytree(folder, place)
    (place / "dataset-metadata.json").unlink()


def attach_output(inputs, layout, slug, working):
    """Mount a kernel's output."""
    place = inputs / ("" if layout == "old" else f"notebooks/{USER}") / slug
    shutil.copytree(working, place)
    (place / "__notebook__.ipynb").write_text("{}")


def make_test_set(data, studies=3):
    """The files that are there when a submission is scored, of phantom studies; the last study lacks two series."""
    import tiny

    rows = []
    for study_id in range(1, studies + 1):
        tiny.write_study(data / "test_images" / str(study_id), seed=study_id)
        series = list(tiny.SERIES.items())
        if study_id == studies:
            for series_id, _ in series[:2]:
                shutil.rmtree(data / "test_images" / str(study_id) / str(series_id))
            series = series[2:]
        rows += [(study_id, *one) for one in series]
    columns = ["study_id", "series_id", "series_description"]
    utils.write_csv(data / "test_series_descriptions.csv", pd.DataFrame(rows, columns=columns))
    uniform = np.full((studies, len(utils.CONDITIONS), len(utils.LEVELS), 3), 1 / 3)
    utils.write_csv(data / "sample_submission.csv", utils.to_submission(np.arange(1, studies + 1), uniform))


def attach_random_weights(inputs, layout, folder):
    """Tiny random weights, as the outputs of the kernels that train them."""
    import tiny

    tiny.write_members(folder, shape=32, imgsz=96)
    stages = {
        "train-spinenet": ("02_train_spinenet", "spinenet.safetensors"),
        "train-vit-level": ("04_train_vit_level_0", "level_0.safetensors"),
        "train-vit-study": ("04_train_vit_study_0", "study_0.safetensors"),
        "train-vit-slices": ("04_train_vit_slices_0", "slices_0.safetensors"),
        **{f"train-yolo-{c}": (f"03_train_yolo_{c}_0", f"yolo_{c}_0.safetensors") for c in utils.DETECTORS},
    }
    for kernel, (stage, weights) in stages.items():
        working = folder / kernel
        (working / stage).mkdir(parents=True)
        shutil.copyfile(folder / weights, working / stage / weights)
        attach_output(inputs, layout, f"lumbar-spine-{kernel}", working)


# Run as root of its namespaces: the network is a loopback of its own, the inputs cannot be written to.
ISOLATED = """
set -e
ip link set lo up 2>/dev/null || python3 - <<'END'
import fcntl, socket, struct
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh14s", b"lo", 0x41, b""))  # SIOCSIFFLAGS: up and running
END
mount --bind "$1" /kaggle/input
mount -o remount,ro,bind /kaggle/input
mount --bind "$2" /kaggle/working
cd /kaggle/working
shift 2
exec "$@"
"""

# Imported by every Python process at its start where namespaces are not to be had.
GUARD = """
import socket
def _refuse(original):
    def connect(self, address, *rest):
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(101, "Network is unreachable")
        return original(self, address, *rest)
    return connect
socket.socket.connect, socket.socket.connect_ex = _refuse(socket.socket.connect), _refuse(socket.socket.connect_ex)
"""


def isolation():
    """The command before which everything runs in namespaces of its own; [] where that is not allowed."""
    for flags in (["--net", "--mount"], ["--net", "--mount", "--map-root-user"]):
        command = ["unshare", *flags]
        probe = [*command, "bash", "-c", "mount --bind /tmp /mnt && mount -o remount,ro,bind /mnt && ! touch /mnt/x"]
        if shutil.which("unshare") and not subprocess.run(probe, stderr=subprocess.DEVNULL).returncode:
            try:
                for name in ("input", "working"):
                    Path(f"/kaggle/{name}").mkdir(parents=True, exist_ok=True)  # to mount upon; empty outside
                return command
            except OSError:
                break
    return []


def on_kaggle(command, inputs, working, scored=False, alone=True):
    """Run a command as Kaggle would: its environment, the inputs read-only, no network. Returns CompletedProcess.

    alone: in namespaces of its own, see isolation(); else with the stand-ins.
    """
    home = working.parent / f"home_{working.name}"
    home.mkdir(exist_ok=True)
    environment = {
        "PATH": f"{Path(command[0]).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PIP_CONFIG_FILE": os.devnull,
        **({"KAGGLE_IS_COMPETITION_RERUN": "1"} if scored else {}),
    }
    command = list(map(str, command))
    if alone:
        command = [*isolation(), "bash", "-c", ISOLATED, "rehearsal", str(inputs), str(working), *command]
    else:
        (home / "sitecustomize.py").write_text(GUARD)
        environment |= {"KAGGLE_INPUT_DIR": str(inputs), "PYTHONPATH": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=working, env=environment, text=True, capture_output=True)


def run_kernel(python, kernel, inputs, working, scored=False, alone=True):
    """Run a staged kernel by papermill in an empty working folder. Returns seconds; raises RuntimeError."""
    about = json.loads((kernel / "kernel-metadata.json").read_text())
    working.mkdir()
    source = (kernel / about["code_file"]).read_text()
    if not alone:  # there is no /kaggle/working then
        source = source.replace('\\"/kaggle/working\\"', f'\\"{working}\\"')
    notebook = working.parent / f"{working.name}.ipynb"
    notebook.write_text(source)
    started = time.time()
    command = [
        python,
        "-m",
        "papermill",
        "--log-output",
        "--no-progress-bar",
        notebook,
        notebook.with_suffix(".done.ipynb"),
    ]
    done = on_kaggle(command, inputs, working, scored, alone)
    (working.parent / f"{working.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{kernel.name} failed:\n{(done.stdout + done.stderr)[-5000:]}")
    return time.time() - started


def probe_environment(python, inputs, working, alone):
    """The versions there, as a dict. Raises AssertionError where the environment has what Kaggle's image lacks, reaches
    a network, or can write to its inputs."""
    code = f"""
import importlib.metadata as m, importlib.util as u, json, os, platform, socket
names = [n.partition("==")[0] for n in {IMAGE!r}]
found = {{"python": platform.python_version(), **{{n: m.version(n) for n in names}}}}
wrong = [f"has {{n}}" for n in {LACKING!r} if u.find_spec(n)]
try:
    socket.create_connection(("192.0.2.1", 80), 3)
    wrong.append("reaches a network")
except TimeoutError:
    wrong.append("would reach a network")
except OSError:
    pass
if {alone!r}:
    try:
        open("/kaggle/input/new", "w")
        wrong.append("writes to its inputs")
    except OSError:
        pass
print(json.dumps([found, wrong]))
"""
    done = on_kaggle([python, "-c", code], inputs, working, alone=alone)
    assert not done.returncode, done.stderr
    found, wrong = json.loads(done.stdout)
    assert not wrong, f"the environment {', '.join(wrong)}"
    return found


def remove_wheels(python):
    """Back to the image: what an earlier run installed from the wheels is not in it."""
    names = [package for module, package in NEEDED.items() if module not in KAGGLE_HAS]
    subprocess.run(
        [python, "-m", "pip", "uninstall", "--quiet", "--yes", *names], stderr=subprocess.DEVNULL, check=True
    )


def check_submission(submission, data):
    """Every row of the sample, in its form; raises AssertionError."""
    sample = pd.read_csv(data / "sample_submission.csv")
    assert list(submission.columns) == ["row_id", "normal_mild", "moderate", "severe"], list(submission.columns)
    assert sorted(submission["row_id"]) == sorted(sample["row_id"])
    values = submission[list(utils.SEVERITIES)].to_numpy()
    assert np.isfinite(values).all() and (values >= 0).all() and np.abs(values.sum(1) - 1).max() < 1e-9


def predict_here(data, inputs, out):
    """The same studies and weights in this environment, for comparison."""
    folders = weight_folders([inputs])
    members = utils.load_members(folders, device="cpu")
    ensemble = utils.ensemble_for(folders, data)
    return utils.infer_studies(data, "test", members, ensemble, out)[0]


def rehearse_scoring(python, folder, build, layout, alone):
    """The staged inference kernel with only a test set in place. Returns facts."""
    folder.mkdir()
    inputs = folder / "input"
    data = inputs / ("" if layout == "old" else "competitions") / COMPETITION
    data.mkdir(parents=True)
    make_test_set(data)
    for dataset in sorted((build / "datasets").iterdir()):
        attach_dataset(inputs, layout, dataset)
    attach_random_weights(inputs, layout, folder / "weights")
    remove_wheels(python)
    (folder / "empty").mkdir()
    facts = {"layout": layout, "namespaces": alone}
    facts["versions"] = probe_environment(python, inputs, folder / "empty", alone)
    before = {path: path.stat().st_mtime_ns for path in inputs.rglob("*")}
    facts["seconds"] = round(
        run_kernel(python, build / "kernels" / "inference", inputs, folder / "working", True, alone)
    )
    assert before == {path: path.stat().st_mtime_ns for path in inputs.rglob("*")}, "the inputs were written to"
    submission = pd.read_csv(folder / "working" / "submission.csv")
    check_submission(submission, data)
    log = pd.read_csv(folder / "working" / "05_inference" / "inference_log.csv")
    speaking = (log["members"] + " " + log["partial"].fillna("")).str.split().apply(set)
    assert all(names == set(utils.MEMBERS) for names in speaking[:-1]), log.to_dict("records")  # the last lacks series
    here = predict_here(data, inputs, folder / "here").set_index("row_id").loc[submission["row_id"]]
    difference = np.abs(here[list(utils.SEVERITIES)].to_numpy() - submission[list(utils.SEVERITIES)].to_numpy()).max()
    assert difference < 1e-3, f"the same weights predict otherwise in this environment: {difference}"
    facts |= {
        "rows": len(submission),
        "difference_to_here": float(difference),
        "members": [" ".join(sorted(names)) for names in speaking],
        "problems": log["problems"].fillna("").tolist(),
        "output": sorted(str(p.relative_to(folder / "working")) for p in (folder / "working").rglob("*.*")),
    }
    return facts


LITE = "tf_efficientnet_lite0"  # the slice network's backbone in the smoke test


def smoke_settings():
    """Parameters for the chain, by kernel: as short as the kit's own smoke test."""
    settings = {name: {} for name in kaggle_kernels()}
    for stage in stage_table((0,), "smoke"):
        settings[stage.kernel] = dict(stage.parameters)
        if stage.gpu and stage.name != "05_inference":
            settings[stage.kernel]["WORKERS"] = 0
        if stage.training and settings[stage.kernel].pop("PRETRAINED", "") != INSTALLED:
            settings[stage.kernel]["PRETRAINED"] = ""  # of the small networks there are no weights
    settings["inspect"]["MEMBER"] = "level"
    return settings


def rehearse_chain(python, folder, build, layout, alone):
    """All staged kernels in order, each with its data sets and the outputs that its kernel-metadata.json names."""
    import phantom

    folder.mkdir()
    phantom.make_dataset(folder / "data", train=10, test=2, seed=5, workers=1, prevalence=3.0, progress=False)
    seconds, working = {}, {}
    for name in kaggle_kernels():
        if name == "pretrained":  # the only one with internet: what it would have fetched comes out of a package
            known = pretrained_file(INSTALLED, LITE)  # as it is: its tensors are known by their order
            fetched = folder / name / PRETRAINED_STAGE / f"{LITE}{known.suffix}"
            fetched.parent.mkdir(parents=True)
            shutil.copyfile(known, fetched)
        about = json.loads((build / "kernels" / name / "kernel-metadata.json").read_text())
        inputs = folder / f"input_{name}"
        data = inputs / ("" if layout == "old" else "competitions") / COMPETITION
        data.parent.mkdir(parents=True)
        shutil.copytree(folder / "data", data)
        for ref in about["dataset_sources"]:
            attach_dataset(inputs, layout, build / "datasets" / ref.rpartition("/")[2])
        for ref in about["kernel_sources"]:
            slug = ref.rpartition("/")[2]
            attach_output(inputs, layout, slug, working[slug])
        remove_wheels(python)
        seconds[name] = (
            0.0
            if name == "pretrained"
            else run_kernel(python, build / "kernels" / name, inputs, folder / name, alone=alone)
        )
        print(f"  {name}: {seconds[name]:.0f} s", flush=True)
        working[about["id"].rpartition("/")[2]] = folder / name
        shutil.rmtree(inputs)
    check_submission(pd.read_csv(folder / "inference" / "submission.csv"), folder / "data")
    scores = json.loads((folder / "report" / "06_report" / "manifest.json").read_text())["scores"]["test"]
    return {"seconds": {k: round(v) for k, v in seconds.items()}, "ensemble": scores["Ensemble"]["total"]}


def rehearse_smoke(python, folder, build, layout, alone):
    """The kernels of a smoke run in order: no competition data, each with its data sets and the outputs it names."""
    folder.mkdir()
    seconds, working = {}, {}
    plan = json.loads((build / "staged.json").read_text())
    for name in plan["stages"]:
        about = json.loads((build / "kernels" / name / "kernel-metadata.json").read_text())
        inputs = folder / f"input_{name}"
        inputs.mkdir()
        for ref in about["dataset_sources"]:
            if (build / "datasets" / ref.rpartition("/")[2]).is_dir():
                attach_dataset(inputs, layout, build / "datasets" / ref.rpartition("/")[2])
        for ref in about["kernel_sources"]:
            slug = ref.rpartition("/")[2]
            attach_output(inputs, layout, slug, working[slug])
        seconds[name] = run_kernel(python, build / "kernels" / name, inputs, folder / name, alone=alone)
        print(f"  {name}: {seconds[name]:.0f} s", flush=True)
        working[about["id"].rpartition("/")[2]] = folder / name
        shutil.rmtree(inputs)
    check_submission(pd.read_csv(folder / "smoke-inference" / "submission.csv"), folder / "smoke-preprocess" / "data")
    scores = json.loads((folder / "smoke-report" / "06_report" / "manifest.json").read_text())["scores"]["test"]
    return {"seconds": {k: round(v) for k, v in seconds.items()}, "ensemble": scores["Ensemble"]["total"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--layout", choices=("new", "old"), default="new")
    parser.add_argument("--no-namespaces", action="store_true", help="as where the system does not allow them")
    parser.add_argument("--python", type=Path, help="of an environment like make_environment's")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = arguments.python.absolute() if arguments.python else make_environment(folder)
    for old in ("build", "scoring", "chain", "chain_build", "smoke", "smoke_build"):
        shutil.rmtree(folder / old, ignore_errors=True)
    mounts = [path for path in map(Path, ("/kaggle/input", "/kaggle/working", "/kaggle")) if not path.exists()]
    alone = not arguments.no_namespaces and bool(isolation())
    if not alone:
        print("no namespaces: KAGGLE_INPUT_DIR stands in for the mount and a guard in Python for the cut network")
    try:
        utils.stage_kaggle(USER, folder / "build", ROOT)
        facts = {"scoring": rehearse_scoring(python, folder / "scoring", folder / "build", arguments.layout, alone)}
        print(json.dumps(facts["scoring"], indent=2), flush=True)
        if arguments.chain:
            utils.stage_kaggle(USER, folder / "chain_build", ROOT, parameters=smoke_settings())
            build = folder / "chain_build"
            facts["chain"] = rehearse_chain(python, folder / "chain", build, arguments.layout, alone)
            print(json.dumps(facts["chain"], indent=2))
        if arguments.smoke:
            build = folder / "smoke_build"
            utils.stage_kaggle(USER, build, ROOT, smoke=True)
            remove_wheels(python)
            facts["smoke"] = rehearse_smoke(python, folder / "smoke", build, arguments.layout, alone)
            print(json.dumps(facts["smoke"], indent=2))
    finally:
        for path in mounts:  # what was made to mount upon
            if path.is_dir():
                path.rmdir()
    if arguments.json:
        utils.write_json(arguments.json, facts)
    print("the rehearsal went well")


if __name__ == "__main__":
    main()
