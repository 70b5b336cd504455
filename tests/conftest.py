"""Every test sees the repository's modules; torch's threads sleep while they wait."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side have a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.fsync = lambda file: None  # waiting for the disk guards against power cuts, which no test makes
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

# The files that take longest, in this order first: processes that share out the files then end about together.
LONGEST = ("pipeline", "inference", "distributed", "yolo", "publish", "classifiers", "spinenet", "broken_studies")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.path).parent.name == "browser":
            item.add_marker(pytest.mark.slow)

    def order(item):
        name = Path(item.path).stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=order)
