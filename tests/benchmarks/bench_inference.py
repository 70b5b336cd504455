"""Studies an hour: this kit's stream beside the same work one study and one slice at a time, as solutions A and B did.

    python tests/benchmarks/bench_inference.py --run runs/demo --studies 12 --json inference.json

Both ways use the same files, the same weights and the same number of CPU threads, and must give the same rows. The
plain way reads a study, passes its slices through SpineNet one by one and its patches through the detectors one by one,
cuts and predicts one level after the other, and only then reads the next study; PyTorch runs its networks, while the
stream takes what lumbar/engine.py chooses. Each way runs in a fresh process, in turns; its memory is that process' peak
less what it holds with the weights loaded. It ends with an error where the rows differ by more than .01. Both have the
solutions' members and one numbering. --run: a folder with the outputs of 02 to 04 (and, by default, `data`); without
one, phantom studies and random weights of two folds, of the demo's size, are made. A script, which pytest does not
collect.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

import utils  # noqa: E402
from lumbar.data.dicom import read_study  # noqa: E402
from lumbar.data.greys import normalise_study  # noqa: E402
from lumbar.grade.classifier import predict_crops  # noqa: E402
from lumbar.grade.crops import cut_crops  # noqa: E402
from lumbar.grade.detector import yolo_studies  # noqa: E402
from lumbar.grade.ensemble import combine_members, default_ensemble  # noqa: E402
from lumbar.serve.members import weight_folders  # noqa: E402
from lumbar.serve.study import studies_to_predict  # noqa: E402
from lumbar.spine import naming  # noqa: E402
from lumbar.spine.levels import locate_levels_surely  # noqa: E402
from lumbar.spine.spinenet import detect_vertebrae  # noqa: E402

STEPS = ("reading", "locating", "cropping", "yolo", "level", "study")


def make_inputs(folder, studies):
    """Studies (one phantom with other noise each) and random weights of two folds of the demo's size in `folder`."""
    import pydicom
    import tiny

    for fold in (0, 1):
        tiny.write_members(folder / "weights", shape=48, imgsz=256, fold=fold)
    rows = []
    for study_id in range(1, studies + 1):
        place = folder / "data" / "test_images" / str(study_id)
        if study_id <= 2:
            tiny.write_study(place, seed=study_id, slices=(15, 26), pixels=(320, 256))
        else:
            rng = np.random.default_rng(study_id)
            for path in (folder / "data" / "test_images" / str(1 + study_id % 2)).glob("*/*.dcm"):
                dataset = pydicom.dcmread(path)
                stored = dataset.pixel_array
                dataset.PixelData = (stored + rng.integers(0, 40, stored.shape).astype(stored.dtype)).tobytes()
                (place / path.parent.name).mkdir(parents=True, exist_ok=True)
                dataset.save_as(place / path.parent.name / path.name)
        rows += [(study_id, series_id, what) for series_id, what in tiny.SERIES.items()]
    columns = ["study_id", "series_id", "series_description"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "data" / "test_series_descriptions.csv", index=False)


def first_studies(data, folder, split, count):
    """A data folder with the first `count` studies of another, by links."""
    table = pd.read_csv(data / f"{split}_series_descriptions.csv")
    chosen = table["study_id"].drop_duplicates().head(count)
    (folder / f"{split}_images").mkdir(parents=True)
    table[table["study_id"].isin(chosen)].to_csv(folder / f"{split}_series_descriptions.csv", index=False)
    for study_id in chosen:
        source = (data / f"{split}_images" / str(study_id)).resolve()
        (folder / f"{split}_images" / str(study_id)).symlink_to(source)


def stream(data, split, members, out, views, batch, readers):
    """The kit's way: (submission, dict step -> seconds summed over studies, wall seconds)."""
    started = time.perf_counter()
    submission, log, _, _ = utils.infer_studies(
        data, split, members, default_ensemble(), out, views, batch_studies=batch, readers=readers
    )
    wall_s = time.perf_counter() - started
    return submission, {step: float(log[f"{step}_s"].sum()) for step in STEPS}, wall_s


def mean_of_folds(said):
    """Mean log probabilities of the folds, normalised: list of (..., 3), NaN where a fold says nothing of a row."""
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows of which no fold says anything
        p = np.exp(np.nanmean(np.log(np.clip(said, 1e-12, 1)), 0))
    return p / p.sum(-1, keepdims=True)


def plainly(data, split, members, views):
    """One study, slice, patch and level at a time: as stream."""
    started, seconds = time.perf_counter(), dict.fromkeys(STEPS, 0.0)
    jobs = studies_to_predict(data, split)
    answers = {m: np.full((len(jobs), 5, 5, 3), np.nan) for m in utils.MEMBERS}

    def timed(step, work):
        begun = time.perf_counter()
        result = work()
        seconds[step] += time.perf_counter() - begun
        return result

    def crops_of(scope, about, study, boxes):
        return timed("cropping", lambda: cut_crops(study, boxes, about["crop"], members.device))

    for number, (study_id, series) in enumerate(jobs.items()):
        folder = data / f"{split}_images" / str(study_id)
        study = timed("reading", lambda folder=folder, series=series: normalise_study(read_study(folder, series)))
        boxes = timed(
            "locating",
            lambda study=study: locate_levels_surely(
                study,
                replace(members.placement, detector=lambda v: detect_vertebrae(members.placement.network, v, 1)),
            )[0],
        )
        for condition in utils.DETECTORS:
            folds = []
            for own in [own for own in members.weights.get("yolo", []) if own.model.condition == condition]:
                (found,) = timed(
                    "yolo",
                    lambda own=own, study=study, boxes=boxes: yolo_studies(
                        own.model, [study], [boxes], utils.MEMBERS["yolo"].views(own, views), batch=1
                    ),
                )
                folds.append(found)
            if folds:
                answers["yolo"][number, list(utils.DETECTORS[condition][1])] = mean_of_folds(folds)
        folds = []
        for own in members.weights.get("level", []):
            model, about = own.model, own.about
            said = []
            for level, box in enumerate(boxes):
                crops = crops_of("level", about, study, [box])
                said.append(
                    timed(
                        "level",
                        lambda crops=crops, level=level, model=model, about=about, own=own: predict_crops(
                            [model],
                            crops,
                            about["crop"],
                            np.array([level]),
                            utils.MEMBERS["level"].views(own, views),
                            1,
                        ),
                    )[0]
                )
            folds.append(np.stack(said, 1))
        if folds:
            answers["level"][number] = mean_of_folds(folds)
        folds = []
        for own in members.weights.get("study", []):
            model, about = own.model, own.about
            crops = crops_of("study", about, study, boxes)
            (found,) = timed(
                "study",
                lambda crops=crops, model=model, about=about, own=own: predict_crops(
                    [model], crops, about["crop"], None, utils.MEMBERS["study"].views(own, views), 1
                ),
            )
            folds.append(found)
        if folds:
            answers["study"][number] = mean_of_folds(folds)
    answers = {m: p for m, p in answers.items() if np.isfinite(p).any()}
    probabilities, _ = combine_members(answers, default_ensemble(), members.prior)
    return utils.to_submission(list(jobs), probabilities), seconds, time.perf_counter() - started


def measure(arguments):
    """One way in this process: prints a JSON line, writes its submission."""
    torch.set_num_threads(arguments.threads)
    naming._LEAST_SHARE = np.inf  # the solutions ask for one numbering, so both ways do
    own = ("yolo", "level", "study")  # as the solutions have them
    members = utils.load_members(weight_folders([arguments.weights]), own, arguments.device)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak so far, which a child even has from its parent, is forgotten
    held_mb, cpu_s = peak_mb(), time.process_time()
    folder = Path(tempfile.mkdtemp(dir=arguments.work))
    how = arguments.views, arguments.batch, arguments.readers
    if arguments.only == "stream":
        found = stream(arguments.data, arguments.split, members, folder, *how)
    else:
        found = plainly(arguments.data, arguments.split, members, arguments.views)
    studies = len(found[0]) // 25
    result = {"wall_s": found[2] / studies, "cpu_s": (time.process_time() - cpu_s) / studies}
    result |= {step: s / studies for step, s in found[1].items()}
    utils.write_csv(arguments.work / f"{arguments.only}.csv", found[0])
    print(json.dumps({**result, "memory_mb": peak_mb() - held_mb, "studies": studies}))


def peak_mb():
    """The largest resident memory of this process so far, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder with weights and data")
    parser.add_argument("--data", type=Path, help="the competition's folder, default RUN/data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--studies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--views", type=int, default=-1, help="as VIEWS of notebook 05")
    parser.add_argument("--batch", type=int, default=4, help="as BATCH_STUDIES")
    parser.add_argument("--readers", type=int, default=0, help="as READERS")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the stream reads with more of them")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("stream", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        if arguments.run:
            first_studies(arguments.data or arguments.run / "data", work / "data", arguments.split, arguments.studies)
            weights, split = arguments.run, arguments.split
        else:
            make_inputs(work, arguments.studies)
            weights, split = work / "weights", "test"
        found = {"plain": [], "stream": []}
        for _ in range(arguments.rounds):
            for way, results in found.items():
                engine = {"LUMBAR_ENGINE": "torch"} if way == "plain" else {}
                command = [sys.executable, __file__, "--only", way, "--weights", str(weights), "--work", str(work)]
                command += ["--data", str(work / "data"), "--split", split, "--device", arguments.device]
                for name in ("views", "batch", "readers", "threads"):
                    command += [f"--{name}", str(getattr(arguments, name))]
                done = subprocess.run(
                    command, env={**os.environ, **engine}, stdout=subprocess.PIPE, text=True, check=True
                )
                results.append(json.loads(done.stdout.strip().splitlines()[-1]))
        rows = [pd.read_csv(work / f"{way}.csv")[list(utils.SEVERITIES)].to_numpy() for way in found]
    table = pd.DataFrame(
        {way: {k: statistics.median(r[k] for r in results) for k in results[0]} for way, results in found.items()}
    ).T
    table["studies_an_hour"] = 3600 / table["wall_s"]
    print("seconds a study, by step; the stream's steps overlap, and cpu_s is what both ways' threads worked:")
    print(table.drop(columns="studies").round(3).to_string())
    ratio = table["wall_s"]["plain"] / table["wall_s"]["stream"]
    difference = float(np.abs(rows[0] - rows[1]).max())
    print(f"the stream is {ratio:.2f} times as fast; largest difference between the rows: {difference:.1e}")
    if arguments.json:
        utils.write_json(arguments.json, {**table.to_dict("index"), "ratio": ratio, "difference": difference})
    if not difference <= 0.01:  # rounding finds a body that a slice barely shows in one way, and not in the other
        sys.exit("the rows of the two ways differ: one of them is wrong")


if __name__ == "__main__":
    main()
