"""Reading and locating studies on a Dask cluster of one and of two workers, side by side in one run.

    python tests/benchmarks/bench_cluster.py [--studies 12] [--target 2000]

Workers are processes of this machine with one thread each. Studies are phantoms. What 16 workers need is counted, not
measured: the workers' share divided by 16, and what the client does by itself (the start, the tables) as it is.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import phantom  # noqa: E402
import utils  # noqa: E402
from lumbar.cluster import connect  # noqa: E402


@contextmanager
def cluster(folder, workers):
    """The file by which a scheduler with so many workers is found."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    python = [sys.executable, "-m"]
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    commands = [
        ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", *common],
        ["distributed.cli.dask_worker", "--nworkers", str(workers), "--nthreads", "1", *common],
    ]
    with open(folder / "log", "a") as log:
        running = [subprocess.Popen([*python, *c], cwd=ROOT, stdout=log, stderr=log) for c in commands]
        try:
            while not file.is_file() or not file.stat().st_size:
                time.sleep(0.1)
            with connect(str(file)) as client:
                client.wait_for_workers(workers)
                client.run(_warm)
            yield str(file)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def _warm():
    """What a worker imports before its first study."""
    import lumbar.data.preprocess  # noqa: F401
    import lumbar.spine.locating  # noqa: F401


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=12)
    parser.add_argument("--target", type=int, default=2000, help="studies to count for")
    given = parser.parse_args()
    model = utils.load_spinenet(ROOT / "weights" / "spinenet_phantom.safetensors")
    seconds: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        phantom.make_dataset(folder / "data", train=0, test=given.studies, seed=5, progress=False)
        levels = []
        for workers in (1, 2):
            out = folder / str(workers)
            with cluster(folder, workers) as scheduler:
                began = time.monotonic()
                utils.preprocess_studies(folder / "data", "test", out / "volumes", scheduler=scheduler)
                read = time.monotonic()
                found, _, _ = utils.locate_studies(utils.study_paths(out), model, scheduler=scheduler)
                seconds[workers] = {"reading": read - began, "locating": time.monotonic() - read}
            levels.append(found)
    assert levels[0].equals(levels[1]), "one worker and two find other levels"
    print(f"\n{given.studies} studies, seconds a study, and hours for {given.target}:\n")
    print(f"| step | 1 worker | 2 workers | ratio | {given.target} on 1 | on 2 | on 16, counted |")
    print("|---|---|---|---|---|---|---|")
    for step in ("reading", "locating"):
        one, two = (seconds[workers][step] / given.studies for workers in (1, 2))
        # t(w) = own + shared / w, from the two that were measured
        shared = max(2 * (one - two), 0.0)
        many = max(one - shared, 0.0) + shared / 16
        hours = [f"{value * given.target / 3600:.2f}" for value in (one, two, many)]
        print(f"| {step} | {one:.2f} | {two:.2f} | {one / two:.2f} | {' | '.join(hours)} |")


if __name__ == "__main__":
    main()
